"""Weighing: measuring a student against the pinned dense one, and writing down what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightfield.clocks import budget_pair, ranking_pair
from lightfield.latency import ComparedLatency
from lightfield.student import Student, StudentSpec, mac_count, parameter_count
from prune.chains import Kept
from prune.evidence import measured_until, percentile_ratio, percentile_ratio_interval
from prune.search_state import SearchState
from prune.trial import Trial
from prune.workbench import Workbench


@dataclass(frozen=True)
class Scales:
    """Weighs students for one search; reads its state, and keeps what longer measurements say of the
    percentile there."""

    bench: Workbench
    state: SearchState
    percentile: float

    def measured(self, student: Student) -> ComparedLatency:
        """One round."""
        (measured,) = self.bench.measure([student])
        return measured

    def untrained_ms(self, specs: Sequence[StudentSpec]) -> list[float]:
        """The median latencies of students with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            students = [Student(spec).eval() for spec in specs]
        measured = self.bench.measure(students)
        return [ranking_pair(each).ratio * self.state.pinned_median_ms for each in measured]

    def weighed(
        self,
        kind: str,
        student: Student,
        predicted_ms: float,
        rounds: int,
        *,
        surely: bool = False,
        before_ms: float | None = None,
    ) -> Trial:
        """Measure a student until it is clear whether it meets the budget, and judge it; on demand by
        the upper end of the percentile's 95 % interval.

        Of one graph, two measurements differ by more than the turns of either tell: of a student whose
        graph took `before_ms`, the mean of both counts.

        Raises:
            ParityError: when its exported graph computes something else.
        """
        state = self.state
        self.bench.check(student)

        def mean_ms(now_ms: float) -> float:
            return now_ms if before_ms is None else (before_ms + now_ms) / 2

        def interval_ms(turns: ComparedLatency) -> tuple[float, float]:
            low, high = percentile_ratio_interval(turns, self.percentile)
            return mean_ms(low * state.pinned_ms), mean_ms(high * state.pinned_ms)

        def decided(measured: ComparedLatency) -> bool:
            turns, clock = budget_pair(measured)
            low_ms, high_ms = interval_ms(turns)
            return clock != "cpu" and not low_ms <= state.budget_ms <= high_ms

        measured = measured_until(lambda: self.measured(student), decided, rounds=rounds)
        kept = state.current.kept
        trial = self.trial(kind, student, kept, measured, predicted_ms, state.goal_ms)
        latency_ms = mean_ms(trial.latency_ms)
        state.tail = latency_ms / trial.median_ms
        most_ms = interval_ms(budget_pair(measured)[0])[1] if surely else latency_ms
        within = max(most_ms, latency_ms) <= state.budget_ms
        verdict = "within budget" if within else "over budget"
        return replace(trial, latency_ms=latency_ms, verdict=verdict)

    def trial(
        self,
        kind: str,
        student: Student,
        kept: Kept,
        measured: ComparedLatency,
        predicted_ms: float,
        target_ms: float,
    ) -> Trial:
        """What was measured, as a trial that has yet to be judged."""
        state, by_ratio = self.state, ranking_pair(measured)
        turns, clock = budget_pair(measured)
        low, high = by_ratio.ratio_interval()
        return Trial(
            step=state.step,
            kind=kind,
            spec=student.spec,
            target_ms=target_ms,
            predicted_ms=predicted_ms,
            median_ms=by_ratio.ratio * state.pinned_median_ms,
            latency_ms=percentile_ratio(turns, self.percentile) * state.pinned_ms,
            clock=clock,
            ratio=by_ratio.ratio,
            ratio_low=low,
            ratio_high=high,
            turns=len(turns.candidate.samples_ms),
            psnr_db=self.bench.score(student),
            parameters=parameter_count(student),
            macs=mac_count(student.spec, *self.bench.batches(student.spec)[0][0].shape[-2:]),
            kept=kept,
            verdict="missed",
        )
