"""The scene stage: reads a folder of posed images, or renders the embedded scene, into the run.

The manifest records what the scene was made from: the folder, the name, and every setting. `nelf
scene` without options makes the same scene again, or keeps it when the files in the folder are
unchanged.
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
"""Where `make data` puts the example scenes; a run uses the one that has the run's name."""
HASHING_THREADS = 4
DATA_SETTINGS = ("background", "box", "center", "near", "far", "keep_units")
"""Settings that describe the images of a folder, whatever the preset."""


@dataclass(frozen=True)
class RecordedScene:
    """What the manifest records of how the run's scene was made."""

    data: str
    """Folder of the images, or `bricks` for the embedded scene."""
    name: str
    preset: PresetName
    kind: SceneKind
    config: SceneConfig
    identity: Any
    """SHA-256 of every file that was read, or `bricks`."""

    def settings_for(self, chosen: Preset) -> SceneConfig:
        """The settings with which the scene is made again: all recorded ones with the same preset,
        only `DATA_SETTINGS` with another preset."""
        if chosen.name == self.preset:
            return self.config
        kept = {name: getattr(self.config, name) for name in DATA_SETTINGS}
        return replace(chosen.scene, **kept)


def recorded_scene(run: Run) -> RecordedScene | None:
    """What the run's scene was made from; None without a scene, or with a damaged manifest."""
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
        return RecordedScene(
            data=str(details["data"]),
            name=str(details["name"]),
            preset=details["preset"],
            kind=details["kind"],
            config=SceneConfig(**values),
            identity=config["source"],
        )
    except (CheckpointError, ConfigError, KeyError, TypeError):
        return None


def data_of(run: Run, asked: str | None, recorded: RecordedScene | None) -> str:
    """The folder that the scene is made from, or `bricks`.

    In this order: the folder that was asked for, the recorded one, the example scene that has the
    run's name, the embedded scene.

    Raises:
        SceneError: when the run holds a scene whose manifest does not say what it was made from.
        CheckpointError: when that manifest cannot be read, or an older version of nelf wrote it.
    """
    if asked is not None:
        return asked
    if recorded is not None:
        return recorded.data
    if (run.path / "scene").exists():
        run.find("scene")
        raise SceneError(
            "the manifest of this scene does not say which images the scene was made from",
            where=run.path / "scene",
            remedy="add --data FOLDER, or `--data bricks` for the embedded scene",
        )
    name = run.path.resolve().name
    found = [folder / name for folder in EXAMPLES if (folder / name).is_dir()]
    return str(found[0]) if found else EMBEDDED


def is_same_data(data: str, recorded: RecordedScene) -> bool:
    """Whether `data` is the folder that the recorded scene was made from."""
    return data == recorded.data or (
        data != EMBEDDED and str(Path(data).resolve()) == recorded.data
    )


def name_of(run: Run, data: str, recorded: RecordedScene | None) -> str:
    """The scene's name when the user gives none."""
    if recorded is not None and is_same_data(data, recorded):
        return recorded.name
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
    """Read the scene's images into the run, or render them.

    Args:
        data: a folder of posed images, or `bricks` for the embedded scene.
        factor: pixels per ray along a side; both sides of the images become multiples of it.

    Raises:
        SceneError: when the folder holds no scene, or a damaged one.
        ConfigError: when a setting is impossible.
    """
    recorded = recorded_scene(run)
    capture, identity = None, EMBEDDED
    if data == EMBEDDED:
        _check_embedded(config, factor, console)
    else:
        folder = Path(data)
        data = str(folder.resolve())
        if recorded is not None and recorded.data == data and not folder.exists():
            console.say(f"scene: {data} no longer exists; the scene made from it is kept")
            identity = recorded.identity
        else:
            capture = read_capture(folder, config.resolution)
            identity = _identity(capture)
    if recorded is not None and recorded.identity != identity:
        changed = "which has changed" if recorded.data == data else f"and is now made from {data}"
        console.say(
            f"scene: the scene was made from {recorded.data}, {changed}; "
            "all later stages must be run again"
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
    """Refuse a resolution of less than one ray, and print the options that are ignored."""
    if config.resolution < factor:
        raise ConfigError(
            f"{config.resolution} pixels are less than the student's up-sampling factor {factor}",
            where="scene.resolution",
            remedy=f"give at least {factor} pixels",
        )
    plain = SceneConfig()
    for name in DATA_SETTINGS:
        if getattr(config, name) != getattr(plain, name):
            option = name.replace("_", "-")
            console.say(f"scene: --{option} is not used: it applies to images of a folder only")


def _kind(scene: Scene) -> SceneKind:
    if scene.source == EMBEDDED:
        return "embedded"
    return "forward" if scene.space.kind == "ndc" else "object"


def choice_of(config: SceneConfig, name: str, factor: int) -> SceneChoice:
    """The settings as `scene_from` takes them.

    Raises:
        ConfigError: when the background is not a color.
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
    """The capture's scene; images that are smaller than requested keep their resolution."""
    try:
        return scene_from(capture, choice, progress)
    except EnlargementError as small:
        console.say(
            f"scene: the images' longest side is {small.longest} pixels; this replaces the "
            f"requested {choice.resolution}"
        )
        return scene_from(capture, replace(choice, resolution=small.longest), progress)


def _identity(capture: Capture) -> list[str]:
    """SHA-256 of every file that the scene is made of; other files and modification times do not
    count.

    Raises:
        SceneError: when a file cannot be read.
    """
    files = [path for frames in capture.splits.values() for path in frames.paths]
    try:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            return list(pool.map(sha256_of, [*capture.described_by, *files]))
    except OSError as reason:
        raise SceneError(f"cannot be read ({reason.strerror})", where=reason.filename) from reason
