"""One student that was measured, and what became of it: the rows of a search's history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightfield.clocks import Clock
from lightfield.student import StudentSpec

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
"""`dense` came in. A candidate was `kept`, `passed over` for a better one, `missed` its target, was `not
exported` because its graph computes something else, or `rolled back` because it lost too much quality. A
kept student was then found `within budget` or `over
budget` in a longer measurement; `final` went out."""
CURRENT = ("dense", "kept", "within budget", "over budget", "final")
"""Verdicts of students that the search went on with."""


@dataclass(frozen=True)
class Trial:
    """A measured student; latencies have the drift since the dense student's measurement taken out."""

    step: int
    kind: str
    """`dense`, `start`, how it was proposed (see `prune.proposals.propose`), or `verification` and
    `final`."""
    spec: StudentSpec
    target_ms: float
    """Median latency aimed at; for a longer measurement, the budget's."""
    predicted_ms: float
    """Median latency by the table as it was then."""
    median_ms: float
    """Ratio times the dense student's median latency."""
    latency_ms: float
    """Percentile that budgets are held against; of a `final` that was found within its budget before its
    last fine-tuning, the mean of both measurements."""
    clock: Clock
    """What `latency_ms` is a percentile of."""
    ratio: float
    """Median ratio to the dense student, by the steadiest clock, with its 95% interval."""
    ratio_low: float
    ratio_high: float
    turns: int
    psnr_db: float
    """Held-out PSNR after the tuning that this student has had."""
    parameters: int
    macs: int
    kept: tuple[tuple[int, ...], ...]
    """Which of the dense student's blocks are left, chain by chain."""
    verdict: Verdict

    @property
    def met(self) -> bool:
        """Whether the target was reached, as far as can be told."""
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
    """The trials that no other one beats in both latency and PSNR, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.latency_ms, -t.psnr_db)):
        if not front or trial.psnr_db > front[-1].psnr_db:
            front.append(trial)
    return front
