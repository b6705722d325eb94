"""The pruning search: trade-offs, predictions, and the network before and after."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from markupsafe import Markup

from lightfield.errors import CheckpointError
from lightfield.student import StudentSpec
from pipeline.report.charts import network_chart, pareto_chart, prediction_chart
from pipeline.report.quantities import finite, fixed
from pipeline.report.run_data import RunData, Unavailable, available
from prune.measurement import Trial
from prune.proposals import VARIANT

NOT_PROPOSED = ("dense", "within budget", "over budget", "final")
"""Verdicts of measurements without a prediction."""
CLOCKS = {
    "wall": "all runs",
    "undisturbed": "undisturbed runs",
    "cpu": "CPU time, because the machine was too busy for undisturbed runs",
}
"""What a latency of the search is a percentile of (see `prune.measurement`)."""


@dataclass(frozen=True)
class Chart:
    """A chart of `count` trials; `error` is the median relative error of their predictions."""

    svg: Markup
    count: int
    error: float = 0.0


@dataclass(frozen=True)
class Network:
    """The dense and the pruned network; `reshaped` when the search changed the architecture."""

    chart: Markup
    dense: StudentSpec
    pruned: StudentSpec
    reshaped: bool


@dataclass(frozen=True)
class History:
    """The trials of the search and what they show."""

    trials: list[Trial]
    stopped: str
    """Why the search stopped early; empty when it did not."""
    one_shot: bool
    """Whether the search began with one-shot candidates."""
    verified: bool
    """Whether the final latency is the mean of two measurements."""
    trade_offs: Chart | Unavailable
    predictions: Chart | Unavailable


def history_of(run: RunData) -> History:
    """The search, from the dense student to the result.

    Raises:
        CheckpointError: when its record is missing or incompatible.
    """
    trials, stopped = run.search()
    return History(
        trials=trials,
        stopped=stopped,
        one_shot=any(trial.kind == VARIANT for trial in trials),
        verified=[trial.verdict for trial in trials[-2:]] == ["within budget", "final"],
        trade_offs=available(lambda: _trade_offs(trials, _budgets_ms(run))),
        predictions=available(lambda: _predictions(trials)),
    )


def _trade_offs(trials: list[Trial], budgets_ms: list[float]) -> Chart:
    drawn = [t for t in trials if None not in (finite(t.latency_ms), finite(t.psnr_db))]
    if not drawn:
        raise CheckpointError("no student of the history has both a latency and a quality")
    return Chart(pareto_chart(drawn, budgets_ms), len(drawn))


def _predictions(trials: list[Trial]) -> Chart:
    drawn = [t for t in trials if finite(t.predicted_ms) is not None and finite(t.median_ms)]
    drawn = [t for t in drawn if t.verdict not in NOT_PROPOSED]
    if not drawn:
        raise CheckpointError("no proposal was measured, so there is no prediction to judge")
    error = statistics.median(abs(t.predicted_ms / t.median_ms - 1) for t in drawn)
    return Chart(prediction_chart(drawn), len(drawn), error)


def _budget_setting(run: RunData, name: str) -> object:
    settings = run.require("prune").manifest["config"].get("prune")
    budget = settings.get("budget") if isinstance(settings, dict) else None
    return budget.get(name) if isinstance(budget, dict) else None


def _budgets_ms(run: RunData) -> list[float]:
    """All latency budgets: several when they were given as ratios."""
    ratios = _budget_setting(run, "budget_ratio")
    dense_ms, last_ms = (finite(run.metric("prune", name)) for name in ("dense_ms", "budget_ms"))
    known = [r for r in map(finite, ratios) if r is not None] if isinstance(ratios, list) else []
    if known and dense_ms is not None:
        return [ratio * dense_ms for ratio in known]
    return [] if last_ms is None else [last_ms]


def budget_percentile(run: RunData) -> str:
    """The name of the percentile that the budget applies to."""
    value = finite(_budget_setting(run, "percentile")) if "prune" in run.artifacts else None
    return "percentile" if value is None else f"{fixed(value, 0)}th percentile"


def network_of(run: RunData) -> Network:
    """The network before and after pruning.

    Raises:
        NelfError: when a specification is missing, or one network is not part of the other.
    """
    dense, pruned = run.spec("student"), run.spec("prune")
    base = run.detail("prune", "base_spec")
    before = StudentSpec.from_json(base) if isinstance(base, dict) else dense
    kept = run.detail("prune", "kept_blocks")
    if not isinstance(kept, list) or not all(isinstance(blocks, list) for blocks in kept):
        kept = [list(range(len(inner))) for inner in _inner_widths(pruned)]
    if not _is_part_of(pruned, before, kept):
        raise CheckpointError("the pruned network is not part of the present student")
    return Network(network_chart(before, pruned, kept), dense, pruned, before != dense)


def _is_part_of(pruned: StudentSpec, dense: StudentSpec, kept: list[list[int]]) -> bool:
    """Whether removing all blocks but the kept ones can lead from one network to the other."""
    before, after = _inner_widths(dense), _inner_widths(pruned)
    return len(before) == len(after) == len(kept) and all(
        len(blocks) == len(left) and set(blocks) <= set(range(len(full)))
        for full, left, blocks in zip(before, after, kept, strict=True)
    )


def _inner_widths(spec: StudentSpec) -> list[tuple[int, ...]]:
    return [spec.inner_widths, *(stage.inner_widths for stage in spec.tail)]
