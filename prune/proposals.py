"""Smaller students worth trying for a latency target.

The loss of every single choice (a block at a width, a narrower stream, a narrower tail) is measured on
held-out batches by really slimming; choices are then combined as if losses added up, per stream and
tail width by a knapsack over all blocks. The sum is a heuristic; the search trains and measures what
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightfield.student import Student, StudentSpec
from prune.importance import Batch, Ranking, mean_squared_error, narrowed, rank_channels
from prune.knapsack import Option, choose_options
from prune.latency_table import LatencyTable, Outer, WidthChoices, outer_of
from prune.slimming import Keep, slimmed


@dataclass(frozen=True)
class Proposal:
    """A smaller student: how it was found, what stays, and what is expected of it."""

    kind: str
    keep: Keep
    spec: StudentSpec
    predicted_ms: float
    predicted_loss: float


@dataclass(frozen=True)
class ChoiceLosses:
    """Added mean squared error of every single choice for one student."""

    ranking: Ranking
    stream: dict[int, float]
    tail: dict[tuple[int, ...], float]
    body: list[dict[int, float]]
    """Per block, by inner width; 0 drops the block."""
    tail_blocks: list[list[dict[int, float]]]


def measure_choices(
    student: Student, batches: Sequence[Batch], choices: WidthChoices
) -> ChoiceLosses:
    """Measure what each single choice costs; never less than nothing."""
    spec, ranking = student.spec, rank_channels(student, batches)
    tail_width = [stage.width for stage in spec.tail]
    tail_inner = [list(stage.inner_widths) for stage in spec.tail]
    dense = mean_squared_error(student, batches)

    def loss(
        stream: int, body: Sequence[int], tail: Sequence[int], blocks: Sequence[Sequence[int]]
    ) -> float:
        keep = narrowed(ranking, stream, body, tail, blocks)
        smaller = slimmed(student, keep, ranking.mean_hidden)
        return max(0.0, mean_squared_error(smaller, batches) - dense)

    body = list(spec.inner_widths)
    stream = {
        w: loss(w, body, tail_width, tail_inner) for w in choices.stream if w <= spec.stream_width
    }
    tails = {
        tail: loss(spec.stream_width, body, tail, tail_inner)
        for _, tail in choices.outers()
        if all(w <= full for w, full in zip(tail, tail_width, strict=True))
    }

    def with_body(index: int, width: int) -> float:
        return loss(
            spec.stream_width, [*body[:index], width, *body[index + 1 :]], tail_width, tail_inner
        )

    def with_tail(s: int, index: int, width: int) -> float:
        blocks = [list(stage) for stage in tail_inner]
        blocks[s][index] = width
        return loss(spec.stream_width, body, tail_width, blocks)

    def per_width(
        full: int, widths: Sequence[int], measure: Callable[[int], float]
    ) -> dict[int, float]:
        return {w: 0.0 if w == full else measure(w) for w in (*widths, 0) if w <= full}

    return ChoiceLosses(
        ranking,
        stream,
        tails,
        [
            per_width(full, choices.body_inner, lambda w, i=i: with_body(i, w))
            for i, full in enumerate(body)
        ],
        [
            [
                per_width(full, choices.tail_inner[s], lambda w, s=s, i=i: with_tail(s, i, w))
                for i, full in enumerate(stage)
            ]
            for s, stage in enumerate(tail_inner)
        ],
    )


def propose(
    student: Student,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    *,
    count: int,
) -> list[Proposal]:
    """Up to `count` different students predicted to meet the target, of different kinds:

    `blocks` drops whole blocks only; `channels` keeps stream and tail widths; `narrow` takes the best
    narrower stream or tail; then the next best of any kind. Fewer or none when the target is out of
    reach.
    """
    now = outer_of(student.spec)
    found = [
        p
        for outer in _outers(losses, table)
        if (p := _best(student, losses, table, target_ms, outer))
    ]
    found.sort(key=lambda p: p.predicted_loss)
    same = [p for p in found if outer_of(p.spec) == now]
    other = [p for p in found if outer_of(p.spec) != now]
    whole = _best(student, losses, table, target_ms, now, whole_blocks=True)
    ordered = [*same[:1], *other[:1], *([whole] if whole else []), *other[1:]]
    distinct = {p.spec: p for p in reversed(ordered)}
    return [p for p in ordered if distinct.get(p.spec) is p][:count]


def smallest_spec(spec: StudentSpec, choices: WidthChoices) -> StudentSpec:
    """The fastest student the search could reach: narrowest, without residual blocks."""
    stream, tail = choices.stream[-1], [widths[-1] for widths in choices.tail]
    keep = Keep.everything(spec)
    return Keep(
        keep.stream[:stream],
        ((),) * len(keep.body),
        tuple(
            type(stage)(stage.width[:width], ((),) * len(stage.blocks))
            for stage, width in zip(keep.tail, tail, strict=True)
        ),
    ).applied_to(spec)


def _outers(losses: ChoiceLosses, table: LatencyTable) -> list[Outer]:
    return [o for o in table.base_ms if o[0] in losses.stream and o[1] in losses.tail]


def _best(
    student: Student,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    outer: Outer,
    *,
    whole_blocks: bool = False,
) -> Proposal | None:
    """The best choice of blocks for one stream and tail width."""
    spec = student.spec
    stream, tail = outer
    options: list[list[Option]] = []
    for full, by_width in zip(spec.inner_widths, losses.body, strict=True):
        options.append(
            [
                Option(w, table.body_ms[stream, w] if w else 0.0, loss)
                for w, loss in by_width.items()
                if not whole_blocks or w in (0, full)
            ]
        )
    for s, (stage, blocks) in enumerate(zip(spec.tail, losses.tail_blocks, strict=True)):
        for full, by_width in zip(stage.inner_widths, blocks, strict=True):
            options.append(
                [
                    Option(w, table.tail_ms[s, tail[s], w] if w else 0.0, loss)
                    for w, loss in by_width.items()
                    if not whole_blocks or w in (0, full)
                ]
            )
    budget = table.parts_budget_ms(target_ms) - table.base_ms[outer]
    chosen = choose_options(options, budget)
    if chosen is None:
        return None
    widths = [opts[i].width for opts, i in zip(options, chosen, strict=True)]
    body, rest = widths[: len(spec.inner_widths)], iter(widths[len(spec.inner_widths) :])
    blocks = [[next(rest) for _ in stage.inner_widths] for stage in spec.tail]
    keep = narrowed(losses.ranking, stream, body, tail, blocks)
    smaller = keep.applied_to(spec)
    loss = sum(opts[i].loss for opts, i in zip(options, chosen, strict=True))
    loss += losses.stream[stream] + losses.tail[tail]
    kind = "blocks" if whole_blocks else "channels" if outer == outer_of(spec) else "narrow"
    return Proposal(kind, keep, smaller, table.predict_ms(smaller), loss)
