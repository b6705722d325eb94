"""Fine-tuning of a distilled student on photographs, with early stopping on held-out photographs.

The student trains in rounds of `train.distillation` with smaller learning rates. After each round it is
scored on the held-out photographs.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lightfield.progress import Progress
from lightfield.ranges import STEPS, Range, check_ranges, later_seed
from lightfield.student import Student
from train.checkpoint import load_checkpoint, save_checkpoint
from train.distillation import DistillConfig, distill
from train.window_sampler import WindowSampler

STATE = "fine-tuning.safetensors"
"""File with the state of a fine-tuning after its last finished round."""
ROUND = "fine-tuning-"
"""Prefix of the folders of unfinished rounds."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of the fine-tuning on photographs. It is kept only if the held-out PSNR rises."""

    steps: Annotated[int, Range(0, 100_000_000)] = 600
    """Largest number of optimizer steps. 0 skips the fine-tuning."""
    evaluate_every: Annotated[int, STEPS] = 100
    """Number of steps between two evaluations on the held-out photographs."""
    patience: Annotated[int, Range(1, 1_000_000)] = 2
    """Number of evaluations without a better PSNR after which the fine-tuning stops."""
    rate_share: Annotated[float, Range(1e-6, 1)] = 0.1
    """Factor of the distillation's peak learning rates. It is constant over the fine-tuning."""

    def __post_init__(self) -> None:
        check_ranges(self, "fine_tune")


@dataclass(frozen=True)
class FineTuned:
    """The best student of a fine-tuning, its number of steps, and the held-out PSNR before and after.

    `steps` is 0 when the student is unchanged.
    """

    student: Student
    steps: int
    before_db: float
    after_db: float


class _Rounds:
    """State of a fine-tuning between rounds, which is stored in a folder if there is one."""

    def __init__(self, student: Student, held_out: Callable[[Student], float], folder: Path | None):
        self.current, self.best = copy.deepcopy(student), copy.deepcopy(student)
        self.folder = folder
        found = None if folder is None else load_checkpoint(folder / STATE, **self._state)
        if found is None:
            score = held_out(student)
            self.done, self.figures = 0, {"before_db": score, "best_db": score}
            self.best_steps = self.worse = 0
            self._save()
        else:
            self.done, extra = found
            self.figures = {name: float(extra[name]) for name in ("before_db", "best_db")}
            self.best_steps, self.worse = int(extra["best_steps"]), int(extra["worse"])

    @property
    def round_folder(self) -> Path | None:
        """Folder of the current round's checkpoint."""
        return None if self.folder is None else self.folder / f"{ROUND}{self.done}"

    def add(self, averaged: Student, steps: int, score: float) -> None:
        """Record the result and the held-out PSNR of a round of `steps` steps."""
        self.done += steps
        if score > self.figures["best_db"]:
            self.best, self.best_steps, self.worse = averaged, self.done, 0
            self.figures["best_db"] = score
        else:
            self.worse += 1
        self._save()

    @property
    def _state(self) -> dict[str, Any]:
        modules = {"current": self.current, "best": self.best}
        return {"modules": modules, "optimizers": {}, "generators": {}}

    def _save(self) -> None:
        if self.folder is None:
            return
        extra = {**self.figures, "best_steps": self.best_steps, "worse": self.worse}
        save_checkpoint(self.folder / STATE, step=self.done, extra=extra, **self._state)
        for ended in self.folder.glob(f"{ROUND}*"):
            shutil.rmtree(ended)


def fine_tune(
    student: Student,
    sampler: WindowSampler,
    held_out: Callable[[Student], float],
    config: FineTuneConfig,
    distill_config: DistillConfig,
    *,
    progress: Progress,
    folder: Path | None = None,
) -> FineTuned:
    """Train on the sampler's photographs in rounds; return the best student by `held_out` (PSNR in dB).

    The given student is one of the candidates and stays unchanged, so the PSNR never gets worse. With a
    folder, an interrupted fine-tuning resumes from the folder's file `STATE`, and its result equals that
    of an uninterrupted one.

    Raises:
        CheckpointError: when the folder's checkpoint is damaged or belongs to another architecture.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    rounds = _Rounds(student, held_out, folder)
    while rounds.done < config.steps and rounds.worse < config.patience:
        done = rounds.done
        steps = min(config.evaluate_every, config.steps - done)
        settings = replace(
            distill_config,
            steps=steps,
            learning_rate=config.rate_share * distill_config.learning_rate,
            muon_learning_rate=config.rate_share * distill_config.muon_learning_rate,
            final_share=1.0,
            warmup_steps=10,
            ema_decay=0.98,
            seed=later_seed(distill_config.seed, 1 + done),
        )
        averaged = distill(
            rounds.current, sampler, settings,
            progress=_shifted(progress, done, config.steps), folder=rounds.round_folder,
        )  # fmt: skip
        rounds.add(averaged, steps, held_out(averaged))
    before_db, after_db = rounds.figures["before_db"], rounds.figures["best_db"]
    return FineTuned(rounds.best.eval(), rounds.best_steps, before_db, after_db)


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    def report(done: int, _: int, /, **figures: float) -> None:
        progress(start + done, total, **figures)

    return report


def held_out_split(count: int, every: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of the training views and of the held-out views, which are every `every`-th of `count`.

    At least one view is held out, unless there is only one view.
    """
    held = set(range(min(every // 2, count - 1), count, every)) if count > 1 else set()
    return [i for i in range(count) if i not in held], sorted(held)
