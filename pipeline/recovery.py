"""Recovery distillation: training pruned students on the pseudo images, by all ranks of a job.

Rank 0 searches and measures. For each student that it trains, it sends the specification and the
number of steps to the other ranks, which train with it. In between the other ranks wait.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightfield.progress import Progress, silent
from lightfield.run import Run, StageWriter
from lightfield.scenes.scene import Scene
from lightfield.student import Student, StudentSpec
from pipeline.artifacts import require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import work_as_worker
from pipeline.stages.pseudo import students_scene, training_images
from train.distillation import DistillConfig, distill
from train.distributed import ALONE, Ranks
from train.posed_images import PosedImages
from train.window_sampler import WindowSampler

WARMUP_STEPS = 50


@dataclass(frozen=True)
class RecoveryDistiller:
    """Trains students by `settings`; each call replaces their steps and seed.

    The number of windows is for students with the upsampling factor `factor`; students with other
    factors see equally many pixels.
    """

    images: PosedImages
    settings: DistillConfig
    device: torch.device
    factor: int
    ranks: Ranks = ALONE

    def distill(
        self,
        student: Student,
        steps: int,
        seed: int,
        progress: Progress | None = None,
        folder: Path | None = None,
    ) -> Student:
        """Train a student with all ranks, and return it in evaluation mode; called by rank 0."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        where = None if folder is None else str(folder.resolve())
        request = {"spec": student.spec.to_json(), "steps": steps, "seed": seed, "folder": where}
        self.ranks.broadcast_text(json.dumps(request))
        return self._trained(student, steps, seed, progress or silent, folder)

    def follow(self) -> None:
        """Train with rank 0 until it sends an empty text; called by the other ranks."""
        while text := self.ranks.broadcast_text():
            request = json.loads(text)
            student = Student(StudentSpec.from_json(request["spec"])).to(self.device)
            folder = None if request["folder"] is None else Path(request["folder"])
            self._trained(student, request["steps"], request["seed"], silent, folder)

    def sampler(self, spec: StudentSpec) -> WindowSampler:
        """Sampler of this rank's training windows for students of `spec`."""
        return WindowSampler(
            self.images, spec,
            device=self.device, ranks=self.ranks, windows=self.settings.windows,
        )  # fmt: skip

    def _trained(
        self, student: Student, steps: int, seed: int, progress: Progress, folder: Path | None
    ) -> Student:
        # The learning rates of training from scratch: lower ones recover more slowly. The weights
        # are averaged over about the last tenth of the steps.
        settings = replace(
            self.settings,
            steps=max(steps, 1),
            windows=equal_windows(
                self.settings.windows, self.factor, student.spec.factor, self.ranks.world_size
            ),
            warmup_steps=min(WARMUP_STEPS, steps // 4),
            ema_decay=min(self.settings.ema_decay, 1 - 10 / max(steps, 20)),
            seed=seed,
        )
        sampler = self.sampler(student.spec)
        return distill(
            student, sampler, settings, progress=progress, folder=folder, ranks=self.ranks
        )


def equal_windows(count: int, factor: int, now: int, processes: int) -> int:
    """Number of windows of a student with upsampling factor `now` that have about as many pixels as
    `count` windows of one with `factor`.

    A changed number is a multiple of the processes, whose images were divided for `count` windows.
    """
    if now == factor:
        return count
    return max(1, round(count * (factor / now) ** 2 / processes)) * processes


@contextlib.contextmanager
def leading_distiller(
    run: Run, scene: Scene, settings: DistillConfig, console: Console, ranks: Ranks
) -> Iterator[RecoveryDistiller]:
    """The distiller of rank 0; the other ranks are released when the body ends without an error."""
    distiller = _distiller(run, scene, settings, console, ranks)
    yield distiller
    ranks.broadcast_text("")


def follow_recovery(run: Run, settings: DistillConfig, console: Console, ranks: Ranks) -> None:
    """The part of the other ranks in a stage that rank 0 performs with a `leading_distiller`."""

    def work(_: StageWriter) -> None:
        _distiller(run, scene_of(run)[1], settings, console, ranks).follow()

    work_as_worker(work, ranks)


def _distiller(
    run: Run, teachers_scene: Scene, settings: DistillConfig, console: Console, ranks: Ranks
) -> RecoveryDistiller:
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    images = training_images(
        run, teachers_scene, scene.space, pseudo, console, windows=settings.windows, ranks=ranks
    )
    factor = StudentSpec.from_json(dense.manifest["details"]["spec"]).factor
    return RecoveryDistiller(images, settings, compute_device(), factor, ranks)
