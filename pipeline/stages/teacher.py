"""The teacher stage: trains a hash-grid NeRF on the scene's images, and scores the test views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightfield.errors import SceneError
from lightfield.metrics import psnr
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.scene import Scene
from lightfield.student import parameter_count
from pipeline.artifacts import (
    MALFORMED,
    RENDERS,
    incompatible_artifact,
    require_artifact,
    scene_of,
)
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.scoring import score
from train.kernels.availability import usable
from train.teacher import Teacher, TeacherConfig, render_image
from train.teacher_training import CHECKPOINT, train_teacher

BLANK_MARGIN_DB = 0.25
"""A teacher must score this much better than an image of one color."""
CONCLUSIVE_STEPS = 200
"""Steps after which a teacher that has learned nothing is an error; before that it is a warning."""


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
        check_better_than_blank(quality.psnr_db, scene, config.steps, console)
        stage.metrics |= quality.to_json() | {"parameters": parameter_count(teacher)}
        stage.discard.add(CHECKPOINT)

    return run.perform(
        "teacher", asdict(config), {"scene": source}, work, say=console.say, carried=_carried
    )[0]


def _carried(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A checkpoint also serves a training that differs only in having more steps."""
    return [CHECKPOINT] if differs_only_in_more_steps(before, now) else []


def differs_only_in_more_steps(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a training's settings are the same as before, but for as many or more `steps`."""
    return before.keys() == now.keys() and (
        {**before, "steps": now["steps"]} == now and before["steps"] <= now["steps"]
    )


def check_better_than_blank(psnr_db: float, scene: Scene, steps: int, console: Console) -> None:
    """Refuse a teacher that is no better than an image of one color; after a short training, warn.

    Raises:
        SceneError: when the teacher is no better after at least `CONCLUSIVE_STEPS` steps.
    """
    blank_db = blank_score(scene)
    if psnr_db > blank_db + BLANK_MARGIN_DB:
        return
    what = f"the teacher scores {psnr_db:.2f} dB, and an image of one color {blank_db:.2f} dB"
    remedy = "check the poses, and --background, --box and --center of `nelf scene`"
    if steps >= CONCLUSIVE_STEPS:
        raise SceneError(
            f"{what}, so the teacher has learned nothing", where=scene.name, remedy=remedy
        )
    console.say(f"teacher: {what}; train for more steps, or {remedy}")


def blank_score(scene: Scene) -> float:
    """Mean PSNR in dB over the test views of the better image of one color: the background's or the
    training images' mean color. Test views that have only that color are left out."""
    mean = scene.train.images.mean((0, 1, 2), dtype=np.float64) / 255
    truth = [torch.from_numpy(scene.test.image(index)) for index in range(len(scene.test))]
    colors = torch.tensor([scene.background, mean.tolist()], dtype=torch.float32)
    scores = np.array([[float(psnr(c.expand_as(i), i)) for i in truth] for c in colors])
    finite = np.isfinite(scores).all(0)
    return float(scores[:, finite].mean(1).max()) if finite.any() else -np.inf


def load_teacher(run: Run, scene: Scene, device: torch.device) -> tuple[Artifact, Teacher]:
    """The run's trained teacher on a device, in evaluation mode."""
    artifact = require_artifact(run, "teacher")
    try:
        teacher = Teacher(TeacherConfig(**artifact.manifest["config"]), scene.box, device=device)
    except MALFORMED as reason:
        raise incompatible_artifact(artifact, reason) from reason
    load_into(teacher, artifact.weights(), where=artifact.path)
    return artifact, teacher.to(device).eval()


def teacher_renderer(
    teacher: Teacher, scene: Scene, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from a pose [3, 4] to the teacher's image [H, W, 3] for the scene's camera."""
    view = (scene.intrinsics, scene.space, scene.background)
    fused = fused_renderer(teacher)

    def render(pose: Tensor) -> Tensor:
        if fused is not None:
            return fused.render_colors(pose.to(device), *view)
        return render_image(teacher, pose.to(device), *view)

    return render


def fused_renderer(teacher: Teacher) -> Any:
    """The Triton `FusedRenderer` of a teacher, or None where its kernels cannot run.

    The return type is Any because the class cannot be imported where there is no Triton.
    """
    if not usable(teacher.device):
        return None
    from train.fused_renderer import renderer_for

    return renderer_for(teacher)
