"""Targets: things that run a graph and say how long it took.

Two times are kept of each run. `samples_ms` is wall-clock time, what a user waits. `conditions`
hold `cpu_ms`, the processor time of the runner during the same run; where other programs use the
same processor it is the steadier witness of which graph is cheaper, and `on_cpu_time` turns a record
into one of it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from device.onnx_inputs import checked_inputs, fixed_inputs
from device.operator_profile import NodeTime, read_profile
from device.runner_protocol import (
    Job,
    ModelTimes,
    Provider,
    RunnerReport,
    Schedule,
    read_outputs,
    write_inputs,
)
from device.sensors import Sensor, condition_curve
from lightfield.errors import ConfigError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord, joined
from lightfield.scratch import scratch_folder


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
        timeout_seconds: a runner that takes longer, beyond the time it was asked to go on for, is
            ended and the measurement refused.
        provider: what runs the graphs, as far as it can; the CPU runs the rest.
        options: of the provider, by ONNX Runtime's names; what it needs by default is set.
    """

    width_multiple: int = 16
    sensors: Sequence[Sensor] = ()
    """Read between turns; a target that has some sets it."""

    def __init__(
        self,
        *,
        threads: int,
        timeout_seconds: int,
        provider: Provider = "cpu",
        options: Mapping[str, str] | None = None,
    ):
        if threads < 1:
            raise ConfigError(f"{threads} threads", where="threads", remedy="use at least 1")
        if timeout_seconds < 1:
            raise ConfigError("the time limit must be at least 1 s", where="timeout_seconds")
        self.threads, self.timeout_seconds = threads, timeout_seconds
        self.provider: Provider = provider
        self.options = {**_provider_defaults(provider, threads), **(options or {})}

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

    def abort(self) -> None:  # noqa: B027 -- a target that others are measured beside can
        """End what is running, from another thread; the target measures nothing afterwards."""

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

    def measure(
        self, model: Path, *, runs: int, warmup: int = 5, seconds: int = 0
    ) -> LatencyRecord:
        """One graph alone, on until `seconds` have passed; its peak memory comes from a pass of its own.

        Raises:
            DeviceError: when the graph cannot be loaded or run.
        """
        memory = self._reports([model], turns=1, warmup=1)[0]
        report, conditions = self._reports([model], turns=runs, warmup=warmup, seconds=seconds)
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
            pair = [joined(*halves) for halves in zip(pair, reversed(swapped), strict=True)]
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
        return self.run_many(model, [inputs])[0]

    def run_many(
        self, model: Path, inputs: Sequence[dict[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """The outputs for each of several inputs, from one process.

        Raises:
            DeviceError: when an input is not the graph's, or the graph cannot be run.
        """
        with scratch_folder("run") as place:
            jobs = []
            for index, arrays in enumerate(inputs):
                folder = place / str(index)
                write_inputs(folder / "inputs", checked_inputs(model, arrays))
                jobs.append(Job(model, folder / "inputs", folder / "outputs"))
            report, _ = self._execute(jobs, replace(self._schedule(warmup=0, turns=1), watch=()))
            return [
                read_outputs(place / str(index) / "outputs", times.outputs)
                for index, times in enumerate(report.models)
            ]

    def profile(self, model: Path, *, runs: int = 5, warmup: int = 2) -> tuple[NodeTime, ...]:
        """The time of every node, and the provider that ran it.

        Raises:
            DeviceError: when the graph cannot be run, or ONNX Runtime wrote no trace.
        """
        with scratch_folder("profile") as place:
            trace = place / "trace.json"
            self._reports([model], turns=runs, warmup=warmup, profile=trace)
            return read_profile(trace, runs)

    def _reports(
        self,
        models: Sequence[Path],
        *,
        turns: int,
        warmup: int,
        seconds: int = 0,
        profile: Path | None = None,
    ) -> tuple[RunnerReport, dict[str, Any]]:
        if turns < 1 or warmup < 0 or seconds < 0:
            raise ConfigError(
                f"{turns} runs after {warmup} warm-ups", remedy="measure at least once"
            )
        with scratch_folder("measure") as place:
            jobs = []
            for index, model in enumerate(models):
                inputs = place / str(index)
                write_inputs(inputs, list(fixed_inputs(model).values()))
                jobs.append(Job(model, inputs))
            schedule = self._schedule(warmup=warmup, turns=turns, seconds=seconds)
            report, conditions = self._execute(jobs, replace(schedule, profile=profile))
        curve = condition_curve(self.sensors, report.watched)
        return report, {**conditions, "curve": curve.to_json() if curve else None}

    def _schedule(self, *, warmup: int, turns: int, seconds: int = 0) -> Schedule:
        return Schedule(
            self.threads,
            warmup,
            turns,
            self.timeout_seconds + seconds,
            seconds,
            self.provider,
            tuple(self.options.items()),
            tuple(sensor.path for sensor in self.sensors),
        )

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
            conditions={
                **conditions,
                "clock": "wall",
                "at_ms": list(times.at_ms),
                "cpu_ms": list(times.cpu_ms),
            },
        )


def _provider_defaults(provider: Provider, threads: int) -> dict[str, str]:
    """What a provider needs to be told; XNNPACK brings threads of its own."""
    if provider == "xnnpack":
        return {"intra_op_num_threads": str(threads)}
    return {"backend_path": "libQnnHtp.so"} if provider == "qnn" else {}


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
