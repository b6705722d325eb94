"""The scene stage: a folder of posed images, or the embedded scene, becomes the run's scene.

A run remembers what its scene was made from: the folder, the name, and every setting. `nelf scene`
without options makes the same scene again, or keeps it when the files that were read are unchanged.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightfield.errors import CheckpointError, ConfigError, SceneError
from lightfield.files import sha256_of
from lightfield.progress import Progress
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.assembly import SceneChoice, scene_from
from lightfield.scenes.background import parsed_color
from lightfield.scenes.bounds import BoundsChoice
from lightfield.scenes.bricks import bricks_scene, one_ray_reference_db
from lightfield.scenes.capture import Capture
from lightfield.scenes.formats import read_capture
from lightfield.scenes.images import EnlargementError
from lightfield.scenes.scene import Scene, save_scene
from pipeline.console import Console
from pipeline.presets import Preset, PresetName, SceneConfig, SceneKind

EMBEDDED = "bricks"
EXAMPLES = (Path("data/nerf_synthetic"), Path("data/nerf_llff_data"))
"""Where `make data` puts example scenes; a run takes the one of its name."""
HASHING_THREADS = 4
SETTINGS_OF_THE_DATA = ("background", "box", "center", "near", "far", "keep_units")


@dataclass(frozen=True)
class BegunScene:
    """What a run's scene was made from."""

    data: str
    """Folder, or `bricks`."""
    name: str
    preset: PresetName
    kind: SceneKind
    config: SceneConfig
    identity: Any
    """What tells whether the files that were read have changed."""

    def settings_for(self, chosen: Preset) -> SceneConfig:
        """The settings with which the scene is made again: all of them with the same preset, and what
        was said of the data with another one."""
        if chosen.name == self.preset:
            return self.config
        kept = {name: getattr(self.config, name) for name in SETTINGS_OF_THE_DATA}
        return replace(chosen.scene, **kept)


def begun_scene(run: Run) -> BegunScene | None:
    """What the run's scene was made from, or None where there is no scene, or one that is damaged."""
    try:
        artifact = run.find("scene")
        if artifact is None:
            return None
        details, config = artifact.manifest["details"], artifact.manifest["config"]
        known = {entry.name for entry in fields(SceneConfig)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items()
            if name in known
        }
        return BegunScene(
            data=str(details["data"]),
            name=str(details["name"]),
            preset=details["preset"],
            kind=details["kind"],
            config=SceneConfig(**values),
            identity=config["source"],
        )
    except (CheckpointError, ConfigError, KeyError, TypeError):
        return None


def data_of(run: Run, asked: str | None, begun: BegunScene | None) -> str:
    """The folder that a scene is made from, or `bricks`: what was asked for, what the run was made
    from, or the example scene of the run's name, or else the embedded scene.

    Raises:
        SceneError: when the run holds a scene that does not say what it was made from.
    """
    if asked is not None:
        return asked
    if begun is not None:
        return begun.data
    if (run.path / "scene").exists():
        raise SceneError(
            "this run holds a scene that does not say which images it was made from",
            where=run.path / "scene",
            remedy="name them with --data FOLDER, or `--data bricks` for the embedded scene",
        )
    name = run.path.resolve().name
    found = [folder / name for folder in EXAMPLES if (folder / name).is_dir()]
    return str(found[0]) if found else EMBEDDED


def is_same_data(data: str, begun: BegunScene) -> bool:
    """Whether this is the folder that the run was made from."""
    return data == begun.data or (data != EMBEDDED and str(Path(data).resolve()) == begun.data)


def name_of(run: Run, data: str, begun: BegunScene | None) -> str:
    """The scene's name where none was asked for."""
    if begun is not None and is_same_data(data, begun):
        return begun.name
    return EMBEDDED if data == EMBEDDED else run.path.resolve().name


