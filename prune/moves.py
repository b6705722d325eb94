"""The moves that a search is made of: begin, step, verify, finish.

Each looks at the state, works, and appends trials to it; between moves a search can be interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightfield.errors import BudgetError, ConfigError
from lightfield.latency import ComparedLatency
from lightfield.progress import Progress
from lightfield.student import Student, mac_count, parameter_count
from prune.evidence import (
    felt,
    measured_until,
    percentile_ratio,
    percentile_ratio_interval,
    steady,
)
from prune.latency_table import LatencyTable, WidthChoices, build_latency_table
from prune.proposals import ChoiceLosses, Proposal, fastest, measure_choices, propose
from prune.search_state import SearchState
from prune.trial import Trial
from prune.workbench import Workbench

Tried = tuple[Trial, Student]


@dataclass(frozen=True)
class PruneConfig:
    """How far and how carefully a student is pruned."""

    budget_ms: float | None = None
    """Latency to reach on the target; by default `budget_ratio` of the dense student's."""
    budget_ratio: float = 0.5
    """Share of the dense latency to reach when no budget is given."""
    percentile: float = 90.0
    """Percentile of the runs that must meet the budget."""
    first_step: float = 0.25
    """Share of the latency that the first step tries to remove."""
    step_decay: float = 0.9
    """Factor on that share from step to step."""
    candidates: int = 3
    """Proposals that are trained and measured per step."""
    rounds: int = 4
    """Times a student is measured at most before it is judged; clear cases take one."""
    tune_steps: int = 150
    """Fine-tuning steps for each candidate."""
    final_tune_steps: int = 2000
    """Fine-tuning steps for the student that met the budget."""
    smallest_share: float = 0.5
    """Stream and tail never get narrower than this share of the dense ones."""
    stream_choices: int = 5
    """Widths to choose from, at most, for the stream and for each tail stage."""
    inner_choices: int = 8
    """Widths to choose from, at most, for each block; the latency table grows with both."""
    margin: float = 0.03
    """How far under the target a proposal is predicted to be."""
    max_loss_db: float | None = None
    """Most that a fine-tuned candidate may lose against the dense student; the search gives the best
    student so far rather than go beyond."""
    max_steps: int = 20
    """Most steps, rolled-back ones included."""
    seed: int = 0
    """Seed of all fine-tuning."""

    def __post_init__(self) -> None:
        if self.budget_ms is not None and not self.budget_ms > 0:
            raise ConfigError(f"a budget of {self.budget_ms} ms", where="prune.budget_ms")
        shares = (self.budget_ratio, self.first_step, self.step_decay, self.smallest_share)
        if not all(0 < share <= 1 for share in shares):
            raise ConfigError("shares must lie in (0, 1]", where="prune")
        if not 0 <= self.margin < 1 or not 0 < self.percentile < 100:
            raise ConfigError("margin lies in [0, 1), percentile in (0, 100)", where="prune")
        if min(self.candidates, self.max_steps, self.rounds) < 1:
            raise ConfigError("candidates, steps and rounds must be at least 1", where="prune")
        if min(self.stream_choices, self.inner_choices) < 2:
            raise ConfigError("a choice of at least 2 widths is needed", where="prune")
        if min(self.tune_steps, self.final_tune_steps) < 0:
            raise ConfigError("a negative number of fine-tuning steps", where="prune")
        if self.max_loss_db is not None and not self.max_loss_db >= 0:
            raise ConfigError(f"a loss of {self.max_loss_db} dB", where="prune.max_loss_db")


