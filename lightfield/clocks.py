"""Wall clock or CPU clock: which times of a measurement to use for which purpose.

A record of a measurement holds two times of every run: the wall-clock time, which is what a user waits
(`samples_ms`), and the CPU time of the process that ran the graph (`conditions["cpu_ms"]`). On a host,
other programs take the processor away in the middle of runs, and wall-clock percentiles then show how
busy the machine was. On a host with one thread, CPU time does not have this problem. Phones are always
measured by the wall clock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from lightfield.errors import DeviceError
from lightfield.latency import ComparedLatency, LatencyRecord, evidence

Clock = Literal["wall", "undisturbed", "cpu"]
"""Wall clock of all runs, wall clock of the undisturbed runs only, or CPU clock of all runs."""
UNDISTURBED_SHARE = 0.9
"""A run is undisturbed if the process had the processor for at least this share of the run's time."""
MIN_UNDISTURBED_RUNS = 20
"""Smallest number of undisturbed runs from which a percentile is taken."""


def cpu_clock_record(record: LatencyRecord) -> LatencyRecord:
    """The same runs with their CPU times as samples.

    CPU time compares the cost of graphs. It is not what a user waits, so never show it as a latency.

    Raises:
        DeviceError: when the record has no CPU times, or its samples are CPU times already.
    """
    cpu_ms = record.conditions.get("cpu_ms")
    if not cpu_ms or record.conditions.get("clock") != "wall":
        raise DeviceError("the measurement has no CPU times", where=record.model)
    conditions = {**record.conditions, "clock": "process_cpu"}
    return replace(record, samples_ms=tuple(cpu_ms), conditions=conditions)


def cpu_clock_on_host(record: LatencyRecord) -> LatencyRecord:
    """The record for a latency table: CPU clock on a host, wall clock on a phone."""
    return cpu_clock_record(record) if record.device.kind == "host" else record


def ratio_runs(measured: ComparedLatency) -> ComparedLatency:
    """The runs that decide which graph is faster: CPU clock on a host with one thread, else wall clock.

    Raises:
        BudgetError: for an emulated device.
    """
    candidate, reference = evidence(measured.candidate), evidence(measured.reference)
    if not _has_usable_cpu_times(measured):
        return measured
    return ComparedLatency(cpu_clock_record(candidate), cpu_clock_record(reference))


def budget_runs(measured: ComparedLatency) -> tuple[ComparedLatency, Clock]:
    """The runs whose percentile a budget constrains, and their clock.

    The clock is the wall clock. On a host with one thread only undisturbed runs count; if there are too
    few of them, the CPU clock is used instead.

    Raises:
        BudgetError: for an emulated device.
    """
    by_cpu = ratio_runs(measured)
    if not _has_usable_cpu_times(measured):
        clock = measured.candidate.conditions.get("clock")
        return measured, "cpu" if clock == "process_cpu" else "wall"
    shares = [
        np.divide(cpu.samples_ms, wall.samples_ms)
        for wall, cpu in (
            (measured.candidate, by_cpu.candidate),
            (measured.reference, by_cpu.reference),
        )
    ]
    undisturbed = np.flatnonzero(np.minimum(*shares) >= UNDISTURBED_SHARE)
    if len(undisturbed) < MIN_UNDISTURBED_RUNS:
        return by_cpu, "cpu"
    records = [
        replace(record, samples_ms=tuple(record.samples_ms[i] for i in undisturbed))
        for record in (measured.candidate, measured.reference)
    ]
    return ComparedLatency(*records), "undisturbed"


def _has_usable_cpu_times(measured: ComparedLatency) -> bool:
    return all(
        record.device.kind == "host"
        and record.conditions.get("clock") == "wall"
        and record.device.threads == 1
        and len(record.conditions.get("cpu_ms", ())) == len(record.samples_ms)
        for record in (measured.candidate, measured.reference)
    )
