"""Figures of kernels and of whole work, and how kernels are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Figure:
    """A kernel's time, with the least bytes it has to move and the operations it has to do."""

    name: str
    ms: float
    size_bytes: float
    operations: float
    note: str = ""

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved in a second."""
        return 1e3 * self.size_bytes / self.ms

    @property
    def operations_per_s(self) -> float:
        """Operations (a multiply-add counts two) in a second."""
        return 1e3 * self.operations / self.ms


@dataclass(frozen=True)
class Cost:
    """The least bytes that some work has to move, and the operations it has to do."""

    size_bytes: float
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.size_bytes + other.size_bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Throughput:
    """One kind of whole work, and its figures, whose names tell their units."""

    name: str
    figures: dict[str, float]
    note: str = ""


def time_ms(work: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of `work` on the current GPU, by its own clock, after warming up."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
