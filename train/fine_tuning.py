"""Fine-tuning: a distilled student goes on with the real pictures, as long as that helps.

It trains in rounds of `train.distil`, at a share of its rates, and after each looks at pictures that
were held out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from lightfield.progress import Progress
from lightfield.ranges import STEPS, Range, check_ranges, later_seed
from lightfield.student import Student
from train.distil import DistilConfig, distil
from train.picture_pool import PicturePool


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tuning on the real pictures, kept only while it helps on held-out ones."""

    steps: Annotated[int, Range(0, 100_000_000)] = 600
    """Most optimiser steps."""
    evaluate_every: Annotated[int, STEPS] = 100
    """Steps between two looks at the held-out pictures."""
    patience: Annotated[int, Range(1, 1_000_000)] = 2
    """Looks without an improvement after which it stops."""
    rate_share: Annotated[float, Range(1e-6, 1)] = 0.1
    """Constant share of distillation's peak learning rates."""

    def __post_init__(self) -> None:
        check_ranges(self, "fine_tune")


@dataclass(frozen=True)
class FineTuned:
    """The better of before and after, with both held-out scores."""

    student: Student
    steps: int
    before_db: float
    after_db: float


def fine_tune(
    student: Student,
    pool: PicturePool,
    held_out: Callable[[Student], float],
    config: FineTuneConfig,
    distil_config: DistilConfig,
    *,
    progress: Progress,
) -> FineTuned:
    """Train on the pool's real pictures in rounds, and return the best student by `held_out` (dB).

    The student that came in, which stays as it is, is one of the candidates, so the score never gets
    worse.
    """
    before = best_db = held_out(student)
    best, best_steps, worse, done = student, 0, 0, 0
    current = copy.deepcopy(student)
    while done < config.steps and worse < config.patience:
        steps = min(config.evaluate_every, config.steps - done)
        settings = replace(
            distil_config,
            steps=steps,
            learning_rate=config.rate_share * distil_config.learning_rate,
            muon_learning_rate=config.rate_share * distil_config.muon_learning_rate,
            final_share=1.0,
            warmup_steps=10,
            ema_decay=0.98,
            seed=later_seed(distil_config.seed, 1 + done),
        )
        averaged = distil(current, pool, settings, progress=_shifted(progress, done, config.steps))
        done += steps
        score = held_out(averaged)
        if score > best_db:
            best, best_db, best_steps, worse = averaged, score, done, 0
        else:
            worse += 1
    return FineTuned(best.eval(), best_steps, before, best_db)


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    def report(done: int, _: int, /, **figures: float) -> None:
        progress(start + done, total, **figures)

    return report


def held_out_split(count: int, every: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of `count` views as (kept, held out), every `every`-th being held out.

    At least one is held out, unless there is only one view.
    """
    held = set(range(min(every // 2, count - 1), count, every)) if count > 1 else set()
    return [i for i in range(count) if i not in held], sorted(held)
