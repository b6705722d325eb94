"""A workbench without devices: latency is a synthetic function of the specification, with noise.

Recovery distillation really trains, for a few steps.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from toy_students import images, nothing_else

from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from lightfield.metrics import mse_to_psnr
from lightfield.student import Student, StudentSpec, mobile_r2l_spec
from prune.architecture import Shape
from prune.config import PruneConfig
from prune.importance import mean_squared_error

PHONE = DeviceIdentity("phone", "Toy 1", "Toy OS", "toy 1.0", "CPUExecutionProvider", 1)
DENSE = mobile_r2l_spec(
    (2,), stream_width=12, blocks=4, tail_widths=(8,), points=2, frequencies=1, norm="none"
)
MULTIPLE = 4


def synthetic_ms(spec: StudentSpec) -> float:
    """The sum of the parts, and a small term that is not a sum."""
    shape, total = Shape.of(spec), 0.4
    for c, (width, inner) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
        total += 0.02 * width + sum(0.2 + 0.008 * width * i for i in inner) * (1.5 if c else 1.0)
    return total + 0.02 * np.sqrt(total)


def dense_student(norm: str = "none") -> Student:
    """A student that has learned its images well enough that pruning loses PSNR."""
    return copy.deepcopy(_dense_student(norm))


@functools.cache
def _dense_student(norm: str) -> Student:
    torch.manual_seed(0)
    return trained_on(Student(replace(DENSE, norm=norm)), 60, 0, images(DENSE))


def trained_on(student: Student, steps: int, seed: int, batches) -> Student:
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
    """Measures by a formula, and records what it was asked."""

    latency_ms: Callable[[StudentSpec], float] = synthetic_ms
    dense: StudentSpec = DENSE
    noise: float = 0.02
    tail: Callable[[StudentSpec], float] = lambda spec: 1.2
    """Factor by which every fifth run is slower."""
    identity: DeviceIdentity = PHONE
    runs: int = 20
    draws: int = 0
    asked: list[str] = field(default_factory=list)
    interrupt_at: int | None = None
    """Number of the measurement that raises KeyboardInterrupt instead."""

    def _samples(self, spec: StudentSpec) -> tuple[float, ...]:
        random = np.random.default_rng(self.draws)
        self.draws += 1
        samples = self.latency_ms(spec) * np.exp(self.noise * random.standard_normal(self.runs))
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


class FakeBench:
    """A workbench with a fake target; `bench` replaces single methods."""

    width_multiple = MULTIPLE
    concurrent = False

    def __init__(self, target: FakeTarget):
        self.measure, self.time_specs = target.measure, target.time_specs
        self.images = images(DENSE)

    def distill(self, student, steps, seed, progress, folder):
        return trained_on(student, steps, seed, self.images)

    def recalibrate(self, student):
        pass

    def score(self, student):
        return mse_to_psnr(mean_squared_error(student, self.batches(student.spec)))

    def check(self, student):
        pass

    def batches(self, spec):
        return self.images

    def rays(self, spec):
        return nothing_else(spec)

    def fits(self, spec):
        return spec.factor == DENSE.factor


def bench(target: FakeTarget, **changes) -> FakeBench:
    """A workbench with a fake target, with other methods or attributes where given."""
    result = FakeBench(target)
    vars(result).update(changes)
    return result


def config(settings: PruneConfig = PruneConfig(), **changes) -> PruneConfig:  # noqa: B008
    """Settings with changed fields of any of their groups."""
    groups = {}
    for group in fields(settings):
        known = {field.name for field in fields(getattr(settings, group.name))}
        changed = {name: changes.pop(name) for name in known & changes.keys()}
        groups[group.name] = replace(getattr(settings, group.name), **changed)
    assert not changes
    return PruneConfig(**groups)


def counted(function):
    """The function, and a counter of its calls."""
    calls = itertools.count()

    def call(*args):
        call.calls = next(calls) + 1
        return function(*args)

    call.calls = 0
    return call