class Moves:
    """The moves of one search; what they find out goes into the state."""

    def __init__(self, dense: Student, bench: Workbench, config: PruneConfig, state: SearchState):
        self.dense, self.bench, self.config, self.state = dense, bench, config, state
        self.choices = WidthChoices.of(
            dense.spec,
            multiple=bench.width_multiple,
            smallest_share=config.smallest_share,
            streams=config.stream_choices,
            inners=config.inner_choices,
        )
        self._losses: tuple[Student, ChoiceLosses] | None = None

    def next(self, student: Student, progress: Progress) -> Student:
        """Make the next move; the student to go on with.

        Raises:
            BudgetError: when no move is left.
        """
        state = self.state
        if not state.trials:
            self._begin()
        elif state.verified or state.allowance_spent:
            return self._finish(student, progress)
        elif state.at_goal:
            state.trials.append(self._weighed("verification", student, self.config.rounds))
        elif state.stopped:
            raise BudgetError(
                self._why_not(), remedy="raise the budget, or train a smaller student"
            )
        elif state.step >= self.config.max_steps:
            state.stopped = f"{state.step} steps were not enough"
        else:
            return self._step(student)
        return student

    def _begin(self) -> None:
        """Measure the dense student and the latency table, and refuse a budget below the floor."""
        state, config, bench, dense = self.state, self.config, self.bench, self.dense
        measured = measured_until(
            lambda: bench.measure(dense), lambda _: False, rounds=config.rounds
        )
        turns, _ = felt(measured)
        state.pinned_ms = turns.reference.percentile_ms(config.percentile)
        state.pinned_median_ms = turns.reference.p50_ms
        state.tail = state.pinned_ms / state.pinned_median_ms
        state.budget_ms = config.budget_ms or config.budget_ratio * state.pinned_ms
        state.share = config.first_step
        table = build_latency_table(dense.spec, self.choices, bench.time_specs)
        state.table = table.corrected(dense.spec, state.pinned_median_ms)
        smallest = fastest(dense.spec, state.table, self.choices)
        if smallest.predicted_ms > state.goal_ms:
            raise BudgetError(
                f"a budget of {state.budget_ms:.2f} ms is out of reach: {self._floor()}, "
                f"and the dense student takes {state.pinned_ms:.2f} ms",
                where=measured.candidate.device.name,
                remedy="raise the budget, lower smallest_share, or train a smaller student",
            )
        trial = self._trial("dense", dense, measured, state.pinned_median_ms, state.goal_ms)
        # Both sides are the same graph: what they differ by is noise.
        latencies = {"median_ms": state.pinned_median_ms, "latency_ms": state.pinned_ms}
        state.trials.append(replace(trial, **latencies, verdict="dense"))

    def _step(self, student: Student) -> Student:
        """Propose, tune and measure; keep the best candidate, or roll back and aim nearer."""
        state, config = self.state, self.config
        state.step += 1
        now, target_ms = state.current, state.next_target_ms()
        nearer = 0.5 * (1 - target_ms / now.median_ms)
        tried = [self._try(student, p, target_ms) for p in self._proposals(student, target_ms)]
        state.share *= config.step_decay
        chosen = best_of(tried, now)
        state.trials += [
            replace(trial, verdict="passed over") if trial.met else trial
            for trial, candidate in tried
            if candidate is not chosen
        ]
        if chosen is None:
            reason = "no gain that was predicted could be measured" if tried else "nothing is left"
            state.shorten(nearer, reason)
            return student
        trial = next(trial for trial, candidate in tried if candidate is chosen)
        allowance = config.max_loss_db
        if allowance is not None and state.trials[0].psnr_db - trial.psnr_db > allowance:
            state.trials.append(replace(trial, verdict="rolled back"))
            state.shorten(nearer, f"the next step would lose more than {allowance:g} dB")
            state.allowance_spent = bool(state.stopped)
            return student
        state.trials.append(replace(trial, verdict="kept"))
        return chosen

    def _proposals(self, student: Student, target_ms: float) -> list[Proposal]:
        """What has not been tried yet; when nothing is predicted to reach the target, the fastest
        student that there can be."""
        losses, spec, count = self._losses_of(student), student.spec, self.config.candidates
        aims_ms = (target_ms * (1 - self.config.margin), target_ms)
        found = [propose(spec, losses, self._table, aim_ms, count=count) for aim_ms in aims_ms]
        proposals = found[0] or found[1] or [fastest(spec, self._table, self.choices)]
        tried = {spec, *self.state.tried()}
        return [proposal for proposal in proposals if proposal.spec not in tried]

    def _try(self, student: Student, proposal: Proposal, target_ms: float) -> Tried:
        """Train and measure a proposal, and correct the table by it."""
        bench, state = self.bench, self.state
        candidate = self._losses_of(student).slimmed(student, proposal.shape)
        bench.recalibrate(candidate)
        candidate = self._tuned(candidate, self.config.tune_steps, None)

        def decided(measured: ComparedLatency) -> bool:
            low, high = steady(measured).ratio_interval()
            return not low <= state.current.ratio <= high

        measured = measured_until(
            lambda: bench.measure(candidate), decided, rounds=self.config.rounds
        )
        trial = self._trial(proposal.kind, candidate, measured, proposal.predicted_ms, target_ms)
        state.table = self._table.corrected(candidate.spec, trial.median_ms)
        return trial, candidate

    def _weighed(self, kind: str, student: Student, rounds: int) -> Trial:
        """Measure a student until it is clear whether it meets the budget, and judge it."""
        state, percentile = self.state, self.config.percentile

        def decided(measured: ComparedLatency) -> bool:
            turns, clock = felt(measured)
            low, high = percentile_ratio_interval(turns, percentile)
            return clock != "processor" and not low <= state.budget_ms / state.pinned_ms <= high

        measured = measured_until(lambda: self.bench.measure(student), decided, rounds=rounds)
        predicted_ms = self._table.predict_ms(student.spec)
        trial = self._trial(kind, student, measured, predicted_ms, state.goal_ms)
        state.tail = trial.latency_ms / trial.median_ms
        within = trial.latency_ms <= state.budget_ms
        return replace(trial, verdict="within budget" if within else "over budget")

    def _finish(self, student: Student, progress: Progress) -> Student:
        """The long fine-tuning, and the last measurement."""
        state = self.state
        pruned = student.spec != self.dense.spec
        tuned = self._tuned(student, self.config.final_tune_steps if pruned else 0, progress)
        # A miss would cost another long fine-tuning: measure twice as long before believing it.
        trial = self._weighed("final", tuned, 2 * self.config.rounds)
        if trial.verdict == "within budget" or state.allowance_spent:
            trial = replace(trial, verdict="final")
        state.trials.append(trial)
        return tuned

    def _tuned(self, student: Student, steps: int, progress: Progress | None) -> Student:
        """All candidates of a step see the same data."""
        seed = self.config.seed + self.state.step
        return self.bench.tune(student, steps, seed, progress) if steps else student

    def _trial(
        self,
        kind: str,
        student: Student,
        measured: ComparedLatency,
        predicted_ms: float,
        target_ms: float,
    ) -> Trial:
        """What was measured, as a trial that has yet to be judged."""
        state, by_ratio = self.state, steady(measured)
        turns, clock = felt(measured)
        low, high = by_ratio.ratio_interval()
        return Trial(
            step=state.step,
            kind=kind,
            spec=student.spec,
            target_ms=target_ms,
            predicted_ms=predicted_ms,
            median_ms=by_ratio.ratio * state.pinned_median_ms,
            latency_ms=percentile_ratio(turns, self.config.percentile) * state.pinned_ms,
            clock=clock,
            ratio=by_ratio.ratio,
            ratio_low=low,
            ratio_high=high,
            turns=len(turns.candidate.samples_ms),
            psnr_db=self.bench.score(student),
            parameters=parameter_count(student),
            macs=mac_count(student.spec, *self.bench.batches[0][0].shape[-2:]),
            verdict="missed",
        )

    def _losses_of(self, student: Student) -> ChoiceLosses:
        if self._losses is None or self._losses[0] is not student:
            losses = measure_choices(student, self.bench.batches, self.choices)
            self._losses = (student, losses)
        return self._losses[1]

    @property
    def _table(self) -> LatencyTable:
        assert self.state.table is not None
        return self.state.table

    def _floor(self) -> str:
        """The least latency there can be, and the part that holds most of it."""
        smallest = fastest(self.dense.spec, self._table, self.choices)
        name, share = self._table.floor_part()
        return (
            f"without residual blocks, at the narrowest widths, this student is still predicted to take "
            f"{smallest.predicted_ms * self.state.tail:.2f} ms, {share:.0%} of it in {name}"
        )

    def _why_not(self) -> str:
        state, now, dense = self.state, self.state.current, self.state.trials[0]
        return (
            f"the budget of {state.budget_ms:.2f} ms was not met: {state.stopped}; the fastest student "
            f"kept takes {now.latency_ms:.2f} ms at {now.psnr_db:.2f} dB, the dense one "
            f"{state.pinned_ms:.2f} ms at {dense.psnr_db:.2f} dB; {self._floor()}"
        )


def best_of(tried: Sequence[Tried], now: Trial) -> Student | None:
    """The best picture among the candidates that are surely faster than the current student and met
    their target; failing that, among those that gained at least half of what was predicted."""
    faster = [pair for pair in tried if pair[0].ratio_high < now.ratio]
    met = [pair for pair in faster if pair[0].met]
    gained = [
        pair
        for pair in faster
        if now.median_ms - pair[0].median_ms >= 0.5 * (now.median_ms - pair[0].predicted_ms)
    ]
    best = max(met or gained, key=lambda pair: pair[0].psnr_db, default=None)
    return None if best is None else best[1]
