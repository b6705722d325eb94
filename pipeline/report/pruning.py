"""How the student was pruned: trade-offs, predictions, the network before and after, the history."""

from __future__ import annotations

import statistics

from lightfield.errors import CheckpointError
from lightfield.student import StudentSpec
from pipeline.report.chain import Chain, Trial
from pipeline.report.charts import network_chart, pareto_chart, prediction_chart
from pipeline.report.layout import (
    facts,
    figure,
    folded,
    or_reason,
    outdated,
    section,
    side_by_side,
    table,
    unavailable,
)
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import (
    DOES_NOT_APPLY,
    decibels,
    finite,
    fixed,
    interval,
    large,
    milliseconds,
    plural,
    share,
    whole,
)
from pipeline.report.summary import RUNS_OF_CLOCK, device_name, final_trial, percentile_name
from prune.proposals import VARIANT

VERDICT_MEANINGS = {
    "dense": "the student before pruning",
    "kept": "the search went on from it",
    "passed over": "fast enough, but not the one taken",
    "missed": "not fast enough when measured",
    "rolled back": "lost too much quality",
    "within budget": "measured for longer and fast enough",
    "over budget": "measured for longer and not surely fast enough",
    "final": "the result, after its long fine-tuning",
}
NOT_PROPOSED = ("dense", "within budget", "over budget", "final")
"""Verdicts of measurements that no prediction came before."""


OTHER_FORM = (
    " The search went over to rays further apart or a shorter tail; the outline is the dense network in "
    "that form."
)
RACE = (
    "First, students in other forms raced against cuts, all made for the whole way to the budget; "
    "unless a form won, steps followed. "
)
CLOCK_MARKS = {"undisturbed": "\u2009*", "cpu": "\u2009†"}


def pruning_section(chain: Chain) -> Html:
    """The search from the dense student to the budget."""
    return section("pruning", "Pruning", or_reason(lambda: _content(chain)))


def _content(chain: Chain) -> Html:
    chain.require("prune")
    if chain.emulated("prune"):
        return fragment(
            unavailable("the latencies are an emulated device's and mean nothing"), _network(chain)
        )
    return fragment(
        outdated(chain.outdated("prune")),
        _introduction(chain),
        or_reason(lambda: _outcome(chain)),
        side_by_side(or_reason(lambda: _trade_offs(chain)), or_reason(lambda: _predictions(chain))),
        _network(chain),
        or_reason(lambda: _history(chain.trials())),
    )


def _introduction(chain: Chain) -> Html:
    device = chain.device("prune")
    where = f"on {device_name(device)}" if device else "on a device the record does not name"
    raced = any(trial.kind == VARIANT for trial in chain.trials())
    return element(
        "p",
        (RACE if raced else "")
        + "The search proposes smaller networks that should meet the next latency, fine-tunes and "
        f"exports each, measures it {where}, and keeps the best that really got there. Every "
        "measurement takes turns with the dense student, so that a device that slows down slows both. "
        f"Steps go by the median; the budget is held against the {percentile_name(chain)} of the runs.",
    )


def _outcome(chain: Chain) -> Html:
    """What came of it, in a sentence, with the clock that was read."""
    final = final_trial(chain)
    if final is None:
        return unavailable("the search has no final measurement")
    budget_ms = chain.metric("prune", "budget_ms")
    clock = RUNS_OF_CLOCK.get(final.clock, final.clock)
    stopped = chain.search_state().get("stopped")
    ending = f" The search stopped early: {stopped}." if stopped else ""
    twice = [trial.verdict for trial in chain.trials()[-2:]] == ["within budget", "final"]
    mean = (
        ", as the mean of the measurements before and after its last fine-tuning" if twice else ""
    )
    return element(
        "p",
        f"Result: {milliseconds(final.latency_ms)} with a budget of {milliseconds(budget_ms)}, the "
        f"{percentile_name(chain)} of {clock}{mean}. That is {share(final.ratio)} of the dense student "
        f"by the median, 95% interval {interval(final.ratio_low, final.ratio_high)} over "
        f"{plural(final.runs, 'run')}.{ending}",
    )


def _trade_offs(chain: Chain) -> Html:
    trials = [t for t in chain.trials() if t.latency_ms is not None and t.psnr_db is not None]
    if not trials:
        return unavailable("no student of the history has both a latency and a quality")
    chart = pareto_chart(trials, _budgets_ms(chain))
    return figure(
        chart,
        f"{plural(len(trials), 'measurement')} of exported students. Up is better, left is faster. "
        "Candidates are scored after a short fine-tuning, the final one after a long one.",
    )


def _budgets_ms(chain: Chain) -> list[float]:
    """The latencies that were to be reached: several when they were given as shares."""
    asked = chain.require("prune").manifest["config"].get("prune")
    budget = asked.get("budget") if isinstance(asked, dict) else None
    ratios = budget.get("budget_ratio") if isinstance(budget, dict) else None
    dense_ms, last_ms = (finite(chain.metric("prune", name)) for name in ("dense_ms", "budget_ms"))
    if isinstance(ratios, list) and dense_ms is not None:
        found = [ratio * dense_ms for ratio in map(finite, ratios) if ratio is not None]
        if found:
            return found
    return [] if last_ms is None else [last_ms]


