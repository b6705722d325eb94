"""The moves that a search is made of: begin, start, race, step, verify, finish.

Each looks at the state, works, and appends trials to it; between moves a search can be interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lightfield.clocks import budget_pair
from lightfield.errors import BudgetError
from lightfield.files import fingerprint
from lightfield.progress import Progress
from lightfield.ranges import later_seed
from lightfield.student import Student, StudentSpec
from prune.candidates import Candidates
from prune.chains import Kept, every_block
from prune.config import PruneConfig
from prune.conversion import converted, converted_spec
from prune.evidence import measured_until
from prune.forms import FORM, Forms
from prune.proposals import PROPOSED
from prune.reconciliation import Original, reconciled
from prune.reshaping import form_like, in_form_of, reshaped
from prune.scales import Scales
from prune.search_space import ENTRIES, SearchSpace
from prune.search_state import SearchState
from prune.slimming import Keep
from prune.trial import CURRENT, Trial
from prune.workbench import Workbench

TUNING = "tuning-"
"""Folders of the fine-tunings of a move under way."""


@dataclass(frozen=True)
class Start:
    """A smaller student to begin with, which of its blocks it still has, and what it was cut from: None
    is the dense shape in its form."""

    student: Student
    kept: Kept
    base: StudentSpec | None = None


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
        self.folder, self.tunings = folder, 0
        self.dense, self.bench, self.config, self.state = dense, bench, config, state
        self.scales = Scales(bench, state, config.percent)
        self.start = start
        entered = [t.spec for t in state.trials if t.kind in ENTRIES and t.verdict in CURRENT]
        if not entered and start is not None:
            entered = [start.student.spec]
        self.space = SearchSpace(bench, config, state)
        self.forms = Forms(dense.spec, bench.fits, self.scales.untrained_ms, self.space.table_of)
        self.space.enter(state.base or base_spec(dense.spec, config, start), *entered[-1:])
        self.candidates = Candidates(
            bench, config, state, self.space, self.forms, lambda s, n: self._tuned(s, n, None)
        )

    def next(self, student: Student, progress: Progress) -> Student:
        """Make the next move; the student to go on with.

        Raises:
            BudgetError: for a budget below the floor.
        """
        state, config = self.state, self.config
        self.tunings = 0
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
        turns, _ = budget_pair(measured)
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
                f"a budget of {last_ms:.4g} ms is out of reach: {self.space.floor()}, "
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
            original = Original(student, before)
            student = reconciled(converted(student, spec), original, everything)
        if spec != self.space.base:
            student = reshaped(student, self.space.base, self.bench.batches)
        return student

    def _race(self, student: Student) -> Student:
        """Let students in other forms, made for the whole way to the budget, run against cuts that go
        there at once: the best images at one latency win. Where that is a cut, the student keeps its
        form, and steps find a better way."""
        state = self.state
        state.raced = True
        forms = self.candidates.in_other_forms(student)
        if not forms:
            return student
        state.step += 1
        rivals = [*forms, *self.candidates.cuts(student, state.goal_ms)]
        tried = self.candidates.tried(student, rivals, state.goal_ms)
        chosen, others = self.candidates.chosen(tried)
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
        cuts = self.candidates.cuts(student, target_ms)
        tried = self.candidates.tried(student, cuts, target_ms)
        state.share *= config.step_decay
        chosen, others = self.candidates.chosen(tried)
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
        """All candidates of a step see the same data; any fine-tuning can be interrupted, and goes on
        when the move is made again."""
        if not steps:
            return student
        self.state.tuned += steps
        shape = fingerprint(student.spec.to_json())[:8]
        folder = self.folder / f"{TUNING}{len(self.state.trials)}-{self.tunings}-{shape}"
        self.tunings += 1
        seed = later_seed(self.config.seed, self.state.step)
        return self.bench.tune(student, steps, seed, progress, folder)

    def _why_not(self) -> str:
        state, now, dense = self.state, self.state.current, self.state.trials[0]
        return (
            f"the budget of {state.budget_ms:.4g} ms was not met: {state.stopped}; the fastest student "
            f"found takes {now.latency_ms:.2f} ms at {now.psnr_db:.2f} dB, the dense one "
            f"{state.pinned_ms:.2f} ms at {dense.psnr_db:.2f} dB; {self.space.floor()}"
        )
