"""Targets: things that run a graph and say how long it took.

Two times are kept of each run. `samples_ms` is wall-clock time, what a user waits. `conditions`
hold `cpu_ms`, the processor time of the runner during the same run; where other programs use the
same processor it is the steadier witness of which graph is cheaper, and `on_cpu_time` turns a record
into one of it.
"""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from device.onnx_inputs import checked_inputs, fixed_inputs
from device.runner_protocol import (
    Job,
    ModelTimes,
    RunnerReport,
    Schedule,
    read_outputs,
    write_inputs,
)
from lightfield.errors import ConfigError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord


@runtime_checkable
class Target(Protocol):
    """What measures a graph. Close it, or use it as a context manager."""

    @property
    def identity(self) -> DeviceIdentity:
        """What is measured on."""
        ...

    @property
    def width_multiple(self) -> int:
        """Channel counts that the device computes without waste are multiples of this."""
        ...

    def measure(self, model: Path, *, runs: int, warmup: int = 5) -> LatencyRecord:
        """One graph alone, with its load time and peak memory."""
        ...

    def compare(
        self, candidate: Path, reference: Path, *, turns: int, warmup: int = 3
    ) -> ComparedLatency:
        """Two graphs in turns, A B A B; as many samples of each as turns."""
        ...

    def measure_many(
        self, models: Sequence[Path], *, turns: int, warmup: int = 3
    ) -> list[LatencyRecord]:
        """All graphs round-robin, for latency tables."""
        ...

    def run(self, model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph's outputs as the device computes them."""
        ...

    def close(self) -> None:
        """Leave the device as it was found."""
        ...

    def __enter__(self) -> Target: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class RunnerTarget(ABC):
    """A target whose work is done by a runner (see `device.runner_protocol`).

    Args:
        threads: threads that one operator may use.
        timeout_seconds: a runner that takes longer is ended and the measurement refused.
    """

    width_multiple: int = 16

    def __init__(self, *, threads: int, timeout_seconds: int):
        if threads < 1:
            raise ConfigError(f"{threads} threads", where="threads", remedy="use at least 1")
        if timeout_seconds < 1:
            raise ConfigError("the time limit must be at least 1 s", where="timeout_seconds")
        self.threads, self.timeout_seconds = threads, timeout_seconds

    @property
    @abstractmethod
    def identity(self) -> DeviceIdentity:
        """What is measured on."""

    @abstractmethod
    def _execute(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        """Let the runner do the jobs; its report, and what the device said meanwhile."""

    def close(self) -> None:  # noqa: B027 -- nothing to do unless a target says otherwise
        """Leave the device as it was found."""

    def __enter__(self) -> RunnerTarget:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(DeviceError):  # the first error is the one to hear about
            self.close()

    def measure(self, model: Path, *, runs: int, warmup: int = 5) -> LatencyRecord:
        """One graph alone; its peak memory comes from a pass of its own.

        Raises:
            DeviceError: when the graph cannot be loaded or run.
        """
        memory = self._reports([model], turns=1, warmup=1)[0]
        report, conditions = self._reports([model], turns=runs, warmup=warmup)
        record = self._record(model, report.models[0], warmup, conditions)
        return replace(record, peak_memory_bytes=memory.growth_bytes)

    def compare(
        self, candidate: Path, reference: Path, *, turns: int, warmup: int = 3
    ) -> ComparedLatency:
        """Two graphs in turns, so that drift cancels in their ratio.

        The first half of the turns is A B A B in one process, the second B A B A in another: which
        graph is loaded first moves a ratio by about 1%.
        """
        pair = self.measure_many([candidate, reference], turns=-(-turns // 2), warmup=warmup)
        if turns > 1:
            swapped = self.measure_many([reference, candidate], turns=turns // 2, warmup=warmup)
            pair = [_joined(*halves) for halves in zip(pair, reversed(swapped), strict=True)]
        return ComparedLatency(*pair)

    def measure_many(
        self, models: Sequence[Path], *, turns: int, warmup: int = 3
    ) -> list[LatencyRecord]:
        """All graphs round-robin in one process; records in the order of `models`."""
        if not models:
            return []
        report, conditions = self._reports(models, turns=turns, warmup=warmup)
        return [
            self._record(model, times, warmup, {**conditions, "interleaved_graphs": len(models)})
            for model, times in zip(models, report.models, strict=True)
        ]

    def run(self, model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph's outputs for these inputs, as the device computes them.

        Raises:
            DeviceError: when an input is not the graph's, or the graph cannot be run.
        """
        arrays = checked_inputs(model, inputs)
        with tempfile.TemporaryDirectory(prefix="nelf-run-") as name:
            folder = Path(name)
            write_inputs(folder / "inputs", arrays)
            job = Job(model, folder / "inputs", folder / "outputs")
            report, _ = self._execute([job], self._schedule(warmup=0, turns=1))
            return read_outputs(folder / "outputs", report.models[0].outputs)

    def _reports(
        self, models: Sequence[Path], *, turns: int, warmup: int
    ) -> tuple[RunnerReport, dict[str, Any]]:
        if turns < 1 or warmup < 0:
            raise ConfigError(
                f"{turns} runs after {warmup} warm-ups", remedy="measure at least once"
            )
        with tempfile.TemporaryDirectory(prefix="nelf-measure-") as name:
            jobs = []
            for index, model in enumerate(models):
                inputs = Path(name) / str(index)
                write_inputs(inputs, list(fixed_inputs(model).values()))
                jobs.append(Job(model, inputs))
            return self._execute(jobs, self._schedule(warmup=warmup, turns=turns))

    def _schedule(self, *, warmup: int, turns: int) -> Schedule:
        return Schedule(self.threads, warmup, turns, self.timeout_seconds)

    def _record(
        self, model: Path, times: ModelTimes, warmup: int, conditions: dict[str, Any]
    ) -> LatencyRecord:
        return LatencyRecord(
            samples_ms=times.wall_ms,
            device=self.identity,
            model=model.name,
            model_sha256=sha256_of(model),
            model_bytes=model.stat().st_size,
            warmup_runs=warmup,
            load_ms=times.load_ms,
            conditions={**conditions, "clock": "wall", "cpu_ms": list(times.cpu_ms)},
        )


def _joined(first: LatencyRecord, second: LatencyRecord) -> LatencyRecord:
    cpu_ms = [*first.conditions["cpu_ms"], *second.conditions["cpu_ms"]]
    return replace(
        first,
        samples_ms=first.samples_ms + second.samples_ms,
        conditions={**first.conditions, "cpu_ms": cpu_ms},
    )


def on_cpu_time(record: LatencyRecord) -> LatencyRecord:
    """The same runs by their processor time; two of these make a ComparedLatency of cost.

    It is not what a user waits: never show it as a latency.

    Raises:
        DeviceError: when the record holds no processor times, or holds them already.
    """
    cpu_ms = record.conditions.get("cpu_ms")
    if not cpu_ms or record.conditions.get("clock") != "wall":
        raise DeviceError("a measurement without processor times", where=record.model)
    conditions = {**record.conditions, "clock": "process_cpu"}
    return replace(record, samples_ms=tuple(cpu_ms), conditions=conditions)
