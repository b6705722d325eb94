"""The moves that a search is made of: begin, start, race, step, verify, finish.

Each looks at the state, works, and appends trials to it; between moves a search can be interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lightfield.errors import BudgetError, ParityError
from lightfield.latency import ComparedLatency
from lightfield.progress import Progress
from lightfield.student import Student, StudentSpec
from prune.chains import Kept, every_block
from prune.config import PruneConfig
from prune.conversion import converted, converted_spec
from prune.evidence import (
    felt,
    measured_until,
    steady,
)
from prune.forms import FORM, Forms
from prune.proposals import (
    PROPOSED,
    ChoiceLosses,
    Proposal,
    measure_choices,
    propose,
    screened,
)
from prune.reconciliation import reconciled
from prune.reshaping import (
    blocks_in_form,
    form_like,
    in_form_of,
    reshaped,
)
from prune.scales import Scales
from prune.search_space import ENTRIES, SearchSpace
from prune.search_state import SearchState
from prune.slimming import Keep
from prune.trial import CURRENT, Trial
from prune.workbench import Workbench

TUNING = "tuning-"
"""Folders of long fine-tunings under way."""
SCREENED = 4
"""Proposals that are made and scored, untrained, for each one that is tried."""


@dataclass(frozen=True)
class Start:
    """A smaller student to begin with, which of its blocks it still has, and what it was cut from: None
    is the dense shape in its form."""

    student: Student
    kept: Kept
    base: StudentSpec | None = None


Tried = tuple[Trial, Student]


def base_spec(dense: StudentSpec, config: PruneConfig, start: Start | None) -> StudentSpec:
    """What a search cuts from: the dense shape in the form that is asked for, or that the start has."""
    if start is None:
        return config.base_of(dense)
    if start.base is not None:
        return start.base
    spec = start.student.spec
    base = converted_spec(dense, spec.activation, spec.tail[0].operator)
    return in_form_of(base, dense, spec)


class Moves:
    """The moves of one search; what they find out goes into the state."""

    def __init__(
        self,
        dense: Student,
        bench: Workbench,
        config: PruneConfig,
        state: SearchState,
        start: Start | None,
        folder: Path,
    ):
        self.folder = folder
        self.dense, self.bench, self.config, self.state = dense, bench, config, state
        self.scales = Scales(bench, state, config.percent)
        self.start = start
        entered = [t.spec for t in state.trials if t.kind in ENTRIES and t.verdict in CURRENT]
        if not entered and start is not None:
            entered = [start.student.spec]
        self.space = SearchSpace(bench, config, state)
        self.forms = Forms(dense.spec, bench.fits, self.scales.untrained_ms, self.space.table_of)
        self.space.enter(state.base or base_spec(dense.spec, config, start), *entered[-1:])
        self._losses: tuple[Student, ChoiceLosses] | None = None

    def next(self, student: Student, progress: Progress) -> Student:
        """Make the next move; the student to go on with.

        Raises:
            BudgetError: for a budget below the floor.
        """
        state, config = self.state, self.config
        if not state.trials:
            self._begin()
        elif len(state.trials) == 1 and (self.start or self.space.base != self.dense.spec):
            return self._go_from_start(progress)
        elif state.finished:
            state.go_further(config.first_step)
        elif state.verified or state.stopped:
            return self._finish(student, progress)
        elif state.at_goal:
            state.trials.append(self._verified(student))
        elif state.step - state.begun >= config.max_steps:
            state.stopped = f"{config.max_steps} steps were not enough"
        elif config.forms and not state.raced:
            return self._race(student)
        else:
            return self._step(student)
        return student

    def _begin(self) -> None:
        """Measure the dense student and the latency table, and refuse a budget below the floor."""
        state, config, dense = self.state, self.config, self.dense
        measured = measured_until(
            lambda: self.scales.measured(dense), lambda _: False, rounds=config.rounds
        )
        turns, _ = felt(measured)
        state.pinned_ms = turns.reference.percentile_ms(config.percent)
        state.pinned_median_ms = turns.reference.p50_ms
        state.tail = state.pinned_ms / state.pinned_median_ms
        state.budget_ms, *state.further_ms = config.budgets_ms(state.pinned_ms)
        state.share = config.first_step
        self.space.measure_table()
        if self.space.base == dense.spec:
            self.space.correct(dense.spec, state.pinned_median_ms)
        smallest = self.space.fastest()
        last_ms = [state.budget_ms, *state.further_ms][-1]
        floors_ms = [smallest.predicted_ms]
        if config.forms and smallest.predicted_ms > last_ms / state.tail:
            floors_ms += self.forms.floors_ms(self.space.base, self.space.choices_of)
        if min(floors_ms) > last_ms / state.tail:
            raise BudgetError(
                f"a budget of {last_ms:.2f} ms is out of reach: {self.space.floor()}, "
                f"and the dense student takes {state.pinned_ms:.2f} ms",
                where=measured.candidate.device.name,
                remedy="raise the budget, lower smallest_share, or train a smaller student",
            )
        kept = every_block(dense.spec)
        trial = self.scales.trial(
            "dense", dense, kept, measured, state.pinned_median_ms, state.goal_ms
        )
        # Both sides are the same graph: what they differ by is noise.
        latencies = {"median_ms": state.pinned_median_ms, "latency_ms": state.pinned_ms}
        state.trials.append(replace(trial, **latencies, verdict="dense"))

    def _go_from_start(self, progress: Progress) -> Student:
        """Begin with the given student, or with the dense one in its new form, trained into it."""
        state = self.state
        start = self.start
        if start is None:
            student = self._tuned(self._in_form(), self.config.final_tune_steps, progress)
            start = Start(student, every_block(self.space.base))
        student = start.student
        measured = self.scales.measured(student)
        predicted_ms = self.space.table.predict_ms(student.spec)
        trial = self.scales.trial(
            "start", student, start.kept, measured, predicted_ms, state.goal_ms
        )
        state.trials.append(replace(trial, verdict="kept"))
        self.space.correct(trial.spec, trial.median_ms)
        return student

    def _in_form(self) -> Student:
        """The dense student with the activation, operators, rays and tail that are asked for."""
        student, before = self.dense, self.bench.batches(self.dense.spec)
        spec = self.config.operators_of(student.spec)
        if spec != student.spec:
            everything = Keep.everything(student.spec)
            student = reconciled(converted(student, spec), student, everything, before)
        if spec != self.space.base:
            student = reshaped(student, self.space.base, self.bench.batches)
        return student

    def _race(self, student: Student) -> Student:
        """Let students in other forms, made for the whole way to the budget, run against cuts that go
        there at once: the best pictures at one latency win. Where that is a cut, the student keeps its
        form, and steps find a better way."""
        state, config = self.state, self.config
        state.raced = True
        aim_ms = state.goal_ms * (1 - config.margin)
        known = (student.spec, self._losses_of(student), self.space.table)
        forms = self.forms.proposals(*known, state.goal_ms, aim_ms, count=config.candidates)
        if not forms:
            return student
        state.step += 1
        cuts = self._proposals(student, state.goal_ms)
        chosen, others = self._chosen(self._try(student, [*forms, *cuts], state.goal_ms))
        state.trials += others
        if chosen is None:
            return student
        if chosen[0].kind != FORM or self._loses_too_much(chosen[0]):
            state.trials.append(replace(chosen[0], verdict="passed over"))
            return student
        return self._taken(student, *chosen)

    def _step(self, student: Student) -> Student:
        """Propose, tune and measure; keep the best candidate, or roll back and aim nearer."""
        state, config = self.state, self.config
        self.space.renew_table()
        state.step += 1
        now, target_ms = state.current, state.next_target_ms()
        nearer = 0.5 * (1 - target_ms / now.median_ms)
        tried = self._try(student, self._proposals(student, target_ms), target_ms)
        state.share *= config.step_decay
        chosen, others = self._chosen(tried)
        state.trials += others
        if chosen is None:
            reason = "no gain that was predicted could be measured" if tried else "nothing is left"
            state.shorten(nearer, reason)
            return student
        trial, candidate = chosen
        if self._loses_too_much(trial):
            state.trials.append(replace(trial, verdict="rolled back"))
            state.shorten(nearer, f"the next step would lose more than {config.max_loss_db:g} dB")
            state.allowance_spent = bool(state.stopped)
            return student
        return self._taken(student, trial, candidate)

    def _loses_too_much(self, trial: Trial) -> bool:
        allowance = self.config.max_loss_db
        return allowance is not None and self.state.trials[0].psnr_db - trial.psnr_db > allowance

    def _taken(self, student: Student, trial: Trial, candidate: Student) -> Student:
        """The candidate that was made of a student, to go on with."""
        self.state.trials.append(replace(trial, verdict="kept"))
        if not self.space.holds(trial.spec):
            self.space.enter(form_like(self.space.base, student.spec, trial.spec), trial.spec)
            self.space.measure_table()
            self.space.correct(trial.spec, trial.median_ms)
        return candidate

    def _chosen(self, tried: Sequence[Tried]) -> tuple[Tried | None, list[Trial]]:
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
        candidate = self._tuned(candidate, self.config.look_steps, None)
        return replace(trial, psnr_db=self.bench.score(candidate)), candidate

    def _proposals(self, student: Student, target_ms: float) -> list[Proposal]:
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

    def _made(self, student: Student, proposal: Proposal) -> Student:
        """What a proposal makes of the student, untrained."""
        cut = self._losses_of(student).slimmed(proposal.shape)
        return reshaped(cut, proposal.spec, self.bench.batches)

    def _try(
        self, student: Student, proposals: Sequence[Proposal], target_ms: float
    ) -> list[Tried]:
        """Cut, measure and train proposals, and correct the table by each."""
        state, tried = self.state, list[Tried]()
        candidates = [self._made(student, proposal) for proposal in proposals]
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
            tried.append((trial, candidate))
        return tried

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
            return [self._tuned(student, self.config.tune_steps, None) for student in candidates]

        if not self.bench.beside:
            return measured(), tuned()
        with ThreadPoolExecutor(1) as aside:
            measuring = aside.submit(measured)
            results = tuned()
            return measuring.result(), results

    def _decided(self, measured: ComparedLatency) -> bool:
        """Whether a candidate is surely faster, or surely slower, than the current student."""
        low, high = steady(measured).ratio_interval()
        return not low <= self.state.current.ratio <= high

    def _verified(self, student: Student) -> Trial:
        """Surely within the budget, where a long fine-tuning follows, which a miss would cost again; one
        that the search began with has had its own."""
        surely = bool(self.config.final_tune_steps) and not self._uncut
        return self._weighed("verification", student, surely=surely)

    def _weighed(
        self, kind: str, student: Student, *, surely: bool = False, before_ms: float | None = None
    ) -> Trial:
        """Measured twice as long as a candidate before it is believed that it misses."""
        predicted_ms, rounds = self.space.table.predict_ms(student.spec), 2 * self.config.rounds
        return self.scales.weighed(
            kind, student, predicted_ms, rounds, surely=surely, before_ms=before_ms
        )

    def _finish(self, student: Student, progress: Progress) -> Student:
        """The long fine-tuning, and the last measurement, which counts as much as that before it; also
        of the best there is when no step is left that would meet the budget."""
        state = self.state
        changed = student.spec != self.dense.spec and not self._as_begun
        tuned = self._tuned(student, self.config.final_tune_steps if changed else 0, progress)
        before_ms = state.current.latency_ms if state.verified else None
        trial = self._weighed("final", tuned, before_ms=before_ms)
        if trial.verdict == "within budget" or state.stopped:
            trial = replace(trial, verdict="final")
        state.trials.append(trial)
        if state.allowance_spent:
            state.further_ms.clear()
        elif trial.latency_ms <= state.budget_ms:
            state.stopped = ""  # measured for longer, it meets the budget after all
        elif state.stopped:
            state.further_ms.clear()
            state.stopped = self._why_not()
        state.mark_waypoint()
        return tuned

    @property
    def _uncut(self) -> bool:
        """Whether the current student is the one that the search began with, in its form."""
        taken = [trial.kind for trial in self.state.trials if trial.verdict in CURRENT]
        return "start" in taken and not {*PROPOSED, FORM} & {*taken}

    @property
    def _as_begun(self) -> bool:
        """Whether it is the dense one, trained into its form by this search."""
        return self.start is None and self._uncut

    def _tuned(self, student: Student, steps: int, progress: Progress | None) -> Student:
        """All candidates of a step see the same data; a long fine-tuning can be interrupted."""
        if not steps:
            return student
        self.state.tuned += steps
        folder = None if progress is None else self.folder / f"{TUNING}{len(self.state.trials)}"
        seed = self.config.seed + self.state.step
        return self.bench.tune(student, steps, seed, progress, folder)

    def _losses_of(self, student: Student) -> ChoiceLosses:
        if self._losses is None or self._losses[0] is not student:
            bench = self.bench
            losses = measure_choices(student, bench.batches, bench.rays, self.space.choices)
            self._losses = (student, losses)
        return self._losses[1]

    def _why_not(self) -> str:
        state, now, dense = self.state, self.state.current, self.state.trials[0]
        return (
            f"the budget of {state.budget_ms:.2f} ms was not met: {state.stopped}; the fastest student "
            f"found takes {now.latency_ms:.2f} ms at {now.psnr_db:.2f} dB, the dense one "
            f"{state.pinned_ms:.2f} ms at {dense.psnr_db:.2f} dB; {self.space.floor()}"
        )


def acceptable(tried: Sequence[Tried], now: Trial) -> list[Tried]:
    """The candidates that are surely faster than the current student and met their target; failing that,
    those that gained at least half of what was predicted. The best pictures first."""
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
