"""Ratio and percentile of a student's latency from interleaved runs, with confidence intervals.

Both come from the same interleaved runs of a candidate and the dense reference student, so that drift
of the device cancels. The ratio says which student is faster and steers the search. The percentile is
compared with the budget. `lightfield.clocks` chooses the clock of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightfield.latency import ComparedLatency, LatencyRecord

RESAMPLES = 400


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


def _joined(first: LatencyRecord, second: LatencyRecord) -> LatencyRecord:
    conditions = dict(first.conditions)
    if "cpu_ms" in first.conditions and "cpu_ms" in second.conditions:
        conditions["cpu_ms"] = [*first.conditions["cpu_ms"], *second.conditions["cpu_ms"]]
    return replace(first, samples_ms=first.samples_ms + second.samples_ms, conditions=conditions)
