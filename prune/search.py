"""Latency-aware pruning search: cut a student until its measured latency meets the budget.

The search first compares architecture variants (`prune.variants`) with cuts that all meet the
budget at once. Unless a variant wins, steps follow (after NetAdapt, Yang et al. 2018). Each step

1. proposes students that are predicted to reach the next target on the way to the budget,
2. reconstructs their layers after the cut,
3. measures the exported students on the target, interleaved with the dense reference student,
4. distills them for a few recovery steps,
5. selects the best one that really reached the target.

Steps use the median latency, which few runs determine. A student that should meet the budget is
then measured for longer, by the percentile that the budget constrains, before and after the final
recovery distillation; both measurements count alike. If it misses the budget, the search continues
with the measured ratio of percentile and median. The search for each further budget continues from
the finished student at the one before.

Exporter, device and trainer come in as a `Workbench`. All measurements are recorded. With the same
measurements and a deterministic workbench, the search always makes the same decisions.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightfield.clocks import budget_runs, ratio_runs
from lightfield.errors import BudgetError, ParityError
from lightfield.files import fingerprint
from lightfield.latency import ComparedLatency
from lightfield.progress import Progress
from lightfield.ranges import later_seed
from lightfield.student import Student, StudentSpec
from prune.architecture import (
    Kept,
    blocks_in_variant,
    converted_spec,
    every_block,
    in_variant_of,
    is_same_variant,
    variant_like,
)
from prune.config import PruneConfig
from prune.latency_model import Choices, LatencyTable, build_latency_table
from prune.measurement import (
    LatencyMeter,
    Trial,
    measured_until,
    one_round,
    pareto_front,
)
from prune.proposals import (
    PROPOSED,
    VARIANT,
    ChoiceLosses,
    Proposal,
    fastest,
    measure_choices,
    propose,
    screened,
)
from prune.reconstruction import Original, reconstructed
from prune.record import MEASUREMENTS, MeasurementRecord
from prune.reshaping import reshaped
from prune.state import Phase, SearchState, load_search, save_search
from prune.surgery import Keep, converted
from prune.variants import Variants
from prune.workbench import Workbench

__all__ = ["PruneConfig", "SearchResult", "Start", "Workbench", "search"]

RECOVERY = "recovery-"
"""Prefix of the folders in which recovery distillation keeps its checkpoints during a phase."""
SCREENED = 4
"""Number of proposals that are reconstructed and scored for each one that is measured and
trained."""
MAX_TABLE_ERROR = 0.1
"""Median prediction error beyond which the latency table is measured again."""
MIN_PREDICTIONS = 4
"""Number of predictions that are needed to judge the latency table."""


@dataclass(frozen=True)
class Start:
    """A smaller student from which a search starts."""

    student: Student
    kept: Kept
    """Blocks of the dense student that the student still has."""
    base: StudentSpec | None = None
    """The specification that the student was cut from; None for the dense one in its
    architecture."""


@dataclass(frozen=True)
class SearchResult:
    """The pruned student and the history of its search."""

    student: Student
    state: SearchState

    @property
    def dense(self) -> Trial:
        """The student before pruning."""
        return self.state.trials[0]

    @property
    def final(self) -> Trial:
        """The pruned student."""
        return self.state.trials[-1]

    @property
    def stopped(self) -> str:
        """Why the search ended before the budget was met; empty if it was met."""
        return self.state.stopped

    @property
    def front(self) -> list[Trial]:
        """Every trial that no other trial beats in both latency and PSNR."""
        return pareto_front(self.state.trials)


def search(
    dense: Student,
    bench: Workbench,
    config: PruneConfig,
    *,
    folder: Path,
    progress: Progress,
    log: Callable[..., None],
    start: Start | None = None,
    dense_key: str = "",
) -> SearchResult:
    """Prune `dense` until its measured latency meets the budget or its PSNR has dropped by the
    maximum.

    Args:
        dense: the student before pruning.
        bench: trains, exports and measures students.
        config: all settings.
        folder: holds state, measurements, and the student at each budget but the last. A search
            that was interrupted continues from it.
        progress: called after each phase.
        log: called once with each trial.
        start: a smaller student that an earlier search made of `dense`.
        dense_key: identifies `dense` in the files.

    When no further step can meet the budget, the result is the fastest student found, and `stopped`
    says why.

    Raises:
        BudgetError: when a budget lies below the predicted latency of the fastest student, or when
            the target's latencies are no evidence.
        CheckpointError: when the folder holds the state of another search.
    """
    asked = {"config": asdict(config), "spec": dense.spec.to_json()}
    if start is not None:
        asked["start"] = start.student.spec.to_json()
    question = fingerprint(asked)
    found = load_search(folder, question, dense.head.weight.device)
    state, student = found or (SearchState(question, dense_key), dense)
    record = MeasurementRecord(folder / MEASUREMENTS, state.measurements, bench)
    phases = _Phases(dense, bench, config, state, record, start, folder)
    while state.phase != "done":
        known = len(state.trials)
        student = phases.perform(student, progress)
        state.measurements = record.position
        save_search(folder, state, student)
        for done in folder.glob(f"{RECOVERY}*"):
            shutil.rmtree(done)
        for trial in state.trials[known:]:
            log(**{name: value for name, value in trial.to_json().items() if name != "spec"})
        now = state.current
        figures = {"ms": now.latency_ms, "budget_ms": state.budget_ms, "db": now.psnr_db}
        progress(state.percent_done, 100, **figures)
    return SearchResult(student, state)


@dataclass(frozen=True)
class _Candidate:
    """A proposal that has been made, measured and trained."""

    trial: Trial
    student: Student


class _Phases:
    """The phases of one search.

    Each phase works on the current student, appends trials to the state, and sets the next phase. A
    search can be interrupted in any phase, which is then performed again.
    """

    def __init__(
        self,
        dense: Student,
        bench: Workbench,
        config: PruneConfig,
        state: SearchState,
        record: MeasurementRecord,
        start: Start | None,
        folder: Path,
    ):
        self.dense, self.bench, self.config = dense, bench, config
        self.state, self.record, self.start, self.folder = state, record, start, folder
        self.variants = Variants(
            dense.spec, bench.fits, lambda specs: self.meter.untrained_ms(specs), self._table_of
        )
        base = _initial_base(dense.spec, config, start)
        self.starts_warm = start is not None or base != dense.spec
        if state.base is None:
            state.base, state.entered = base, None if start is None else start.student.spec
        self._enter(state.base, state.entered)
        self._distillations = 0
        self._losses: tuple[Student, ChoiceLosses] | None = None

    def perform(self, student: Student, progress: Progress) -> Student:
        """Perform the present phase, and return the student with which the next phase works.

        Raises:
            BudgetError: when a budget lies below the predicted latency of the fastest student.
        """
        self._distillations = 0
        match self.state.phase:
            case "measure_dense":
                self._measure_dense()
            case "warm_start":
                return self._warm_start(progress)
            case "one_shot":
                return self._one_shot(student)
            case "step":
                return self._step(student)
            case "verify":
                self._verify(student)
            case "final_distillation":
                return self._final_distillation(student, progress)
            case "next_budget":
                self._next_budget()
            case "done":
                pass
        return student

    # --- phases ---------------------------------------------------------------------------------

    def _measure_dense(self) -> None:
        """Measure the dense student and the latency table, and refuse a budget out of reach."""
        state, config, dense = self.state, self.config, self.dense
        measured = measured_until(
            lambda: one_round(self.record, dense), lambda _: False, rounds=config.search.rounds
        )
        reference = budget_runs(measured)[0].reference
        state.reference_ms = reference.percentile_ms(config.budget.percent)
        state.reference_median_ms = reference.p50_ms
        state.percentile_over_median = state.reference_ms / state.reference_median_ms
        state.budget_ms, *state.later_budgets_ms = config.budget.budgets_ms(state.reference_ms)
        state.step_share = config.search.first_step
        self._measure_table()
        if self.base == dense.spec:
            self._correct_table(dense.spec, state.reference_median_ms)
        self._check_reach(measured.candidate.device.name)
        trial = self.meter.trial(
            "dense", dense, measured,
            step=state.step, kept=every_block(dense.spec), verdict="dense",
            predicted_ms=state.reference_median_ms, target_ms=state.budget_median_ms,
        )  # fmt: skip
        # Candidate and reference are the same graph: their difference is noise.
        latencies = {"median_ms": state.reference_median_ms, "latency_ms": state.reference_ms}
        state.trials.append(replace(trial, **latencies))
        state.phase = "warm_start" if self.starts_warm else self._approach_budget()

    def _check_reach(self, device: str) -> None:
        """Refuse a last budget below the predicted latency of the fastest student."""
        state = self.state
        smallest = fastest(self.base, self.table, self.choices)
        budget_ms = [state.budget_ms, *state.later_budgets_ms][-1]
        target_ms = budget_ms / state.percentile_over_median
        least_ms = [smallest.predicted_ms]
        if self.config.search.architecture_variants and smallest.predicted_ms > target_ms:
            least_ms += self.variants.floors_ms(self.base, self._choices_of)
        if min(least_ms) > target_ms:
            raise BudgetError(
                f"a budget of {budget_ms:.4g} ms is out of reach: {self._least_latency()}, "
                f"and the dense student takes {state.reference_ms:.2f} ms",
                where=device,
                remedy="raise the budget, lower smallest_share, or train a smaller student",
            )

    def _warm_start(self, progress: Progress) -> Student:
        """Start from the given student, or train the dense student into its new architecture."""
        state, start = self.state, self.start
        if start is None:
            steps = self.config.search.final_recovery_steps
            student = self._distill(self._changed_dense(), steps, progress)
            start = Start(student, every_block(self.base))
        measured = one_round(self.record, start.student)
        trial = self.meter.trial(
            "start", start.student, measured,
            step=state.step, kept=start.kept, verdict="kept",
            predicted_ms=self.table.predict_ms(start.student.spec),
            target_ms=state.budget_median_ms,
        )  # fmt: skip
        state.trials.append(trial)
        self._correct_table(trial.spec, trial.median_ms)
        state.phase = self._approach_budget()
        return start.student

    def _one_shot(self, student: Student) -> Student:
        """Compare architecture variants with cuts, all made for the whole way to the budget.

        The highest PSNR at one latency wins. If a cut wins, the student keeps its architecture, and
        steps find a better way to the budget.
        """
        state = self.state
        state.variants_tried, target_ms = True, state.budget_median_ms
        variants = self._propose_variants(student, target_ms)
        best = None
        if variants:
            state.step += 1
            proposals = [*variants, *self._propose_cuts(student, target_ms)]
            best = self._best_candidate(student, proposals, target_ms)
        if best is not None and best.trial.kind == VARIANT and not self._loses_too_much(best.trial):
            return self._keep(student, best)
        if best is not None:
            state.trials.append(replace(best.trial, verdict="passed over"))
        state.phase = self._search_on()
        return student

    def _step(self, student: Student) -> Student:
        """Cut the student to the next target; keep the best candidate, or take smaller steps."""
        state, search = self.state, self.config.search
        self._renew_table()
        state.step += 1
        target_ms = state.next_target_ms()
        smaller_share = 0.5 * (1 - target_ms / state.current.median_ms)
        proposals = self._propose_cuts(student, target_ms)
        best = self._best_candidate(student, proposals, target_ms)
        state.step_share *= search.step_decay
        if best is not None and not self._loses_too_much(best.trial):
            return self._keep(student, best)
        if best is not None:
            state.trials.append(replace(best.trial, verdict="rolled back"))
            max_loss_db = self.config.budget.max_loss_db
            state.shorten_steps(
                smaller_share, f"the next step would lose more than {max_loss_db:g} dB"
            )
            state.quality_limit_reached = bool(state.stopped)
        else:
            reason = "no proposal is left"
            if proposals:
                reason = "no proposal was measured to be as much faster as predicted"
            state.shorten_steps(smaller_share, reason)
        state.phase = "final_distillation" if state.stopped else self._search_on()
        return student

    def _verify(self, student: Student) -> None:
        """Measure for longer whether the current student meets the budget.

        Require the whole confidence interval to lie below the budget before the final recovery
        distillation, because a miss would waste it.
        """
        trains = bool(self.config.search.final_recovery_steps) and not self._is_uncut_start
        trial = self._verified("verification", student, whole_interval=trains)
        self.state.trials.append(trial)
        within = trial.verdict == "within budget"
        self.state.phase = "final_distillation" if within else self._search_on()

    def _final_distillation(self, student: Student, progress: Progress) -> Student:
        """Train the result at this budget for long, and measure it once more.

        The result is the fastest student found if no further step can meet the budget.
        """
        state = self.state
        is_trained = self.start is None and self._is_uncut_start
        is_trained |= state.current.verdict == "final"  # at the previous budget
        changed = student.spec != self.dense.spec and not is_trained
        steps = self.config.search.final_recovery_steps if changed else 0
        student = self._distill(student, steps, progress)
        before_ms = None if state.stopped else state.current.latency_ms
        trial = self._verified("final", student, before_ms=before_ms)
        if trial.verdict == "within budget" or state.stopped:
            trial = replace(trial, verdict="final")
        state.trials.append(trial)
        state.phase = self._after_final(trial)
        return student

    def _after_final(self, trial: Trial) -> Phase:
        state = self.state
        if state.quality_limit_reached:
            state.later_budgets_ms.clear()
        elif trial.latency_ms <= state.budget_ms:
            state.stopped = ""  # the longer measurement shows that the budget is met after all
        elif state.stopped:
            state.later_budgets_ms.clear()
            state.stopped = self._why_not_met()
        else:
            return self._search_on()
        return self._finish_budget()

    def _next_budget(self) -> None:
        state = self.state
        state.start_next_budget(self.config.search.first_step)
        if state.current.latency_ms <= state.budget_ms:  # one long step met several budgets
            state.phase = self._finish_budget()
        else:
            state.phase = self._approach_budget()

    def _finish_budget(self) -> Phase:
        """The phase after the current student has become the result at the present budget."""
        self.state.keep_budget_result()
        return "next_budget" if self.state.later_budgets_ms else "done"

    def _approach_budget(self) -> Phase:
        """The phase that follows when the search has a new current student, or a new budget."""
        if self.state.current.median_ms <= self.state.budget_median_ms:
            return "verify"
        return self._search_on()

    def _search_on(self) -> Phase:
        """The phase that looks for a faster student."""
        state, search = self.state, self.config.search
        if state.step - state.step_before >= search.max_steps:
            state.stopped = f"{search.max_steps} steps were not enough"
            return "final_distillation"
        tries_variants = search.architecture_variants and not state.variants_tried
        return "one_shot" if tries_variants else "step"

    # --- propose ---------------------------------------------------------------------------------

    def _propose_variants(self, student: Student, target_ms: float) -> list[Proposal]:
        """Architecture variants of the student that meet the target."""
        losses, search = self._losses_of(student), self.config.search
        return self.variants.proposals(
            student.spec, losses, self.table, target_ms,
            margin=search.margin, count=search.candidates,
        )  # fmt: skip

    def _propose_cuts(self, student: Student, target_ms: float) -> list[Proposal]:
        """Cuts that have not been tried; the smallest student if none is predicted to reach the
        target."""
        losses, spec, search = self._losses_of(student), student.spec, self.config.search
        tried = {spec, *self.state.rejected()}
        for margin in (search.margin, 0):
            count = SCREENED * search.candidates
            found = propose(spec, losses, self.table, target_ms * (1 - margin), count=count)
            if found:
                new = [proposal for proposal in found if proposal.spec not in tried]
                return screened(losses, new, search.candidates)
        smallest = fastest(spec, self.table, self.choices)
        return [] if smallest.spec in tried else [smallest]

    def _losses_of(self, student: Student) -> ChoiceLosses:
        if self._losses is None or self._losses[0] is not student:
            bench = self.bench
            losses = measure_choices(student, bench.batches, bench.rays, self.choices)
            self._losses = (student, losses)
        return self._losses[1]

    # --- reconstruct, measure, distill, select ----------------------------------------------------

    def _best_candidate(
        self, student: Student, proposals: Sequence[Proposal], target_ms: float
    ) -> _Candidate | None:
        """The best of the proposals; the others become trials with a verdict."""
        students = self._reconstruct(student, proposals)
        with self._measure(students) as latencies:
            steps = self.config.search.recovery_steps
            students = [self._distill(candidate, steps) for candidate in students]
        candidates = self._judge(student, proposals, latencies.result(), students, target_ms)
        return self._select(candidates)

    def _reconstruct(self, student: Student, proposals: Sequence[Proposal]) -> list[Student]:
        """Cut the student as proposed, and reconstruct its layers."""
        cuts = self._losses_of(student).pruned(proposal.shape for proposal in proposals)
        candidates = [
            reshaped(cut, proposal.spec, self.bench.batches)
            for cut, proposal in zip(cuts, proposals, strict=True)
        ]
        for candidate in candidates:
            self.bench.recalibrate(candidate)
        return candidates

    @contextlib.contextmanager
    def _measure(self, students: Sequence[Student]) -> Iterator[Future[list[ComparedLatency]]]:
        """Measure students while the body of the `with` trains them, or before it if training would
        disturb the latencies.

        The latency depends on the specification only, so untrained copies are measured.
        """
        copies = [copy.deepcopy(student).cpu() for student in students]

        def measured() -> list[ComparedLatency]:
            return [
                measured_until(
                    lambda s=student: one_round(self.record, s),
                    self._is_decided,
                    rounds=self.config.search.rounds,
                    first=first,
                )
                for student, first in zip(copies, list(self.record.measure(copies)), strict=True)
            ]

        if self.bench.concurrent:
            with ThreadPoolExecutor(1) as executor:
                yield executor.submit(measured)
        else:
            finished: Future[list[ComparedLatency]] = Future()
            finished.set_result(measured())
            yield finished

    def _is_decided(self, measured: ComparedLatency) -> bool:
        """Whether a candidate is certainly faster or certainly slower than the current student."""
        low, high = ratio_runs(measured).ratio_interval()
        return not low <= self.state.current.ratio <= high

    def _distill(self, student: Student, steps: int, progress: Progress | None = None) -> Student:
        """Recovery distillation. All candidates of a step see the same data.

        An interrupted distillation continues from its folder when its phase is performed again.
        """
        if not steps:
            return student
        state = self.state
        state.recovery_steps += steps
        spec = fingerprint(student.spec.to_json())[:8]
        folder = self.folder / f"{RECOVERY}{len(state.trials)}-{self._distillations}-{spec}"
        self._distillations += 1
        seed = later_seed(self.config.search.seed, state.step)
        return self.bench.distill(student, steps, seed, progress, folder)

    def _judge(
        self,
        student: Student,
        proposals: Sequence[Proposal],
        latencies: Sequence[ComparedLatency],
        students: Sequence[Student],
        target_ms: float,
    ) -> list[_Candidate]:
        """Score the trained students of the proposals, and correct the latency table by each."""
        state, candidates = self.state, list[_Candidate]()
        for proposal, measured, made in zip(proposals, latencies, students, strict=True):
            left = proposal.shape.blocks_left(state.current.kept)
            cut = proposal.shape.applied_to(student.spec)
            trial = self.meter.trial(
                proposal.kind, made, measured,
                step=state.step, kept=blocks_in_variant(left, self.base, cut, proposal.spec),
                predicted_ms=proposal.predicted_ms, target_ms=target_ms,
            )  # fmt: skip
            if is_same_variant(trial.spec, self.base):
                self._correct_table(trial.spec, trial.median_ms)
            candidates.append(_Candidate(trial, made))
        return candidates

    def _select(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """The acceptable candidate with the highest PSNR whose exported graph is correct.

        If the budget is reached, the two best candidates are trained for extra steps before.
        """
        state, extra_steps = self.state, self.config.search.extra_recovery_steps
        good = acceptable(candidates, state.current)
        others = [_judged(candidate.trial) for candidate in candidates if candidate not in good]
        best, rest = good[:2], good[2:]
        reached = any(each.trial.median_ms <= state.budget_median_ms for each in best)
        if reached and len(best) == 2 and extra_steps:
            best = [self._trained_further(candidate, extra_steps) for candidate in best]
            good = [*_best_first(best), *rest]
        selected = None
        for i, candidate in enumerate(good):
            try:
                self.bench.check(candidate.student)
            except ParityError:
                others.append(replace(candidate.trial, verdict="not exported"))
            else:
                selected = candidate
                others += [_judged(worse.trial) for worse in good[i + 1 :]]
                break
        state.trials += others
        return selected

    def _trained_further(self, candidate: _Candidate, steps: int) -> _Candidate:
        student = self._distill(candidate.student, steps)
        return _Candidate(replace(candidate.trial, psnr_db=self.bench.score(student)), student)

    def _loses_too_much(self, trial: Trial) -> bool:
        max_loss_db = self.config.budget.max_loss_db
        loss_db = self.state.trials[0].psnr_db - trial.psnr_db
        return max_loss_db is not None and loss_db > max_loss_db

    def _keep(self, student: Student, candidate: _Candidate) -> Student:
        """Continue the search from a candidate that was made of `student`."""
        state, trial = self.state, candidate.trial
        state.trials.append(replace(trial, verdict="kept"))
        state.cut = True
        if not is_same_variant(trial.spec, self.base):
            self._enter(variant_like(self.base, student.spec, trial.spec), trial.spec)
            self._measure_table()
            self._correct_table(trial.spec, trial.median_ms)
        state.phase = self._approach_budget()
        return candidate.student

    # --- measurement ------------------------------------------------------------------------------

    @property
    def meter(self) -> LatencyMeter:
        """Measures students relative to the dense student."""
        state = self.state
        return LatencyMeter(
            self.bench,
            self.record,
            self.config.budget.percent,
            state.reference_ms,
            state.reference_median_ms,
        )

    def _verified(
        self,
        kind: str,
        student: Student,
        *,
        before_ms: float | None = None,
        whole_interval: bool = False,
    ) -> Trial:
        """Measure the current student, for up to twice as many rounds as a candidate."""
        state = self.state
        trial = self.meter.verified(
            kind, student,
            step=state.step, kept=state.current.kept,
            predicted_ms=self.table.predict_ms(student.spec), target_ms=state.budget_median_ms,
            budget_ms=state.budget_ms, rounds=2 * self.config.search.rounds,
            before_ms=before_ms, whole_interval=whole_interval,
        )  # fmt: skip
        state.percentile_over_median = trial.latency_ms / trial.median_ms
        return trial

    @property
    def _is_uncut_start(self) -> bool:
        """Whether the current student is the one with which the search started warm."""
        return self.starts_warm and not self.state.cut

    def _why_not_met(self) -> str:
        state, now, dense = self.state, self.state.current, self.state.trials[0]
        return (
            f"the budget of {state.budget_ms:.4g} ms was not met: {state.stopped}; the fastest student "
            f"found takes {now.latency_ms:.2f} ms at {now.psnr_db:.2f} dB, the dense one "
            f"{state.reference_ms:.2f} ms at {dense.psnr_db:.2f} dB; {self._least_latency()}"
        )

    # --- search space and latency table -----------------------------------------------------------

    def _changed_dense(self) -> Student:
        """The dense student with the requested activation, operators, ray stride and tail."""
        student, batches = self.dense, self.bench.batches(self.dense.spec)
        spec = self.config.architecture.converted(student.spec)
        if spec != student.spec:
            original = Original(student, batches)
            everything = Keep.everything(student.spec)
            student = reconstructed(converted(student, spec), original, everything)
        if spec != self.base:
            student = reshaped(student, self.base, self.bench.batches)
        return student

    def _enter(self, base: StudentSpec, entered: StudentSpec | None) -> None:
        """Search students in the architecture variant of `base`, including the widths of
        `entered`."""
        self.state.base, self.state.entered = base, entered
        self.choices = self._choices_of(base)
        if entered is not None:
            self.choices = self.choices.with_those_of(entered)

    def _choices_of(self, base: StudentSpec) -> Choices:
        space = self.config.space
        return Choices.of(
            base,
            multiple=self.bench.width_multiple,
            smallest_share=space.smallest_share,
            streams=space.stream_choices,
            inners=space.inner_choices,
            points=space.point_choices,
        )

    @property
    def base(self) -> StudentSpec:
        """The dense specification in the present architecture variant."""
        assert self.state.base is not None
        return self.state.base

    @property
    def table(self) -> LatencyTable:
        """The latency table of the present architecture variant."""
        assert self.state.table is not None
        return self.state.table

    def _table_of(self, spec: StudentSpec) -> LatencyTable:
        """A latency table of a student's own parts and of blocks as wide as its streams."""
        return build_latency_table(spec, Choices.only(spec), self.record.time_specs)

    def _measure_table(self, *, fresh: bool = False) -> None:
        """Measure the latency table; `fresh` ignores latencies that earlier runs have stored."""
        state = self.state
        state.table = build_latency_table(
            self.base, self.choices, lambda specs: self.record.time_specs(specs, fresh=fresh)
        )
        state.table_trials = len(state.trials)

    def _correct_table(self, spec: StudentSpec, median_ms: float) -> None:
        """Fit the table to one more measured student."""
        self.state.table = self.table.corrected(spec, median_ms)

    def _renew_table(self) -> None:
        """Measure the table again if its predictions have been bad since the last time."""
        state = self.state
        predicted = [t for t in state.trials[state.table_trials :] if t.kind in PROPOSED]
        errors = [abs(trial.predicted_ms / trial.median_ms - 1) for trial in predicted]
        if len(errors) < MIN_PREDICTIONS or statistics.median(errors) <= MAX_TABLE_ERROR:
            return
        self._measure_table(fresh=True)
        for trial in state.trials:
            is_measured_once = trial.kind in ("dense", "start", VARIANT, *PROPOSED)
            if is_measured_once and is_same_variant(trial.spec, self.base):
                self._correct_table(trial.spec, trial.median_ms)

    def _least_latency(self) -> str:
        """The predicted latency of the smallest student, and the part that takes most of it."""
        smallest = fastest(self.base, self.table, self.choices)
        smallest_ms = smallest.predicted_ms * self.state.percentile_over_median
        name, share = self.table.floor_part()
        return (
            f"without residual blocks, at the narrowest widths and with the fewest points, this student "
            f"is still predicted to take {smallest_ms:.2f} ms, {share:.0%} of it in {name}"
        )


def acceptable(candidates: Sequence[_Candidate], now: Trial) -> list[_Candidate]:
    """The candidates that are certainly faster than the current student and met their target.

    If there are none, those that gained at least half of the predicted latency. The highest PSNR
    first.
    """
    faster = [each for each in candidates if each.trial.ratio_high < now.ratio]
    met = [each for each in faster if each.trial.met]
    gained = [
        each
        for each in faster
        if now.median_ms - each.trial.median_ms >= 0.5 * (now.median_ms - each.trial.predicted_ms)
    ]
    return _best_first(met or gained)


def _best_first(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return sorted(candidates, key=lambda each: -each.trial.psnr_db)


def _judged(trial: Trial) -> Trial:
    """The trial of a candidate that was not selected."""
    return replace(trial, verdict="passed over") if trial.met else trial


def _initial_base(dense: StudentSpec, config: PruneConfig, start: Start | None) -> StudentSpec:
    """The specification that a search cuts: that of the start, or the dense one as requested."""
    if start is None:
        return config.architecture.applied_to(dense)
    if start.base is not None:
        return start.base
    spec = start.student.spec
    converted = converted_spec(dense, spec.activation, spec.tail[0].operator)
    return in_variant_of(converted, dense, spec)
