"""The search: smaller and smaller students until the measured latency meets the budget.

Each step (after NetAdapt, Yang et al. 2018) aims at the next latency on the way to the budget, takes
several proposals that are predicted to reach it, fine-tunes each for a moment, exports and measures
it on the target in turns with the pinned dense student, and keeps the best that really got there.
A step that gains less than half of what was predicted is rolled back, and the latency model corrected
by what was measured. Everything measured is recorded; the record replays the search without a device.

Latencies are drift-free: a candidate's percentile, times the pinned reference's over the reference's
in the same turns. The search knows neither exporter, device nor trainer: they come in as `Workbench`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightfield.errors import BudgetError, CheckpointError, ConfigError
from lightfield.files import read_json, write_json
from lightfield.latency import ComparedLatency, evidence
from lightfield.progress import Progress
from lightfield.run import load_into, load_weights, save_weights
from lightfield.student import Student, StudentSpec, parameter_count
from prune.importance import Batch
from prune.latency_table import LatencyTable, TimeSpecs, WidthChoices, build_latency_table
from prune.proposals import Proposal, measure_choices, propose, smallest_spec
from prune.slimming import slimmed

STATE, STATE_WEIGHTS = "search.json", "search.safetensors"


@dataclass(frozen=True)
class PruneConfig:
    """How far and how carefully a student is pruned."""

    budget_ms: float | None = None
    """Latency to reach on the target; by default `budget_ratio` of the dense student's."""
    budget_ratio: float = 0.5
    """Share of the dense latency to reach when no budget is given."""
    percentile: float = 90.0
    """Percentile of the samples that must meet the budget."""
    first_step: float = 0.25
    """Share of the latency that the first step tries to remove."""
    step_decay: float = 0.9
    """Factor on that share from step to step."""
    candidates: int = 3
    """Proposals that are trained and measured per step."""
    tune_steps: int = 150
    """Fine-tuning steps for each candidate."""
    final_tune_steps: int = 2000
    """Fine-tuning steps for the student that met the budget."""
    smallest_share: float = 0.5
    """Stream and tail never get narrower than this share of the dense ones."""
    margin: float = 0.03
    """How far under the target a proposal is predicted to be."""
    max_loss_db: float | None = None
    """Stop before a step that would lose more than this against the dense student."""
    max_steps: int = 20
    """Most steps, rolled-back ones included."""
    seed: int = 0
    """Seed of all fine-tuning."""

    def __post_init__(self) -> None:
        if self.budget_ms is not None and self.budget_ms <= 0:
            raise ConfigError(f"a budget of {self.budget_ms} ms", where="prune.budget_ms")
        shares = (self.budget_ratio, self.first_step, self.step_decay, self.smallest_share)
        if not all(0 < share <= 1 for share in shares):
            raise ConfigError("shares must lie in (0, 1]", where="prune")
        if min(self.candidates, self.max_steps) < 1:
            raise ConfigError("at least one candidate and one step are needed", where="prune")


class Tune(Protocol):
    """Trains a student further and returns it in evaluation mode."""

    def __call__(  # noqa: D102
        self, student: Student, steps: int, seed: int, progress: Progress | None
    ) -> Student: ...


@dataclass(frozen=True)
class Workbench:
    """What the search works with; `pipeline` builds it from train, export and device."""

    measure: Callable[[Student], ComparedLatency]
    """Export, check, and measure a student in turns with the pinned dense one."""
    time_specs: TimeSpecs
    tune: Tune
    recalibrate: Callable[[Student], None]
    """Renew batch-norm statistics in place."""
    score: Callable[[Student], float]
    """Held-out PSNR in dB."""
    batches: Sequence[Batch]
    """Held-out inputs and pictures for measuring importance."""
    width_multiple: int
    """Widths are rounded to multiples of this."""


@dataclass(frozen=True)
class Trial:
    """One student that was trained and measured."""

    step: int
    kind: str
    spec: dict[str, Any]
    predicted_ms: float
    latency_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    psnr_db: float
    parameters: int
    target_ms: float
    verdict: str = ""
    """`dense`, `kept`, `not chosen`, `missed`, `rolled back`, or `final`."""


