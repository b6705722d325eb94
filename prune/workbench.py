"""What the search works with: training, exporting and measuring, injected by `pipeline`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightfield.progress import Progress
from lightfield.student import Student, StudentSpec
from prune.importance import Batches
from prune.measurements import Measure, TimeSpecs
from prune.sampling import Rays


@runtime_checkable
class Tune(Protocol):
    """Trains a student further and returns it in evaluation mode; with a folder, an interrupted training
    goes on from what it left there."""

    def __call__(  # noqa: D102
        self,
        student: Student,
        steps: int,
        seed: int,
        progress: Progress | None,
        folder: Path | None,
    ) -> Student: ...


@dataclass(frozen=True)
class Workbench:
    """What the search works with; `pipeline` builds it from train, export and device."""

    measure: Measure
    """Export each student, and measure it in turns with the pinned dense one."""
    time_specs: TimeSpecs
    tune: Tune
    recalibrate: Callable[[Student], None]
    """Renew batch-norm statistics in place."""
    score: Callable[[Student], float]
    """Held-out PSNR in dB."""
    check: Callable[[Student], None]
    """Export, and refuse with ParityError a graph that computes something else than the student."""
    batches: Batches
    """Whole images for measuring importance."""
    rays: Rays
    """Rays of more poses than these images have."""
    fits: Callable[[StudentSpec], bool]
    """Whether the images have whole rays for a student, enough of them to be one."""
    width_multiple: int
    """Widths are rounded to multiples of this."""
    beside: bool = False
    """Whether training leaves the target's times alone, so that both can go on at once."""
