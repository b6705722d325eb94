"""The candidates of a move: proposed, made, measured, tuned, and the best of them chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lightfield.clocks import ranking_pair
from lightfield.errors import ParityError
from lightfield.latency import ComparedLatency
from lightfield.student import Student
from prune.config import PruneConfig
from prune.evidence import measured_until
from prune.forms import Forms
from prune.proposals import ChoiceLosses, Proposal, measure_choices, propose, screened
from prune.reshaping import blocks_in_form, reshaped
from prune.scales import Scales
from prune.search_space import SearchSpace
from prune.search_state import SearchState
from prune.trial import Trial
from prune.workbench import Workbench

SCREENED = 4
"""Proposals that are made and scored, untrained, for each one that is tried."""
Tried = tuple[Trial, Student]


class Candidates:
    """What a search may go on with in place of its current student; `tune` trains for some steps."""

    def __init__(
        self,
        bench: Workbench,
        config: PruneConfig,
        state: SearchState,
        space: SearchSpace,
        forms: Forms,
        tune: Callable[[Student, int], Student],
    ):
        self.bench, self.config, self.state, self.space = bench, config, state, space
        self.forms, self.tune = forms, tune
        self.scales = Scales(bench, state, config.percent)
        self._losses: tuple[Student, ChoiceLosses] | None = None

    def in_other_forms(self, student: Student) -> list[Proposal]:
        """Made for the whole way to the budget."""
        goal_ms, losses = self.state.goal_ms, self._losses_of(student)
        aims = (goal_ms, goal_ms * (1 - self.config.margin))
        spec, table, count = student.spec, self.space.table, self.config.candidates
        return self.forms.proposals(spec, losses, table, *aims, count=count)

    def cuts(self, student: Student, target_ms: float) -> list[Proposal]:
        """What has not been tried yet; when nothing is predicted to reach the target, the fastest
        student that there can be."""
        losses, spec, count = self._losses_of(student), student.spec, self.config.candidates
        tried = {spec, *self.state.tried()}
        for aim_ms in (target_ms * (1 - self.config.margin), target_ms):
            found = propose(spec, losses, self.space.table, aim_ms, count=SCREENED * count)
            if found:
                new = [proposal for proposal in found if proposal.spec not in tried]
                return screened(losses, new, count)
        smallest = self.space.fastest(spec)
        return [] if smallest.spec in tried else [smallest]

    def tried(
        self, student: Student, proposals: Sequence[Proposal], target_ms: float
    ) -> list[Tried]:
        """Cut, measure and train proposals, and correct the table by each."""
        state, found = self.state, list[Tried]()
        cuts = self._losses_of(student).slimmed(proposal.shape for proposal in proposals)
        candidates = [
            reshaped(cut, proposal.spec, self.bench.batches)
            for cut, proposal in zip(cuts, proposals, strict=True)
        ]
        for candidate in candidates:
            self.bench.recalibrate(candidate)
        measured, tuned = self._measured_and_tuned(candidates)
        for proposal, comparison, candidate in zip(proposals, measured, tuned, strict=True):
            left = proposal.shape.blocks_left(state.current.kept)
            cut = proposal.shape.applied_to(student.spec)
            kept = blocks_in_form(left, self.space.base, cut, proposal.spec)
            figures = (comparison, proposal.predicted_ms, target_ms)
            trial = self.scales.trial(proposal.kind, candidate, kept, *figures)
            if self.space.holds(candidate.spec):
                self.space.correct(trial.spec, trial.median_ms)
            found.append((trial, candidate))
        return found

    def chosen(self, tried: Sequence[Tried]) -> tuple[Tried | None, list[Trial]]:
        """The best candidate whose graph computes the same, and what became of the others; where the
        budget is reached, the two best are trained for longer before."""
        good = acceptable(tried, self.state.current)
        others = [_judged(pair[0]) for pair in tried if pair not in good]
        rivals, further = good[:2], good[2:]
        reached = any(trial.median_ms <= self.state.goal_ms for trial, _ in rivals)
        if reached and len(rivals) == 2 and self.config.look_steps:
            rivals = [self._looked_at(pair) for pair in rivals]
            good = sorted(rivals, key=lambda pair: -pair[0].psnr_db) + further
        for i, (trial, candidate) in enumerate(good):
            try:
                self.bench.check(candidate)
            except ParityError:
                others.append(replace(trial, verdict="not exported"))
            else:
                return (trial, candidate), others + [_judged(pair[0]) for pair in good[i + 1 :]]
        return None, others

    def _looked_at(self, tried: Tried) -> Tried:
        """A candidate after more training."""
        trial, candidate = tried
        candidate = self.tune(candidate, self.config.look_steps)
        return replace(trial, psnr_db=self.bench.score(candidate)), candidate

    def _measured_and_tuned(
        self, candidates: Sequence[Student]
    ) -> tuple[list[ComparedLatency], list[Student]]:
        """Latency is a matter of the shape, so candidates are measured as they were cut: while they are
        trained, where that does not disturb, else before."""
        as_cut = [copy.deepcopy(candidate).cpu() for candidate in candidates]

        def measured() -> list[ComparedLatency]:
            return [
                measured_until(
                    lambda s=student: self.scales.measured(s),
                    self._decided,
                    rounds=self.config.rounds,
                    first=first,
                )
                for student, first in zip(as_cut, list(self.bench.measure(as_cut)), strict=True)
            ]

        def tuned() -> list[Student]:
            return [self.tune(student, self.config.tune_steps) for student in candidates]

        if not self.bench.beside:
            return measured(), tuned()
        with ThreadPoolExecutor(1) as aside:
            measuring = aside.submit(measured)
            results = tuned()
            return measuring.result(), results

    def _decided(self, measured: ComparedLatency) -> bool:
        """Whether a candidate is surely faster, or surely slower, than the current student."""
        low, high = ranking_pair(measured).ratio_interval()
        return not low <= self.state.current.ratio <= high

    def _losses_of(self, student: Student) -> ChoiceLosses:
        if self._losses is None or self._losses[0] is not student:
            bench = self.bench
            losses = measure_choices(student, bench.batches, bench.rays, self.space.choices)
            self._losses = (student, losses)
        return self._losses[1]


def acceptable(tried: Sequence[Tried], now: Trial) -> list[Tried]:
    """The candidates that are surely faster than the current student and met their target; failing that,
    those that gained at least half of what was predicted. The best images first."""
    faster = [pair for pair in tried if pair[0].ratio_high < now.ratio]
    met = [pair for pair in faster if pair[0].met]
    gained = [
        pair
        for pair in faster
        if now.median_ms - pair[0].median_ms >= 0.5 * (now.median_ms - pair[0].predicted_ms)
    ]
    return sorted(met or gained, key=lambda pair: -pair[0].psnr_db)


def _judged(trial: Trial) -> Trial:
    """A candidate that was not taken."""
    return replace(trial, verdict="passed over") if trial.met else trial
