"""Latency and quality of students during a search, relative to the dense reference student.

Two figures come from the same interleaved runs of a candidate and the reference. The *ratio* of
their medians says which student is cheaper, and steers the search. The *budget latency* is a
percentile of the wall-clock time, which the budget constrains. Both are relative to the reference's
runs, which removes drift of the device.

On a host that other programs share, a run may lose the processor, and a percentile of such runs
measures the load of the machine. On a host with one thread the ratio is therefore one of CPU times,
and the percentile counts undisturbed runs only, in which both students kept the processor. If there
are too few undisturbed runs, the percentile is one of CPU times, and the trial says so. On all
other devices every run counts by wall-clock time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from lightfield.clocks import Clock, budget_runs, ratio_runs
from lightfield.latency import ComparedLatency
from lightfield.student import Student, StudentSpec, mac_count, parameter_count
from prune.architecture import Kept
from prune.workbench import Measurer, Workbench

Verdict = Literal[
    "dense",
    "kept",
    "passed over",
    "missed",
    "not exported",
    "rolled back",
    "within budget",
    "over budget",
    "final",
]
"""`dense` is the student before pruning. A candidate was `kept`, `passed over` for a better one,
`missed` its target, was `not exported` because its graph computes something else, or was `rolled
back` because it lost too much quality. A longer measurement found a kept student `within budget` or
`over budget`. `final` is the result at a budget."""
CURRENT = ("dense", "kept", "within budget", "over budget", "final")
"""Verdicts of students from which the search continued."""


@dataclass(frozen=True)
class Trial:
    """A measured student and its verdict: one row of a search's history.

    Latencies are relative to the dense student's, so they are free of the device's drift.
    """

    step: int
    kind: str
    """`dense`, `start`, the kind of its proposal (`prune.proposals`), `verification` or `final`."""
    spec: StudentSpec
    target_ms: float
    """Median latency to reach in this step; for a longer measurement, the median of the budget."""
    predicted_ms: float
    """Median latency that the table predicted before the measurement."""
    median_ms: float
    """`ratio` times the dense student's median latency."""
    latency_ms: float
    """Percentile that the budget constrains. For a `final` trial after a `within budget` trial, the
    mean of both measurements."""
    clock: Clock
    """The clock and runs of which `latency_ms` is a percentile."""
    ratio: float
    """Median latency over the dense student's, with its 95% interval."""
    ratio_low: float
    ratio_high: float
    runs: int
    psnr_db: float
    """Held-out PSNR after the recovery distillation that this student has had."""
    parameters: int
    macs: int
    kept: tuple[tuple[int, ...], ...]
    """Indices of the dense student's blocks that are left, chain by chain."""
    verdict: Verdict

    @property
    def met(self) -> bool:
        """Whether the lower end of the ratio's interval reaches the target."""
        return self.median_ms * self.ratio_low / self.ratio <= self.target_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The inverse of `to_json`."""
        kept = tuple(tuple(chain) for chain in data["kept"])
        return cls(**{**data, "spec": StudentSpec.from_json(data["spec"]), "kept": kept})


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other trial beats in both latency and PSNR, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.latency_ms, -t.psnr_db)):
        if not front or trial.psnr_db > front[-1].psnr_db:
            front.append(trial)
    return front


@dataclass(frozen=True)
class LatencyMeter:
    """Measures and scores students relative to the dense reference student."""

    bench: Workbench
    measurer: Measurer
    """Measures latencies in place of the workbench, and records them."""
    percentile: float
    """Percentile that the budget constrains."""
    reference_ms: float
    """The dense student's budget latency."""
    reference_median_ms: float

    def untrained_ms(self, specs: Sequence[StudentSpec]) -> list[float]:
        """Median latencies of students with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            students = [Student(spec).eval() for spec in specs]
        measured = self.measurer.measure(students)
        return [ratio_runs(each).ratio * self.reference_median_ms for each in measured]

    def trial(
        self,
        kind: str,
        student: Student,
        measured: ComparedLatency,
        *,
        step: int,
        kept: Kept,
        predicted_ms: float,
        target_ms: float,
        verdict: Verdict = "missed",
    ) -> Trial:
        """A measured student as a trial."""
        by_ratio = ratio_runs(measured)
        by_budget, clock = budget_runs(measured)
        low, high = by_ratio.ratio_interval()
        return Trial(
            step=step,
            kind=kind,
            spec=student.spec,
            target_ms=target_ms,
            predicted_ms=predicted_ms,
            median_ms=by_ratio.ratio * self.reference_median_ms,
            latency_ms=by_budget.percentile_ratio(self.percentile) * self.reference_ms,
            clock=clock,
            ratio=by_ratio.ratio,
            ratio_low=low,
            ratio_high=high,
            runs=len(by_budget.candidate.samples_ms),
            psnr_db=self.bench.score(student),
            parameters=parameter_count(student),
            macs=mac_count(student.spec, *self.bench.batches(student.spec)[0][0].shape[-2:]),
            kept=kept,
            verdict=verdict,
        )

    def verified(
        self,
        kind: str,
        student: Student,
        *,
        step: int,
        kept: Kept,
        predicted_ms: float,
        target_ms: float,
        budget_ms: float,
        rounds: int,
        before_ms: float | None = None,
        whole_interval: bool = False,
    ) -> Trial:
        """Measure a student until it is clear whether it meets the budget, and judge it.

        Args:
            kind: of the trial.
            student: in evaluation mode.
            step: of the trial.
            kept: blocks of the dense student that the student still has.
            predicted_ms: median latency by the table.
            target_ms: median latency of the budget.
            budget_ms: the budget.
            rounds: maximum number of measurement rounds.
            before_ms: an earlier measurement of the same graph, which counts as much as this one:
                two measurements of one graph differ by more than their intervals show.
            whole_interval: whether the whole 95% interval must lie below the budget.

        Raises:
            ParityError: when the exported graph computes something else than the student.
        """
        self.bench.check(student)

        def mean_ms(now_ms: float) -> float:
            return now_ms if before_ms is None else (before_ms + now_ms) / 2

        def interval_ms(runs: ComparedLatency) -> tuple[float, float]:
            low, high = runs.percentile_ratio_interval(self.percentile)
            return mean_ms(low * self.reference_ms), mean_ms(high * self.reference_ms)

        def is_decided(measured: ComparedLatency) -> bool:
            runs, clock = budget_runs(measured)
            low_ms, high_ms = interval_ms(runs)
            return clock != "cpu" and not low_ms <= budget_ms <= high_ms

        measured = measured_until(
            lambda: one_round(self.measurer, student), is_decided, rounds=rounds
        )
        trial = self.trial(
            kind, student, measured,
            step=step, kept=kept, predicted_ms=predicted_ms, target_ms=target_ms,
        )  # fmt: skip
        latency_ms = mean_ms(trial.latency_ms)
        high_ms = interval_ms(budget_runs(measured)[0])[1] if whole_interval else latency_ms
        within = max(high_ms, latency_ms) <= budget_ms
        verdict = "within budget" if within else "over budget"
        return replace(trial, latency_ms=latency_ms, verdict=verdict)


def one_round(measurer: Measurer, student: Student) -> ComparedLatency:
    """One measurement round of one student."""
    (measured,) = measurer.measure([student])
    return measured


def measured_until(
    measure: Callable[[], ComparedLatency],
    is_decided: Callable[[ComparedLatency], bool],
    *,
    rounds: int,
    first: ComparedLatency | None = None,
) -> ComparedLatency:
    """Measure round after round, joined into one, until the result is decided or `rounds` are
    spent.

    `first` is a round that has already been measured.
    """
    measured = first or measure()
    for _ in range(rounds - 1):
        if is_decided(measured):
            break
        measured = measured.joined(measure())
    return measured
