"""Interface between the search and the code that trains, exports and measures students."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lightfield.latency import ComparedLatency
from lightfield.progress import Progress
from lightfield.student import Student, StudentSpec
from prune.importance import Batch


@runtime_checkable
class Measurer(Protocol):
    """Measures latencies on a target, or reads them from a record."""

    def measure(self, students: Sequence[Student]) -> Iterable[ComparedLatency]:
        """Interleaved runs of each student and of the dense reference student, in order, as they
        are measured."""
        ...

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies in ms of students with the given specifications and random weights.

        All are timed at the ray resolution of the student with the largest upsampling factor, so
        their outputs may be cropped. `fresh` measures all of them now; otherwise stored latencies
        may be used.
        """
        ...


@runtime_checkable
class Workbench(Measurer, Protocol):
    """Everything that a search needs from outside of this package."""

    @property
    def width_multiple(self) -> int:
        """Widths are rounded to multiples of this number."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether students can be trained while others are measured without disturbing the
        latencies."""
        ...

    def distill(
        self,
        student: Student,
        steps: int,
        seed: int,
        progress: Progress | None,
        folder: Path | None,
    ) -> Student:
        """Train a student on the teacher's pseudo images and return it in evaluation mode.

        An interrupted training continues from the checkpoint in `folder`.
        """
        ...

    def recalibrate(self, student: Student) -> None:
        """Recompute batch-norm statistics in place."""
        ...

    def score(self, student: Student) -> float:
        """Held-out PSNR in dB."""
        ...

    def check(self, student: Student) -> None:
        """Export a student and compare the exported graph with it.

        Raises:
            ParityError: when the graph computes something else than the student.
        """
        ...

    def batches(self, spec: StudentSpec) -> Sequence[Batch]:
        """Calibration images with the rays of a student; the same images for all specifications."""
        ...

    def rays(self, spec: StudentSpec) -> Float[Tensor, "rays channels"]:
        """Encoded rays of more poses than `batches` has."""
        ...

    def fits(self, spec: StudentSpec) -> bool:
        """Whether the image size is a multiple of a student's rays, with enough rays per side."""
        ...
