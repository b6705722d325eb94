"""Tuning students on the pseudo images while a search goes on, by all processes of its job.

The first process searches and measures. Whenever it tunes a student, it tells the others which one and
for how long, and they train along; in between they wait for its word.
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
class Tuner:
    """Tunes students by `distilling`, whose steps and seed each call replaces; a `Tune`.

    Its windows are for students that up-sample `factor` times; others get as many pixels.
    """

    scene: Scene
    images: PosedImages
    distilling: DistillConfig
    device: torch.device
    factor: int
    ranks: Ranks = ALONE

    def __call__(
        self,
        student: Student,
        steps: int,
        seed: int,
        progress: Progress | None = None,
        folder: Path | None = None,
    ) -> Student:
        """The first process's call: the student, trained, in evaluation mode."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        where = None if folder is None else str(folder.resolve())
        request = {"spec": student.spec.to_json(), "steps": steps, "seed": seed, "folder": where}
        self.ranks.broadcast_text(json.dumps(request))
        return self._trained(student, steps, seed, progress or silent, folder)

    def help(self) -> None:
        """What the other processes do until the first one dismisses them."""
        while text := self.ranks.broadcast_text():
            request = json.loads(text)
            student = Student(StudentSpec.from_json(request["spec"])).to(self.device)
            folder = None if request["folder"] is None else Path(request["folder"])
            self._trained(student, request["steps"], request["seed"], silent, folder)

    def sampler(self, spec: StudentSpec) -> WindowSampler:
        """Sampler of this rank's training windows for students of `spec`."""
        return WindowSampler(
            self.images, spec,
            device=self.device, ranks=self.ranks, windows=self.distilling.windows,
        )  # fmt: skip

    def _trained(
        self, student: Student, steps: int, seed: int, progress: Progress, folder: Path | None
    ) -> Student:
        # The rates of training from scratch: lower ones recover more slowly. The average is over
        # about the last tenth of the steps.
        settings = replace(
            self.distilling,
            steps=max(steps, 1),
            windows=equal_windows(
                self.distilling.windows, self.factor, student.spec.factor, self.ranks.world_size
            ),
            warmup_steps=min(WARMUP_STEPS, steps // 4),
            ema_decay=min(self.distilling.ema_decay, 1 - 10 / max(steps, 20)),
            seed=seed,
        )
        sampler = self.sampler(student.spec)
        return distill(
            student, sampler, settings, progress=progress, folder=folder, ranks=self.ranks
        )


def equal_windows(count: int, factor: int, now: int, processes: int) -> int:
    """How many windows have about as many pixels as `count` of a student that up-samples `factor` times,
    of one that does so `now` times; where that is another number, a multiple of the processes, whose
    images were shared out for `count`."""
    if now == factor:
        return count
    return max(1, round(count * (factor / now) ** 2 / processes)) * processes


@contextlib.contextmanager
def leading_tuner(
    run: Run, scene: Scene, distilling: DistillConfig, console: Console, ranks: Ranks
) -> Iterator[Tuner]:
    """The first process's tuner; the others are dismissed when it ends well."""
    tuner = _tuner(run, scene, distilling, console, ranks)
    yield tuner
    ranks.broadcast_text("")


def tune_along(run: Run, distilling: DistillConfig, console: Console, ranks: Ranks) -> None:
    """What the other processes do while the first performs a stage with a `leading_tuner`."""

    def work(_: StageWriter) -> None:
        _tuner(run, scene_of(run)[1], distilling, console, ranks).help()

    work_as_worker(work, ranks)


def _tuner(
    run: Run, teachers_scene: Scene, distilling: DistillConfig, console: Console, ranks: Ranks
) -> Tuner:
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    images = training_images(
        run, teachers_scene, scene.space, pseudo, console, windows=distilling.windows, ranks=ranks
    )
    factor = StudentSpec.from_json(dense.manifest["details"]["spec"]).factor
    return Tuner(scene, images, distilling, compute_device(), factor, ranks)
