"""What a measurement in turns says about a student's latency, and how surely.

Two figures are taken from the same turns of a candidate and the pinned dense student. Their *ratio*
says which student is cheaper: it steers the search. The *latency* is a percentile, as a user would
feel it: budgets are held against it. Drift is taken out of both by the reference's turns.

A host that others work on takes the processor away in the middle of runs, and a percentile of those
says how busy the machine was. On a host with one thread the ratio is therefore one of processor times,
and the percentile counts *quiet* turns only, in which both runs kept the processor; where the machine
never was quiet enough it is one of processor times as well, and says so. Elsewhere all turns count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from lightfield.latency import ComparedLatency, LatencyRecord, evidence

Clock = Literal["wall", "quiet", "processor"]
"""Wall time of all turns, wall time of the quiet ones, or processor time."""
QUIET_SHARE = 0.9
"""A run was quiet when the runner had the processor for at least this share of it."""
QUIET_TURNS = 20
"""A percentile of fewer turns says little."""
RESAMPLES = 400


def steady(measured: ComparedLatency) -> ComparedLatency:
    """The same turns by the clock that best tells which student is cheaper.

    Raises:
        BudgetError: for an emulated device.
    """
    candidate, reference = evidence(measured.candidate), evidence(measured.reference)
    if not _has_processor_times(measured):
        return measured
    return ComparedLatency(_by_processor(candidate), _by_processor(reference))


def felt(measured: ComparedLatency) -> tuple[ComparedLatency, Clock]:
    """The turns that a budget is held against, and their clock.

    Raises:
        BudgetError: for an emulated device.
    """
    by_processor = steady(measured)
    if not _has_processor_times(measured):
        clock = measured.candidate.conditions.get("clock")
        return measured, "processor" if clock == "process_cpu" else "wall"
    pairs = (
        (measured.candidate, by_processor.candidate),
        (measured.reference, by_processor.reference),
    )
    shares = [np.divide(own.samples_ms, all_.samples_ms) for all_, own in pairs]
    quiet = np.flatnonzero(np.minimum(*shares) >= QUIET_SHARE)
    if len(quiet) < QUIET_TURNS:
        return by_processor, "processor"
    records = [
        replace(record, samples_ms=tuple(record.samples_ms[i] for i in quiet))
        for record in (measured.candidate, measured.reference)
    ]
    return ComparedLatency(*records), "quiet"


def percentile_ratio(measured: ComparedLatency, percentile: float) -> float:
    """The candidate's percentile over the reference's."""
    return measured.candidate.percentile_ms(percentile) / measured.reference.percentile_ms(
        percentile
    )


def percentile_ratio_interval(measured: ComparedLatency, percentile: float) -> tuple[float, float]:
    """95% interval of `percentile_ratio` by resampling turns (bootstrap, always the same draws)."""
    turns = len(measured.candidate.samples_ms)
    drawn = np.random.default_rng(0).integers(turns, size=(RESAMPLES, turns))
    candidate, reference = (
        np.percentile(np.asarray(record.samples_ms)[drawn], percentile, axis=1)
        for record in (measured.candidate, measured.reference)
    )
    low, high = np.percentile(candidate / reference, (2.5, 97.5))
    return float(low), float(high)


def joined(first: ComparedLatency, second: ComparedLatency) -> ComparedLatency:
    """Two measurements of the same pair as one."""
    return ComparedLatency(
        _joined(first.candidate, second.candidate), _joined(first.reference, second.reference)
    )


def measured_until(
    measure: Callable[[], ComparedLatency],
    decided: Callable[[ComparedLatency], bool],
    *,
    rounds: int,
    first: ComparedLatency | None = None,
) -> ComparedLatency:
    """Measure again, and join, until the result decides the question or `rounds` are spent; the
    `first` round may be over."""
    measured = first or measure()
    for _ in range(rounds - 1):
        if decided(measured):
            break
        measured = joined(measured, measure())
    return measured


def _has_processor_times(measured: ComparedLatency) -> bool:
    return all(
        record.device.kind == "host"
        and record.conditions.get("clock") == "wall"
        and record.device.threads == 1
        and len(record.conditions.get("cpu_ms", ())) == len(record.samples_ms)
        for record in (measured.candidate, measured.reference)
    )


def _by_processor(record: LatencyRecord) -> LatencyRecord:
    return replace(record, samples_ms=tuple(record.conditions["cpu_ms"]))


def _joined(first: LatencyRecord, second: LatencyRecord) -> LatencyRecord:
    conditions = dict(first.conditions)
    if "cpu_ms" in first.conditions and "cpu_ms" in second.conditions:
        conditions["cpu_ms"] = [*first.conditions["cpu_ms"], *second.conditions["cpu_ms"]]
    return replace(first, samples_ms=first.samples_ms + second.samples_ms, conditions=conditions)