@dataclass
class SearchState:
    """Everything a search needs to go on; JSON beside the current student's weights."""

    trials: list[Trial] = field(default_factory=list)
    pinned_ms: float = 0.0
    budget_ms: float = 0.0
    latency_ms: float = 0.0
    share: float = 0.0
    step: int = 0
    table: LatencyTable | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = dict(vars(self))
        data["trials"] = [asdict(trial) for trial in self.trials]
        data["table"] = None if self.table is None else self.table.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SearchState:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: when it is not a search's state.
        """
        try:
            trials = [Trial(**trial) for trial in data["trials"]]
            table = None if data["table"] is None else LatencyTable.from_json(data["table"])
            return cls(**{**data, "trials": trials, "table": table})
        except (KeyError, TypeError, ValueError) as reason:
            raise CheckpointError(f"not the state of a search ({reason})") from reason


@dataclass(frozen=True)
class SearchResult:
    """The student that met the budget, and how it was found."""

    student: Student
    state: SearchState

    @property
    def dense(self) -> Trial:
        """The student that came in."""
        return self.state.trials[0]

    @property
    def final(self) -> Trial:
        """The student that came out."""
        return self.state.trials[-1]


def search(
    dense: Student,
    bench: Workbench,
    config: PruneConfig,
    *,
    folder: Path,
    progress: Progress,
    log: Callable[..., None],
) -> SearchResult:
    """Prune `dense` until its measured latency meets the budget.

    Goes on from the state in `folder` after an interruption.

    Raises:
        BudgetError: when the budget is out of reach, naming the fastest student found and what holds
            the floor; or when the target's latencies are no evidence.
    """
    choices = WidthChoices.of(
        dense.spec, multiple=bench.width_multiple, smallest_share=config.smallest_share
    )
    state, student = _resume(dense, folder)
    if state.table is None:
        _begin(dense, bench, config, choices, state)
        _save(state, student, folder)
    total = config.max_steps
    while state.latency_ms > state.budget_ms and not state.stopped:
        if state.step >= total:
            state.stopped = f"no student met the budget in {total} steps"
            break
        student = _step(student, bench, config, choices, state)
        _save(state, student, folder)
        last = state.trials[-1]
        log(step=state.step, latency_ms=state.latency_ms, psnr_db=last.psnr_db)
        progress(
            _percent_of_way(state),
            100,
            ms=state.latency_ms,
            budget_ms=state.budget_ms,
            db=last.psnr_db,
        )
    if state.latency_ms > state.budget_ms and not state.stopped.startswith("quality"):
        raise BudgetError(_why_not(state, student.spec))
    return _finish(student, bench, config, state, folder, progress)


def latency_ms(measured: ComparedLatency, pinned_ms: float, percentile: float) -> float:
    """A candidate's percentile with the drift between now and the pinned reference taken out."""
    candidate = evidence(measured.candidate).percentile_ms(percentile)
    return candidate * pinned_ms / evidence(measured.reference).percentile_ms(percentile)


def _begin(
    dense: Student,
    bench: Workbench,
    config: PruneConfig,
    choices: WidthChoices,
    state: SearchState,
) -> None:
    """Measure the dense student and the latency table, and refuse a budget below the floor."""
    measured = bench.measure(dense)
    state.pinned_ms = evidence(measured.reference).percentile_ms(config.percentile)
    state.latency_ms = state.pinned_ms
    state.budget_ms = config.budget_ms or config.budget_ratio * state.pinned_ms
    state.share = config.first_step
    table = build_latency_table(dense.spec, choices, bench.time_specs)
    state.table = table.corrected(dense.spec, state.pinned_ms)
    state.trials.append(
        _trial(
            state,
            "dense",
            dense,
            state.pinned_ms,
            measured,
            bench.score(dense),
            state.pinned_ms,
            config,
        )
    )
    state.trials[0] = _judged(state.trials[0], "dense")
    smallest = smallest_spec(dense.spec, choices)
    floor = state.table.predict_ms(smallest)
    if floor > state.budget_ms:
        raise BudgetError(
            f"a budget of {state.budget_ms:.2f} ms is out of reach: head, up-sampling and colour alone "
            f"take {floor:.2f} ms at the narrowest widths (the dense student takes "
            f"{state.pinned_ms:.2f} ms)",
            where=measured.candidate.device.name,
            remedy="raise the budget, lower smallest_share, or train a smaller student",
        )


def _step(
    student: Student,
    bench: Workbench,
    config: PruneConfig,
    choices: WidthChoices,
    state: SearchState,
) -> Student:
    """One step: propose, tune, measure, keep or roll back."""
    assert state.table is not None
    state.step += 1
    target = max(state.budget_ms, state.latency_ms * (1 - state.share))
    losses = measure_choices(student, bench.batches, choices)
    aim = target * (1 - config.margin)
    proposals = propose(student, losses, state.table, aim, count=config.candidates)
    if not proposals:
        state.stopped = f"no proposal reaches {target:.2f} ms"
        return student
    tried: list[tuple[Trial, Student]] = []
    for proposal in proposals:
        candidate = slimmed(student, proposal.keep, losses.ranking.mean_hidden)
        bench.recalibrate(candidate)
        candidate = bench.tune(candidate, config.tune_steps, config.seed + state.step, None)
        tried.append(_measured(candidate, proposal, bench, config, state, target))
    for trial, _ in tried:
        spec = StudentSpec.from_json(trial.spec)
        state.table = state.table.corrected(spec, trial.latency_ms)
    chosen = _chosen(tried, state)
    for trial, _ in tried:
        verdict = "kept" if chosen is not None and trial is chosen[0] else _why_passed_over(trial)
        state.trials.append(_judged(trial, verdict))
    state.share *= config.step_decay
    if chosen is None:
        state.share *= 0.5
        return student
    trial, candidate = chosen
    allowance = config.max_loss_db
    if allowance is not None and state.trials[0].psnr_db - trial.psnr_db > allowance:
        state.trials[state.trials.index(_judged(trial, "kept"))] = _judged(trial, "rolled back")
        state.share *= 0.5
        if state.share < 0.02:
            state.stopped = f"quality: the next step loses more than {allowance:g} dB"
        return student
    state.latency_ms = trial.latency_ms
    state.spec = candidate.spec.to_json()
    return candidate


