"""The stages from pictures to a student: load artifacts, call a package, save an artifact.

Each function takes a run and its config, does nothing when the artifact is current, and returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightfield.errors import CheckpointError, NelfError, SceneError
from lightfield.metrics import Quality, mean_quality
from lightfield.progress import Progress
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.bricks import bricks_scene, one_ray_reference_db
from lightfield.scenes.formats import load_scene_folder
from lightfield.scenes.pictures import EnlargementError
from lightfield.scenes.scene import Scene, Views, load_scene, save_scene
from lightfield.student import parameter_count
from pipeline.console import Console
from pipeline.presets import SceneConfig
from train.gpu.availability import usable
from train.teacher import Teacher, TeacherConfig, render_picture
from train.teacher_training import CHECKPOINT, train_teacher

SHOWN_VIEWS = 8
RENDERS = "renders.npy"
HELD_OUT_EVERY = 8
EMBEDDED = "bricks"


def compute_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What training runs on, for people."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.get_num_threads()} CPU cores"


def make_scene(
    run: Run,
    source: str,
    name: str,
    config: SceneConfig,
    factor: int,
    preset: str,
    console: Console,
) -> Artifact:
    """Load (or render) the scene's pictures into the run; `source` is a folder or `bricks`.

    Raises:
        SceneError: when the folder holds no scene, or a damaged one.
    """
    settings = {**asdict(config), "factor": factor, "name": name, "preset": preset}
    settings["source"] = source if source == EMBEDDED else _source_identity(Path(source))

    def work(stage: StageWriter) -> None:
        with console.progress("scene") as progress:
            if source == EMBEDDED:
                scene = replace(_embedded_scene(config, factor, progress), name=name)
                stage.metrics["one_ray_reference_db"] = one_ray_reference_db(scene)
            else:
                scene = _pictured_scene(Path(source), name, config, factor, console, progress)
        save_scene(scene, stage.path)
        stage.metrics |= {
            "width": scene.intrinsics.width,
            "height": scene.intrinsics.height,
            "train_views": len(scene.train),
            "val_views": len(scene.val),
            "test_views": len(scene.test),
        }
        stage.details |= {"preset": preset, "source": scene.source, "name": name}

    return run.perform("scene", settings, {}, work, say=console.say)[0]


def _embedded_scene(config: SceneConfig, factor: int, progress: Progress) -> Scene:
    side = max(1, config.resolution // factor) * factor
    return bricks_scene(
        side,
        side,
        train_views=config.train_views,
        val_views=config.val_views,
        test_views=config.test_views,
        seed=config.seed,
        progress=progress,
    )


def _pictured_scene(
    folder: Path, name: str, config: SceneConfig, factor: int, console: Console, progress: Progress
) -> Scene:
    """The folder's scene, at the pictures' own size where they are smaller than asked for."""

    def load(resolution: int) -> Scene:
        return load_scene_folder(
            folder,
            name=name,
            resolution=resolution,
            multiple=factor,
            test_every=config.test_every,
            progress=progress,
        )

    try:
        return load(config.resolution)
    except EnlargementError as small:
        console.say(
            f"scene: the pictures' longest side is {small.longest} pixels, which is taken in place of "
            f"the {config.resolution} asked for"
        )
        return load(small.longest)


def _source_identity(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a scene's files: enough to notice that it changed."""
    if not folder.is_dir():
        raise SceneError(
            "no such folder",
            where=folder,
            remedy="give DATA=path/to/a/scene, or none for the embedded scene",
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def ingredient(run: Run, stage: str) -> Artifact:
    """A finished stage to build on, whole and made from what the run holds now.

    Raises:
        CheckpointError: when it has not been run, is damaged, or is older than what it was made from.
    """
    artifact = run.artifact(stage)
    for name in artifact.manifest["files"]:
        artifact.file(name)
    for name, key in artifact.manifest["inputs"].items():
        source = run.find(name)
        if source is None or source.key != key:
            raise CheckpointError(
                f"this {stage} was made from another {name} than the run's",
                where=artifact.path,
                remedy=f"run `nelf {stage} --run {run.path}` again",
            )
    return artifact


def scene_of(run: Run) -> tuple[Artifact, Scene]:
    """The run's scene."""
    artifact = ingredient(run, "scene")
    return artifact, load_scene(artifact.path)


def make_teacher(run: Run, config: TeacherConfig, console: Console) -> Artifact:
    """Train the teacher and score it on the test views."""
    source, scene = scene_of(run)
    device = compute_device()

    def work(stage: StageWriter) -> None:
        with console.progress("teacher") as progress:
            teacher = train_teacher(
                scene, config, device=device, folder=stage.path, progress=progress, log=stage.log
            )
        save_weights(stage.path / WEIGHTS, teacher.state_dict())
        render = teacher_renderer(teacher, scene, device)
        with console.progress("teacher, test views") as progress:
            quality = score(render, scene.test, stage.path / RENDERS, progress)
        stage.metrics |= quality.to_json() | {"parameters": parameter_count(teacher)}
        stage.discard.add(CHECKPOINT)

    return run.perform(
        "teacher", asdict(config), {"scene": source}, work, say=console.say, carried=_carried
    )[0]


def _carried(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A checkpoint serves a training of more steps."""
    return [CHECKPOINT] if of_more_steps(before, now) else []


def of_more_steps(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a training's settings are others by nothing but more `steps`, if at all."""
    return before.keys() == now.keys() and (
        {**before, "steps": now["steps"]} == now and before["steps"] <= now["steps"]
    )


def load_teacher(run: Run, scene: Scene, device: torch.device) -> tuple[Artifact, Teacher]:
    """The run's trained teacher on a device, in evaluation mode."""
    artifact = ingredient(run, "teacher")
    try:
        teacher = Teacher(TeacherConfig(**artifact.manifest["config"]), scene.box, device=device)
    except (TypeError, NelfError) as reason:
        raise foreign(artifact, reason) from reason
    load_into(teacher, artifact.weights(), where=artifact.path)
    return artifact, teacher.to(device).eval()


def foreign(artifact: Artifact, reason: Exception) -> CheckpointError:
    """The error for an artifact that this version cannot build from."""
    return CheckpointError(
        f"its manifest describes nothing that this version can build ({reason})",
        where=artifact.path,
        remedy=f"delete {artifact.path} and run the stage again",
    )


def teacher_renderer(
    teacher: Teacher, scene: Scene, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from a pose [3, 4] to the teacher's picture [H, W, 3] of the scene's camera."""
    view = (scene.intrinsics, scene.space, scene.background)
    fused = fused_renderer(teacher)

    def render(pose: Tensor) -> Tensor:
        if fused is not None:
            return fused.render_colours(pose.to(device), *view)
        return render_picture(teacher, pose.to(device), *view)

    return render


def fused_renderer(teacher: Teacher) -> Any:
    """The kernels' renderer of a teacher, or None where they cannot serve it."""
    if not usable(teacher.device):
        return None
    from train.gpu.rendering.renderer import renderer_for  # imports Triton

    return renderer_for(teacher)


def score(
    render: Callable[[Tensor], Tensor], views: Views, renders: Path, progress: Progress
) -> Quality:
    """Quality over all views; the pictures of up to eight of them, evenly spread, are kept."""
    shown = set(np.linspace(0, len(views) - 1, min(SHOWN_VIEWS, len(views))).round().astype(int))
    pairs, kept = [], []
    for i in range(len(views)):
        picture = render(torch.from_numpy(views.poses[i])).float().clamp(0, 1).cpu()
        pairs.append((picture, torch.from_numpy(views.image(i))))
        if i in shown:
            kept.append((picture * 255).round().to(torch.uint8).numpy())
        progress(i + 1, len(views))
    np.save(renders, np.stack(kept))
    return mean_quality(pairs)
