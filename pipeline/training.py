"""The stages from images to a student: load artifacts, call a package, save an artifact.

Each function takes a run and its config, does nothing when the artifact is current, and returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightfield.errors import CheckpointError, NelfError, SceneError
from lightfield.metrics import Quality, mean_quality, psnr
from lightfield.progress import Progress
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.scene import Scene, Views, load_scene
from lightfield.student import parameter_count
from pipeline.console import Console
from train.kernels.availability import usable
from train.teacher import Teacher, TeacherConfig, render_image
from train.teacher_training import CHECKPOINT, train_teacher

SHOWN_VIEWS = 8
BLANK_MARGIN_DB = 0.25
FEWEST_TELLING_STEPS = 200
"""Steps after which a teacher that shows nothing will hardly show more."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, NelfError)
"""What building something from an edited manifest can raise."""
SCENE_WORDS = ("preset", "source", "name", "data")
"""Details of a scene that are words."""
RENDERS = "renders.npy"


def compute_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What training runs on, for people."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.get_num_threads()} CPU cores"


def ingredient(run: Run, stage: str) -> Artifact:
    """A finished stage to build on, whole and made from what the run holds now.

    Raises:
        CheckpointError: when it has not been run, is damaged, or is older than what it was made from.
    """
    artifact = run.artifact(stage)
    artifact.check()
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
    """The run's scene.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    artifact = ingredient(run, "scene")
    for name in SCENE_WORDS:
        if not isinstance(artifact.manifest["details"].get(name, ""), str):
            raise foreign(artifact, TypeError(f"its {name} is no word"))
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
        check_more_than_blank(quality.psnr_db, scene, config.steps, console)
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


def check_more_than_blank(psnr_db: float, scene: Scene, steps: int, console: Console) -> None:
    """Refuse a teacher that shows no more than an image of one color; say so after a short training.

    Raises:
        SceneError: when that is what it is worth.
    """
    blank_db = blank_score(scene)
    if psnr_db > blank_db + BLANK_MARGIN_DB:
        return
    what = f"the teacher scores {psnr_db:.2f} dB, and an image of one color {blank_db:.2f} dB"
    remedy = "check the poses, and --background, --box and --center of `nelf scene`"
    if steps >= FEWEST_TELLING_STEPS:
        raise SceneError(f"{what}: it has learned nothing", where=scene.name, remedy=remedy)
    console.say(f"teacher: {what}; train for longer, or {remedy}")


def blank_score(scene: Scene) -> float:
    """Mean PSNR in dB over the test views of the better image of one color: the background, or the
    training images' mean. Test views that are of such a color themselves do not count."""
    mean = scene.train.images.mean((0, 1, 2), dtype=np.float64) / 255
    truth = [torch.from_numpy(scene.test.image(index)) for index in range(len(scene.test))]
    colors = torch.tensor([scene.background, mean.tolist()], dtype=torch.float32)
    scores = np.array([[float(psnr(c.expand_as(i), i)) for i in truth] for c in colors])
    told = np.isfinite(scores).all(0)
    return float(scores[:, told].mean(1).max()) if told.any() else -np.inf


def load_teacher(run: Run, scene: Scene, device: torch.device) -> tuple[Artifact, Teacher]:
    """The run's trained teacher on a device, in evaluation mode."""
    artifact = ingredient(run, "teacher")
    try:
        teacher = Teacher(TeacherConfig(**artifact.manifest["config"]), scene.box, device=device)
    except MALFORMED as reason:
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
    """A function from a pose [3, 4] to the teacher's image [H, W, 3] of the scene's camera."""
    view = (scene.intrinsics, scene.space, scene.background)
    fused = fused_renderer(teacher)

    def render(pose: Tensor) -> Tensor:
        if fused is not None:
            return fused.render_colors(pose.to(device), *view)
        return render_image(teacher, pose.to(device), *view)

    return render


def fused_renderer(teacher: Teacher) -> Any:
    """The kernels' renderer of a teacher, or None where they cannot serve it."""
    if not usable(teacher.device):
        return None
    from train.fused_renderer import renderer_for  # imports Triton

    return renderer_for(teacher)


def score(
    render: Callable[[Tensor], Tensor], views: Views, renders: Path, progress: Progress
) -> Quality:
    """Quality over all views; the images of up to eight of them, evenly spread, are kept."""
    shown = set(np.linspace(0, len(views) - 1, min(SHOWN_VIEWS, len(views))).round().astype(int))
    pairs, kept = [], []
    for i in range(len(views)):
        image = render(torch.from_numpy(views.poses[i])).float().clamp(0, 1).cpu()
        pairs.append((image, torch.from_numpy(views.image(i))))
        if i in shown:
            kept.append((image * 255).round().to(torch.uint8).numpy())
        progress(i + 1, len(views))
    np.save(renders, np.stack(kept))
    return mean_quality(pairs)
