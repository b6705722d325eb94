"""Targets: devices that run an ONNX graph and report how long every run took.

A record holds two times of every run: `samples_ms` is wall-clock time, what a user waits, and
`conditions["cpu_ms"]` is the CPU time of the runner. `lightfield.clocks` says which to use when.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    RunnerReport,
    Schedule,
    read_outputs,
    write_inputs,
)
from device.sensors import Sensor, condition_curve
from device.target_config import TargetConfig
from lightfield.errors import ConfigError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord, joined
from lightfield.scratch import scratch_folder


@runtime_checkable
class Target(Protocol):
    """A device that measures graphs. Close it after use, or use it as a context manager."""

    @property
    def identity(self) -> DeviceIdentity:
        """The device, its system and its runtime."""
        ...

    @property
    def width_multiple(self) -> int:
        """The device wastes no computation on channel counts that are multiples of this number."""
        ...

    def measure(self, model: Path, *, runs: int, warmup: int = 5) -> LatencyRecord:
        """Measure one graph alone, with its load time and peak memory."""
        ...

    def compare(
        self, candidate: Path, reference: Path, *, runs: int, warmup: int = 3
    ) -> ComparedLatency:
        """Measure `runs` interleaved runs of two graphs, A B A B."""
        ...

    def measure_many(
        self, models: Sequence[Path], *, runs: int, warmup: int = 3
    ) -> list[LatencyRecord]:
        """Measure `runs` interleaved runs of all graphs (round-robin), for latency tables."""
        ...

    def run(self, model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the graph's outputs on the device."""
        ...

    def close(self) -> None:
        """Restore the device to its previous state."""
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
    """A target that runs graphs in a separate runner process (see `device.runner_protocol`).

    Args:
        config: threads, execution provider and its options.
        timeout_seconds: time limit of the runner, in addition to the duration that a measurement asks
            for. A runner that exceeds the limit is killed, and the measurement fails.
    """

    width_multiple: int = 16
    sensors: Sequence[Sensor] = ()
    """Sensors that the runner reads between runs; a subclass sets them."""

    def __init__(self, config: TargetConfig, *, timeout_seconds: int):
        if timeout_seconds < 1:
            raise ConfigError("the time limit must be at least 1 s", where="timeout_seconds")
        self.config, self.timeout_seconds = config, timeout_seconds

    @property
    @abstractmethod
    def identity(self) -> DeviceIdentity:
        """The device, its system and its runtime."""

    @abstractmethod
    def _run_jobs(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        """Run the jobs with the runner; return its report and the conditions of the device."""

    def close(self) -> None:  # noqa: B027 -- optional for subclasses
        """Restore the device to its previous state."""

    def abort(self) -> None:  # noqa: B027 -- optional for subclasses
        """Stop the current run from another thread; later measurements are refused."""

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
        with contextlib.suppress(DeviceError):  # do not hide the first error
            self.close()

    def measure(
        self, model: Path, *, runs: int, warmup: int = 5, seconds: int = 0
    ) -> LatencyRecord:
        """Measure one graph alone, with at least `runs` runs, and for at least `seconds`.

        Peak memory is measured in a separate pass.

        Raises:
            DeviceError: when the graph cannot be loaded or run.
        """
        memory = self._time_graphs([model], runs=1, warmup=1)[0]
        report, conditions = self._time_graphs([model], runs=runs, warmup=warmup, seconds=seconds)
        record = self._latency_record(model, report.models[0], warmup, conditions)
        return replace(record, peak_memory_bytes=memory.growth_bytes)

    def compare(
        self, candidate: Path, reference: Path, *, runs: int, warmup: int = 3
    ) -> ComparedLatency:
        """Measure interleaved runs of two graphs, so that drift cancels in their ratio.

        The first half of the runs is A B A B in one process, the second half is B A B A in another
        process, because the order of loading changes the ratio by about 1%.
        """
        pair = self.measure_many([candidate, reference], runs=-(-runs // 2), warmup=warmup)
        if runs > 1:
            swapped = self.measure_many([reference, candidate], runs=runs // 2, warmup=warmup)
            pair = [joined(*halves) for halves in zip(pair, reversed(swapped), strict=True)]
        return ComparedLatency(*pair)

    def measure_many(
        self, models: Sequence[Path], *, runs: int, warmup: int = 3
    ) -> list[LatencyRecord]:
        """Measure all graphs round-robin in one process; records are in the order of `models`."""
        if not models:
            return []
        report, conditions = self._time_graphs(models, runs=runs, warmup=warmup)
        conditions["interleaved_graphs"] = len(models)
        return [
            self._latency_record(model, times, warmup, conditions)
            for model, times in zip(models, report.models, strict=True)
        ]

    def run(self, model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the graph's outputs for these inputs on the device.

        Raises:
            DeviceError: when the inputs do not fit the graph, or the graph cannot be run.
        """
        return self.run_many(model, [inputs])[0]

    def run_many(
        self, model: Path, inputs: Sequence[dict[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """Compute the outputs for each of several inputs in one process.

        Raises:
            DeviceError: when the inputs do not fit the graph, or the graph cannot be run.
        """
        with scratch_folder("run") as scratch:
            jobs = []
            for index, arrays in enumerate(inputs):
                folder = scratch / str(index)
                write_inputs(folder / "inputs", checked_inputs(model, arrays))
                jobs.append(Job(model, folder / "inputs", folder / "outputs"))
            report, _ = self._run_jobs(jobs, replace(self._schedule(warmup=0, runs=1), watch=()))
            return [
                read_outputs(scratch / str(index) / "outputs", times.outputs)
                for index, times in enumerate(report.models)
            ]

    def profile(self, model: Path, *, runs: int = 5, warmup: int = 2) -> tuple[NodeTime, ...]:
        """Measure the time of every node, and find the provider that ran it.

        Raises:
            DeviceError: when the graph cannot be run, or ONNX Runtime wrote no trace.
        """
        with scratch_folder("profile") as scratch:
            trace = scratch / "trace.json"
            self._time_graphs([model], runs=runs, warmup=warmup, profile=trace)
            return read_profile(trace, runs)

    def _time_graphs(
        self,
        models: Sequence[Path],
        *,
        runs: int,
        warmup: int,
        seconds: int = 0,
        profile: Path | None = None,
    ) -> tuple[RunnerReport, dict[str, Any]]:
        """Run graphs on their fixed inputs; return the runner's report and the conditions."""
        if runs < 1 or warmup < 0 or seconds < 0:
            raise ConfigError(
                f"{runs} runs after {warmup} warm-up runs cannot be measured",
                remedy="use at least 1 run, and no negative numbers",
            )
        with scratch_folder("measure") as scratch:
            jobs = []
            for index, model in enumerate(models):
                inputs = scratch / str(index)
                write_inputs(inputs, list(fixed_inputs(model).values()))
                jobs.append(Job(model, inputs))
            schedule = self._schedule(warmup=warmup, runs=runs, seconds=seconds)
            report, conditions = self._run_jobs(jobs, replace(schedule, profile=profile))
        curve = condition_curve(self.sensors, report.watched)
        return report, {**conditions, "curve": curve.to_json() if curve else None}

    def _schedule(self, *, warmup: int, runs: int, seconds: int = 0) -> Schedule:
        return Schedule(
            self.config.threads,
            warmup,
            runs,
            self.timeout_seconds + seconds,
            seconds,
            self.config.provider,
            tuple(self.config.options_by_name().items()),
            tuple(sensor.path for sensor in self.sensors),
        )

    def _latency_record(
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