def make_scene(
    run: Run,
    data: str,
    name: str,
    config: SceneConfig,
    factor: int,
    preset: str,
    console: Console,
) -> Artifact:
    """Load (or render) the scene's images into the run; `data` is a folder or `bricks`.

    Raises:
        SceneError: when the folder holds no scene, or a damaged one.
        ConfigError: when a setting makes no sense.
    """
    begun = begun_scene(run)
    capture, identity = None, EMBEDDED
    if data == EMBEDDED:
        _check_embedded(config, factor, console)
    else:
        folder = Path(data)
        data = str(folder.resolve())
        if begun is not None and begun.data == data and not folder.exists():
            console.say(f"scene: {data} is gone; the scene made from it is kept")
            identity = begun.identity
        else:
            capture = read_capture(folder, config.resolution)
            identity = _identity(capture)
    if begun is not None and begun.identity != identity:
        changed = "which has changed" if begun.data == data else f"and is now made from {data}"
        console.say(
            f"scene: this run was made from {begun.data}, {changed}; all later stages will be made again"
        )
    settings = {**asdict(config), "factor": factor, "name": name, "preset": preset}
    settings["source"] = identity

    def work(stage: StageWriter) -> None:
        with console.progress("scene") as progress:
            if data == EMBEDDED:
                scene = replace(_embedded_scene(config, factor, progress), name=name)
                stage.metrics["one_ray_reference_db"] = one_ray_reference_db(scene)
            else:
                read = capture or read_capture(Path(data), config.resolution)
                scene = _scene(read, choice_of(config, name, factor), console, progress)
        for note in scene.notes:
            console.say(f"scene: {note}")
        save_scene(scene, stage.path)
        stage.metrics |= {
            "width": scene.intrinsics.width,
            "height": scene.intrinsics.height,
            "train_views": len(scene.train),
            "val_views": len(scene.val),
            "test_views": len(scene.test),
        }
        stage.details |= {
            "preset": preset,
            "source": scene.source,
            "kind": _kind(scene),
            "name": name,
            "data": data,
        }

    return run.perform("scene", settings, {}, work, say=console.say)[0]


def _check_embedded(config: SceneConfig, factor: int, console: Console) -> None:
    """Refuse a resolution below one ray, and say which options the embedded scene does not use."""
    if config.resolution < factor:
        raise ConfigError(
            f"{config.resolution} pixels are less than the student's up-sampling factor {factor}",
            where="scene.resolution",
            remedy=f"give at least {factor}",
        )
    plain = SceneConfig()
    for name in SETTINGS_OF_THE_DATA:
        if getattr(config, name) != getattr(plain, name):
            option = name.replace("_", "-")
            console.say(f"scene: --{option} is not used: it describes images of a folder")


def _kind(scene: Scene) -> SceneKind:
    if scene.source == EMBEDDED:
        return "embedded"
    return "forward" if scene.space.kind == "ndc" else "object"


def choice_of(config: SceneConfig, name: str, factor: int) -> SceneChoice:
    """What a stage's settings mean to whoever assembles the scene.

    Raises:
        ConfigError: when the background names no color.
    """
    return SceneChoice(
        name=name,
        resolution=config.resolution,
        multiple=factor,
        test_every=config.test_every,
        background=parsed_color(config.background),
        bounds=BoundsChoice(config.box, config.center, config.near, config.far),
        keep_units=config.keep_units,
    )


def _embedded_scene(config: SceneConfig, factor: int, progress: Progress) -> Scene:
    side = config.resolution // factor * factor
    return bricks_scene(
        side,
        side,
        train_views=config.train_views,
        val_views=config.val_views,
        test_views=config.test_views,
        seed=config.seed,
        progress=progress,
    )


def _scene(capture: Capture, choice: SceneChoice, console: Console, progress: Progress) -> Scene:
    """The capture's scene, at the images' own size where they are smaller than asked for."""
    try:
        return scene_from(capture, choice, progress)
    except EnlargementError as small:
        console.say(
            f"scene: the images' longest side is {small.longest} pixels, which is taken in place of "
            f"the {choice.resolution} asked for"
        )
        return scene_from(capture, replace(choice, resolution=small.longest), progress)


def _identity(capture: Capture) -> list[str]:
    """SHA-256 of every file that the scene is made of: neither names of other files nor times count.

    Raises:
        SceneError: when a file cannot be read.
    """
    files = [path for frames in capture.splits.values() for path in frames.paths]
    try:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            return list(pool.map(sha256_of, [*capture.described_by, *files]))
    except OSError as reason:
        raise SceneError(f"cannot be read ({reason.strerror})", where=reason.filename) from reason
