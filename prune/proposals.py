"""Smaller students worth trying for a latency target.

The loss of every single choice (a block at a width, a narrower chain, fewer points per ray) is measured
by really making it; choices are then combined as if losses added up, per set of stream widths by a
knapsack over all blocks and the sampling. The sum is a heuristic, and a poor one for a student that uses
every channel it has. So proposals are of several kinds, the simplest student of all, evenly narrowed,
among them; what the combinations really cost is measured (`screened`) before any is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightfield.light_field import GOLDEN
from lightfield.student import Student, StudentSpec
from prune.chains import Sampling, Shape, Widths
from prune.importance import (
    Batches,
    Ranking,
    input_statistics,
    mean_squared_error,
    rank_channels,
)
from prune.knapsack import Option, choose_options
from prune.latency_table import Choices, LatencyTable
from prune.reconciliation import Original, reconciled
from prune.sampling import Rays, resampled
from prune.slimming import Statistics, slimmed

Drop = Literal["any", "none", "only"]
PROPOSED = ("channels", "mixed", "blocks", "narrow", "evenly", "fastest")


@dataclass(frozen=True)
class Proposal:
    """A smaller student: how it was found, and what is expected of it."""

    kind: str
    """One of `PROPOSED`, see `propose` and `fastest`; or `prune.forms.FORM`."""
    shape: Shape
    """What is cut, ahead of any change of form."""
    spec: StudentSpec
    predicted_ms: float
    predicted_loss: float
    """Mean squared error added before any tuning: a sum of single ones, or measured when `screened`."""


@dataclass(frozen=True)
class ChoiceLosses:
    """Added mean squared error of every single choice for one student."""

    seeing: dict[Sampling, Student]
    """The student, under its own sampling first, and what it becomes with others (`resampled`)."""
    ranking: Ranking
    statistics: Statistics
    batches: Batches
    before: float
    """Mean squared error of the student itself."""
    samplings: dict[Sampling, float]
    widths: dict[Widths, float]
    blocks: list[list[dict[int, float]]]
    """Chain by chain, per block, by inner width; 0 drops the block."""

    def slimmed(self, shapes: Iterable[Shape]) -> Iterator[Student]:
        """The student with the best-ranked channels of each shape, fitted to do what it did."""
        own, original = next(iter(self.seeing)), None
        for shape in shapes:
            student, keep = self.seeing[shape.sampling or own], self.ranking.best(shape)
            if original is None or original.student is not student:
                original = Original(student, self.batches(student.spec))
            yield reconciled(slimmed(student, keep, self.statistics), original, keep)

    def added(self, shapes: Sequence[Shape]) -> list[float]:
        """What the student loses when it takes each shape; never less than nothing."""
        return [
            max(0.0, mean_squared_error(student, self.batches(student.spec)) - self.before)
            for student in self.slimmed(shapes)
        ]


def measure_choices(
    student: Student, batches: Batches, rays: Rays, choices: Choices
) -> ChoiceLosses:
    """Measure what each single choice costs."""
    dense, images = Shape.of(student.spec), batches(student.spec)
    own = dense.sampling
    assert own is not None
    fewer = [s for s in choices.samplings if all(map(int.__le__, s, own))]
    losses = ChoiceLosses(
        {s: resampled(student, s, rays) for s in dict.fromkeys([own, *fewer])},
        rank_channels(student, images),
        input_statistics(student, images),
        batches,
        mean_squared_error(student, images),
        {}, {}, [],
    )  # fmt: skip

    # The body's and the tail's widths are measured apart, and their losses added.
    outers = [o for o in choices.outers() if all(map(int.__le__, o, dense.widths))]
    samplings = {s: replace(dense, sampling=s) for s in losses.seeing}
    bodies = {o[0]: dense.with_width(0, o[0]) for o in outers}
    tails = {o[1:]: replace(dense, widths=(dense.widths[0], *o[1:])) for o in outers}
    blocks = [
        [
            {i: dense.with_block(c, b, i) for i in (*choices.inner[c], 0) if i <= full}
            for b, full in enumerate(chain)
        ]
        for c, chain in enumerate(dense.blocks)
    ]
    of_blocks = [shape for chain in blocks for of in chain for shape in of.values()]
    shapes = dict.fromkeys([*bodies.values(), *tails.values(), *of_blocks, *samplings.values()])
    shapes.pop(dense)
    added = {dense: 0.0, **dict(zip(shapes, losses.added(list(shapes)), strict=True))}

    losses.samplings.update({s: added[shape] for s, shape in samplings.items()})
    losses.widths.update({o: added[bodies[o[0]]] + added[tails[o[1:]]] for o in outers})
    losses.blocks.extend(
        [{i: added[shape] for i, shape in of.items()} for of in chain] for chain in blocks
    )
    return losses


def propose(
    spec: StudentSpec,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    *,
    count: int,
) -> list[Proposal]:
    """Up to `count` different students predicted to meet the target, of different kinds:

    `channels` keeps the stream widths and every block, `blocks` keeps the inner widths as well and drops
    whole blocks, `mixed` does both; `narrow` takes other stream widths; `evenly` narrows the body's
    blocks alike and leaves all else but the sampling. None when the target is out of reach.
    """
    now = Shape.of(spec).widths

    def best(widths: Widths, drop: Drop) -> Proposal | None:
        return _best(spec, losses, table, target_ms, widths, drop)

    others = [p for w in losses.widths if w != now and (p := best(w, "any"))]
    others.sort(key=lambda p: p.predicted_loss)
    of_one_width = [best(others[0].shape.widths, "none")] if others else []
    found = [
        best(now, "any"), best(now, "none"), best(now, "only"), *others[:1],
        evenly(spec, losses, table, target_ms), *of_one_width, *others[1:],
    ]  # fmt: skip
    distinct: dict[StudentSpec, Proposal] = {}
    for proposal in found:
        if proposal is not None:
            distinct.setdefault(proposal.spec, proposal)
    return list(distinct.values())[:count]


def screened(losses: ChoiceLosses, proposals: Sequence[Proposal], count: int) -> list[Proposal]:
    """The `count` proposals that lose least when made, one of each kind before a second of any."""
    added = losses.added([p.shape for p in proposals])
    measured = [replace(p, predicted_loss=loss) for p, loss in zip(proposals, added, strict=True)]
    measured.sort(key=lambda p: p.predicted_loss)
    firsts = {p.kind: p for p in reversed(measured)}
    return sorted(measured, key=lambda p: firsts[p.kind] is not p)[:count]


def fastest(spec: StudentSpec, table: LatencyTable, choices: Choices) -> Proposal:
    """The fastest student a search could reach: narrowest, without residual blocks, with the fewest
    points."""
    now = replace(Shape.of(spec), widths=choices.narrowest, sampling=choices.coarsest)
    shape = now.without_blocks()
    smallest = shape.applied_to(spec)
    return Proposal("fastest", shape, smallest, table.predict_ms(smallest), float("inf"))


def _best(
    spec: StudentSpec,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    widths: Widths,
    drop: Drop,
) -> Proposal | None:
    """The best choice of blocks and sampling for one set of stream widths; blocks may be dropped, must
    not, or must rather than be narrowed."""
    now = Shape.of(spec)

    def allowed(inner: int, full: int) -> bool:
        return inner == full or drop == "any" or (inner == 0) == (drop == "only")

    options = [
        [
            Option(w, table.block_ms[c, widths[c], w] if w else 0.0, loss)
            for w, loss in by_width.items()
            if allowed(w, full)
        ]
        for c, chain in enumerate(losses.blocks)
        for full, by_width in zip(now.blocks[c], chain, strict=True)
    ]
    channel_ms = table.channel_ms[widths[0]]
    inputs = [replace(now, sampling=s).applied_to(spec).input_channels for s in losses.samplings]
    by_sampling = zip(inputs, losses.samplings.values(), strict=True)
    options.append([Option(n, channel_ms * n, loss) for n, loss in by_sampling])
    without_ms = table.base_ms[widths] - channel_ms * table.channels
    indices = choose_options(options, table.parts_budget_ms(target_ms) - without_ms)
    if indices is None:
        return None
    chosen = [opts[i] for opts, i in zip(options, indices, strict=True)]
    inner = _regrouped((option.amount for option in chosen), now)
    shape = Shape(widths, inner, list(losses.samplings)[indices[-1]])
    dropped = any(option.amount == 0 for option in chosen)
    kept_widths = {"any": "mixed" if dropped else "channels", "none": "channels", "only": "blocks"}
    kind = kept_widths[drop] if widths == now.widths else "narrow"
    smaller = shape.applied_to(spec)
    loss = losses.widths[widths] + sum(option.loss for option in chosen)
    return Proposal(kind, shape, smaller, table.predict_ms(smaller), loss)


def evenly(
    spec: StudentSpec, losses: ChoiceLosses, table: LatencyTable, target_ms: float
) -> Proposal | None:
    """The body's blocks brought to one width, or to two neighboring ones that alternate, so that the
    target is predicted to be met with the sampling that makes the loss least; None when that is out of
    reach."""
    found = [_evenly(spec, losses, table, target_ms, s) for s in losses.samplings]
    return min(filter(None, found), key=lambda p: p.predicted_loss, default=None)


def _evenly(
    spec: StudentSpec,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    sampling: Sampling,
) -> Proposal | None:
    """`evenly` with one sampling."""
    now = replace(Shape.of(spec), sampling=sampling)
    body = list(now.blocks[0])
    turns = sorted(range(len(body)), key=lambda b: b * GOLDEN % 1)  # spread over the depth
    for width in sorted({w for of in losses.blocks[0] for w in of if w}, reverse=True):
        for b in (b for b in turns if body[b] > width):
            body[b] = width
            shape = replace(now, blocks=(tuple(body), *now.blocks[1:]))
            smaller = shape.applied_to(spec)
            if table.predict_ms(smaller) <= target_ms:
                loss = sum(of[w] for of, w in zip(losses.blocks[0], body, strict=True))
                loss += losses.samplings[sampling]
                return Proposal("evenly", shape, smaller, table.predict_ms(smaller), loss)
    return None


def _regrouped(widths: Iterator[int], like: Shape) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(next(widths) for _ in chain) for chain in like.blocks)