def _predictions(chain: Chain) -> Html:
    trials = [
        trial
        for trial in chain.trials()
        if trial.predicted_ms is not None and trial.median_ms and trial.verdict not in NOT_PROPOSED
    ]
    if not trials:
        return unavailable("no proposal was measured, so there is no prediction to judge")
    errors = [abs((t.predicted_ms or 0) / (t.median_ms or 1) - 1) for t in trials]
    return figure(
        prediction_chart(trials),
        "Latency that the table of measured parts predicted, and what the device then said, of "
        f"{plural(len(trials), 'proposal')}. Median error {fixed(100 * statistics.median(errors), 1)}%.",
    )


def _network(chain: Chain) -> Html:
    def build() -> Html:
        dense, pruned = chain.spec("student"), chain.spec("prune")
        kept = _kept_blocks(chain, pruned)
        searched = _searched(chain, dense)
        if not _is_part_of(pruned, searched, kept):
            raise CheckpointError("the pruned network is no part of the present student")
        image = figure(
            network_chart(searched, pruned, kept),
            "The network block by block: inner widths as bars, stream widths as lines. Blocks that are "
            "outline only were dropped." + (OTHER_FORM if searched != dense else ""),
        )
        rows = [
            [name, before, after]
            for (name, before), (_, after) in zip(
                _shape(chain, "student", dense), _shape(chain, "prune", pruned), strict=True
            )
        ]
        return side_by_side(image, table(["", "dense", "pruned"], rows, caption="In numbers."))

    return or_reason(build)


def _searched(chain: Chain, dense: StudentSpec) -> StudentSpec:
    """The dense network in the form of the pruned one; older runs had one form."""
    found = chain.detail("prune", "base_spec")
    return StudentSpec.from_json(found) if isinstance(found, dict) else dense


def _kept_blocks(chain: Chain, pruned: StudentSpec) -> list[list[int]]:
    """Which of the dense student's blocks the pruned one has; the first ones where none are named."""
    kept = chain.detail("prune", "kept_blocks")
    if isinstance(kept, list) and all(isinstance(blocks, list) for blocks in kept):
        return kept
    return [list(range(len(inner))) for inner in _inner_widths(pruned)]


def _is_part_of(pruned: StudentSpec, dense: StudentSpec, kept: list[list[int]]) -> bool:
    """Whether dropping all blocks but the kept ones can lead from one network to the other."""
    before, after = _inner_widths(dense), _inner_widths(pruned)
    return len(before) == len(after) == len(kept) and all(
        len(blocks) == len(left) and set(blocks) <= set(range(len(full)))
        for full, left, blocks in zip(before, after, kept, strict=True)
    )


def _inner_widths(spec: StudentSpec) -> list[tuple[int, ...]]:
    return [spec.inner_widths, *(stage.inner_widths for stage in spec.tail)]


def _shape(chain: Chain, stage: str, spec: StudentSpec) -> list[tuple[str, str]]:
    tail = [stage.inner_widths for stage in spec.tail]
    return [
        ("Points per ray, octaves", f"{spec.points}, {spec.frequencies}"),
        ("Body blocks", whole(len(spec.inner_widths))),
        ("Body stream width", whole(spec.stream_width)),
        ("Body inner channels, all blocks", whole(sum(spec.inner_widths))),
        ("Tail blocks", whole(sum(len(inner) for inner in tail))),
        ("Tail widths", ", ".join(whole(stage.width) for stage in spec.tail)),
        ("Tail inner channels, all blocks", whole(sum(sum(inner) for inner in tail))),
        ("Parameters", whole(chain.metric(stage, "parameters"))),
        ("MACs an image", large(chain.metric(stage, "macs"))),
    ]


def _history(trials: list[Trial]) -> Html:
    head = [
        "step", "verdict", "kind", "aim", "predicted", "median", "percentile", "of dense",
        "95% interval", "runs", "PSNR", "parameters",
    ]  # fmt: skip
    rows = [
        [
            whole(trial.step),
            element("span", trial.verdict, class_=f"verdict {_css_name(trial.verdict)}"),
            trial.kind,
            milliseconds(trial.target_ms),
            DOES_NOT_APPLY if trial.verdict == "dense" else milliseconds(trial.predicted_ms),
            milliseconds(trial.median_ms),
            milliseconds(trial.latency_ms) + CLOCK_MARKS.get(trial.clock, ""),
            share(trial.ratio),
            interval(trial.ratio_low, trial.ratio_high),
            whole(trial.runs),
            decibels(trial.psnr_db),
            whole(trial.parameters),
        ]
        for trial in trials
    ]
    seen = {trial.verdict for trial in trials}
    meanings = [(name, text) for name, text in VERDICT_MEANINGS.items() if name in seen]
    marks = [
        f"{mark} Of {RUNS_OF_CLOCK[clock]}."
        for clock, mark in CLOCK_MARKS.items()
        if any(trial.clock == clock for trial in trials)
    ]
    caption = (
        "All measurements, in order. Aim, predicted and median are medians; the percentile is what "
        "the budget is held against, of all runs unless marked. PSNR on held-out views. "
        f"{' '.join(marks)}"
    )
    return fragment(
        table(head, rows, caption=caption, words=(0, 1, 2)),
        folded("What the verdicts mean", facts(meanings)),
    )


def _css_name(verdict: str) -> str:
    return verdict.replace(" ", "-") if verdict in VERDICT_MEANINGS else ""
