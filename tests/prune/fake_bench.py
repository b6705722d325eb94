"""A workbench without devices: latency is a synthetic function of the spec, with noise; tuning really
trains, for a few steps."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from toy_students import images, nothing_else

from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from lightfield.metrics import mse_to_psnr
from lightfield.student import Student, StudentSpec, mobile_r2l_spec
from prune.chains import Shape
from prune.importance import mean_squared_error
from prune.search import Workbench

PHONE = DeviceIdentity("phone", "Toy 1", "Toy OS", "toy 1.0", "CPUExecutionProvider", 1)
DENSE = mobile_r2l_spec(
    (2,), stream_width=12, blocks=4, tail_widths=(8,), points=2, frequencies=1, norm="none"
)
MULTIPLE = 4


def synthetic_ms(spec: StudentSpec) -> float:
    """Costs that add up, and a little that does not."""
    shape, total = Shape.of(spec), 0.4
    for c, (width, inner) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
        total += 0.02 * width + sum(0.2 + 0.008 * width * i for i in inner) * (1.5 if c else 1.0)
    return total + 0.02 * np.sqrt(total)


def dense_student(norm: str = "none") -> Student:
    """A student that has learned its images well enough to have something to lose."""
    return copy.deepcopy(_dense_student(norm))


@functools.cache
def _dense_student(norm: str) -> Student:
    torch.manual_seed(0)
    return tuned_on(Student(replace(DENSE, norm=norm)), 60, 0, images(DENSE))


def tuned_on(student: Student, steps: int, seed: int, batches) -> Student:
    student.train()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for _ in range(steps):
        x, truth = batches[int(torch.randint(len(batches), (), generator=random))]
        optimizer.zero_grad()
        (student(x) - truth).square().mean().backward()
        optimizer.step()
    return student.eval()


@dataclass
class FakeTarget:
    """Measures by formula, and counts what it was asked."""

    latency_ms: Callable[[StudentSpec], float] = synthetic_ms
    dense: StudentSpec = DENSE
    noise: float = 0.02
    tail: Callable[[StudentSpec], float] = lambda spec: 1.2
    """How much slower every tenth run is."""
    identity: DeviceIdentity = PHONE
    turns: int = 20
    draws: int = 0
    asked: list[str] = field(default_factory=list)
    interrupt_at: int | None = None
    """Raise KeyboardInterrupt instead of the measurement of this number."""

    def _samples(self, spec: StudentSpec) -> tuple[float, ...]:
        random = np.random.default_rng(self.draws)
        self.draws += 1
        samples = self.latency_ms(spec) * np.exp(self.noise * random.standard_normal(self.turns))
        samples[::5] *= self.tail(spec)
        return tuple(samples.tolist())

    def _count(self, kind: str) -> None:
        if self.interrupt_at is not None and len(self.asked) >= self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.asked.append(kind)

    def _record(self, spec: StudentSpec) -> LatencyRecord:
        return LatencyRecord(self._samples(spec), self.identity, "toy.onnx", "0" * 64, 1, 1)

    def measure(self, students: Sequence[Student]) -> Iterator[ComparedLatency]:
        for student in students:
            self._count("measure")
            yield ComparedLatency(self._record(student.spec), self._record(self.dense))

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        self._count("fresh table" if fresh else "table")
        return [float(np.median(self._samples(spec))) for spec in specs]


def bench(target: FakeTarget, **changes) -> Workbench:
    """A workbench around a fake target; `tunes` counts what was trained."""
    batches = images(DENSE)

    def tune(student, steps, seed, progress, folder):
        return tuned_on(student, steps, seed, batches)

    def recalibrate(student):
        return None

    def score(student):
        return mse_to_psnr(mean_squared_error(student, batches))

    def check(student):
        return None

    def batches_of(spec):
        return batches

    def fits(spec):
        return spec.factor == DENSE.factor

    whole = Workbench(
        target.measure,
        target.time_specs,
        tune,
        recalibrate,
        score,
        check,
        batches_of,
        nothing_else,
        fits,
        MULTIPLE,
    )
    return replace(whole, **changes)


def counted(function):
    """The function, and a counter of its calls."""
    calls = itertools.count()

    def call(*args):
        call.calls = next(calls) + 1
        return function(*args)

    call.calls = 0
    return call