def _measured(
    candidate: Student,
    proposal: Proposal,
    bench: Workbench,
    config: PruneConfig,
    state: SearchState,
    target_ms: float,
) -> tuple[Trial, Student]:
    measured = bench.measure(candidate)
    score = bench.score(candidate)
    predicted = proposal.predicted_ms
    trial = _trial(state, proposal.kind, candidate, predicted, measured, score, target_ms, config)
    return trial, candidate


def _trial(
    state: SearchState,
    kind: str,
    student: Student,
    predicted_ms: float,
    measured: ComparedLatency,
    psnr_db: float,
    target_ms: float,
    config: PruneConfig,
) -> Trial:
    low, high = measured.ratio_interval()
    return Trial(
        step=state.step,
        kind=kind,
        spec=student.spec.to_json(),
        predicted_ms=predicted_ms,
        latency_ms=latency_ms(measured, state.pinned_ms, config.percentile),
        ratio=measured.ratio,
        ratio_low=low,
        ratio_high=high,
        psnr_db=psnr_db,
        parameters=parameter_count(student),
        target_ms=target_ms,
    )


def _chosen(
    tried: Sequence[tuple[Trial, Student]], state: SearchState
) -> tuple[Trial, Student] | None:
    """The best score among those that met the target; else the best that gained enough, if any."""
    met = [pair for pair in tried if pair[0].latency_ms <= pair[0].target_ms]
    if met:
        return max(met, key=lambda pair: pair[0].psnr_db)
    gained = [pair for pair in tried if _gained_enough(pair[0], state)]
    return max(gained, key=lambda pair: pair[0].psnr_db, default=None)


def _gained_enough(trial: Trial, state: SearchState) -> bool:
    """At least half of the predicted gain, and clearly faster than what it came from."""
    gain, expected = state.latency_ms - trial.latency_ms, state.latency_ms - trial.predicted_ms
    return gain >= 0.5 * expected and trial.ratio_high < state.latency_ms / state.pinned_ms


def _why_passed_over(trial: Trial) -> str:
    return "not chosen" if trial.latency_ms <= trial.target_ms else "missed"


def _judged(trial: Trial, verdict: str) -> Trial:
    return Trial(**{**asdict(trial), "verdict": verdict})


def _finish(
    student: Student,
    bench: Workbench,
    config: PruneConfig,
    state: SearchState,
    folder: Path,
    progress: Progress,
) -> SearchResult:
    """The long fine-tuning, and the last measurement; tuning does not change the latency."""
    tuned = bench.tune(student, config.final_tune_steps, config.seed, progress)
    measured = bench.measure(tuned)
    predicted = state.table.predict_ms(tuned.spec) if state.table is not None else 0.0
    trial = _trial(
        state, "final", tuned, predicted, measured, bench.score(tuned), state.budget_ms, config
    )
    state.trials.append(_judged(trial, "final"))
    state.latency_ms = trial.latency_ms
    return SearchResult(tuned, state)


def _percent_of_way(state: SearchState) -> int:
    whole = state.pinned_ms - state.budget_ms
    gone = state.pinned_ms - state.latency_ms
    return max(0, min(100, round(100 * gone / whole))) if whole > 0 else 100


def _why_not(state: SearchState, spec: StudentSpec) -> str:
    assert state.table is not None
    blocks = len(spec.inner_widths) + sum(len(stage.inner_widths) for stage in spec.tail)
    base = state.table.base_ms[spec.stream_width, tuple(stage.width for stage in spec.tail)]
    return (
        f"the budget of {state.budget_ms:.2f} ms was not met: {state.stopped}; the fastest student "
        f"found takes {state.latency_ms:.2f} ms (dense {state.pinned_ms:.2f} ms), {base:.2f} ms of it outside "
        f"its {blocks} residual blocks; raise the budget or train a smaller student"
    )


def _save(state: SearchState, student: Student, folder: Path) -> None:
    """Weights first: a state never points at weights that are not there."""
    state.spec = student.spec.to_json()
    name = f"{state.step}.{STATE_WEIGHTS}"
    save_weights(folder / name, student.state_dict())
    write_json(folder / STATE, state.to_json())
    for stale in folder.glob(f"*.{STATE_WEIGHTS}"):
        if stale.name != name:
            stale.unlink()


def _resume(dense: Student, folder: Path) -> tuple[SearchState, Student]:
    path = folder / STATE
    if not path.exists():
        return SearchState(spec=dense.spec.to_json()), dense
    state = SearchState.from_json(read_json(path, CheckpointError))
    student = Student(StudentSpec.from_json(state.spec))
    weights = folder / f"{state.step}.{STATE_WEIGHTS}"
    load_into(student, load_weights(weights), where=weights)
    return state, student.to(dense.head.weight.device).eval()
