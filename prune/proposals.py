"""Proposals: smaller students that are predicted to meet a latency target.

The loss of every single choice (a block at a width, a narrower chain, fewer points per ray) is
measured by making that student. The choices are then combined as if their losses added up: for each
set of stream widths, a multiple-choice knapsack chooses the widths of all blocks and the ray
sampling. The sum is only a heuristic, and a bad one for a student that uses every channel.
Therefore there are several kinds of proposals, including the evenly narrowed student, and the real
loss of the combinations is measured (`screened`) before any proposal is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightfield.light_field import GOLDEN
from lightfield.student import Student, StudentSpec
from prune.architecture import Sampling, Shape, Widths
from prune.importance import Batches, Ranking, input_statistics, mean_squared_error, rank_channels
from prune.latency_model import Choices, LatencyTable
from prune.reconstruction import Original, reconstructed
from prune.surgery import Rays, Statistics, resampled, sliced

Drop = Literal["any", "none", "only"]
PROPOSED = ("channels", "mixed", "blocks", "narrow", "uniform", "fastest")
"""Kinds of proposals that cut a student in its architecture variant."""
VARIANT = "variant"
"""Kind of the proposals in another architecture variant (`prune.variants`)."""


@dataclass(frozen=True)
class Proposal:
    """A smaller student with its predicted latency and loss."""

    kind: str
    """One of `PROPOSED` (see `propose` and `fastest`), or `VARIANT`."""
    shape: Shape
    """The cut, before any change of the architecture variant."""
    spec: StudentSpec
    predicted_ms: float
    predicted_loss: float
    """Mean squared error added before any training: the sum over the choices, or the measured one
    after `screened`."""


@dataclass(frozen=True)
class ChoiceLosses:
    """Added mean squared error of every single choice for one student."""

    resampled: dict[Sampling, Student]
    """The student with each ray sampling (`prune.surgery.resampled`), its own sampling first."""
    ranking: Ranking
    statistics: Statistics
    batches: Batches
    before: float
    """Mean squared error of the student itself."""
    samplings: dict[Sampling, float]
    widths: dict[Widths, float]
    blocks: list[list[dict[int, float]]]
    """By chain, block and inner width; 0 drops the block."""

    def pruned(self, shapes: Iterable[Shape]) -> Iterator[Student]:
        """The student with the most important channels of each shape, its layers reconstructed."""
        own, original = next(iter(self.resampled)), None
        for shape in shapes:
            student, keep = self.resampled[shape.sampling or own], self.ranking.best(shape)
            if original is None or original.student is not student:
                original = Original(student, self.batches(student.spec))
            yield reconstructed(sliced(student, keep, self.statistics), original, keep)

    def added(self, shapes: Sequence[Shape]) -> list[float]:
        """The added mean squared error of each shape, at least 0."""
        return [
            max(0.0, mean_squared_error(student, self.batches(student.spec)) - self.before)
            for student in self.pruned(shapes)
        ]


def measure_choices(
    student: Student, batches: Batches, rays: Rays, choices: Choices
) -> ChoiceLosses:
    """Measure the added error of each single choice."""
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

    # The widths of body and tail are measured separately, and their losses are added.
    width_sets = [o for o in choices.width_sets() if all(map(int.__le__, o, dense.widths))]
    samplings = {s: replace(dense, sampling=s) for s in losses.resampled}
    bodies = {o[0]: dense.with_width(0, o[0]) for o in width_sets}
    tails = {o[1:]: replace(dense, widths=(dense.widths[0], *o[1:])) for o in width_sets}
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
    losses.widths.update({o: added[bodies[o[0]]] + added[tails[o[1:]]] for o in width_sets})
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
    """Up to `count` different students of several kinds that are predicted to meet the target.

    `channels` keeps the stream widths and every block, `blocks` keeps the inner widths and drops
    whole blocks, `mixed` does both. `narrow` changes the stream widths. `uniform` narrows all
    blocks of the body alike and changes nothing else but the sampling. The list is empty if the
    target is out of reach.
    """
    now = Shape.of(spec).widths

    def best(widths: Widths, drop: Drop) -> Proposal | None:
        return _best(spec, losses, table, target_ms, widths, drop)

    others = [p for w in losses.widths if w != now and (p := best(w, "any"))]
    others.sort(key=lambda p: p.predicted_loss)
    of_one_width = [best(others[0].shape.widths, "none")] if others else []
    found = [
        best(now, "any"), best(now, "none"), best(now, "only"), *others[:1],
        uniform(spec, losses, table, target_ms), *of_one_width, *others[1:],
    ]  # fmt: skip
    distinct: dict[StudentSpec, Proposal] = {}
    for proposal in found:
        if proposal is not None:
            distinct.setdefault(proposal.spec, proposal)
    return list(distinct.values())[:count]


def screened(losses: ChoiceLosses, proposals: Sequence[Proposal], count: int) -> list[Proposal]:
    """The `count` proposals with the least measured loss, one of each kind before a second of
    any."""
    added = losses.added([p.shape for p in proposals])
    measured = [replace(p, predicted_loss=loss) for p, loss in zip(proposals, added, strict=True)]
    measured.sort(key=lambda p: p.predicted_loss)
    firsts = {p.kind: p for p in reversed(measured)}
    return sorted(measured, key=lambda p: firsts[p.kind] is not p)[:count]


def fastest(spec: StudentSpec, table: LatencyTable, choices: Choices) -> Proposal:
    """The fastest student of a search space: the narrowest widths, no residual blocks, the fewest
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
    """The best choice of blocks and sampling for one set of stream widths.

    Blocks may be narrowed or dropped (`any`), only narrowed (`none`), or only dropped (`only`).
    """
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
    indices = choose_options(options, table.parts_ms_for(target_ms) - without_ms)
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


def uniform(
    spec: StudentSpec, losses: ChoiceLosses, table: LatencyTable, target_ms: float
) -> Proposal | None:
    """The body's blocks at one width, or at two neighboring widths that alternate, with the
    sampling that loses least; None if the target is out of reach."""
    found = [_uniform(spec, losses, table, target_ms, s) for s in losses.samplings]
    return min(filter(None, found), key=lambda p: p.predicted_loss, default=None)


def _uniform(
    spec: StudentSpec,
    losses: ChoiceLosses,
    table: LatencyTable,
    target_ms: float,
    sampling: Sampling,
) -> Proposal | None:
    """`uniform` for one sampling."""
    now = replace(Shape.of(spec), sampling=sampling)
    body = list(now.blocks[0])
    order = sorted(range(len(body)), key=lambda b: b * GOLDEN % 1)  # spread over the depth
    for width in sorted({w for of in losses.blocks[0] for w in of if w}, reverse=True):
        for b in (b for b in order if body[b] > width):
            body[b] = width
            shape = replace(now, blocks=(tuple(body), *now.blocks[1:]))
            smaller = shape.applied_to(spec)
            if table.predict_ms(smaller) <= target_ms:
                loss = sum(of[w] for of, w in zip(losses.blocks[0], body, strict=True))
                loss += losses.samplings[sampling]
                return Proposal("uniform", shape, smaller, table.predict_ms(smaller), loss)
    return None


def _regrouped(widths: Iterator[int], like: Shape) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(next(widths) for _ in chain) for chain in like.blocks)


@dataclass(frozen=True)
class Option:
    """One choice for a part: an amount, such as a block's inner width (0 drops it), cost and
    loss."""

    amount: int
    cost_ms: float
    loss: float


def choose_options(
    parts: Sequence[Sequence[Option]], capacity_ms: float, *, bins: int = 2000
) -> list[int] | None:
    """Indices of the options, one per part, with the least total loss within the capacity.

    This is the multiple-choice knapsack, solved exactly on a grid of costs: costs are rounded up to
    `capacity_ms / bins`, so the choice never exceeds the capacity. None if even the cheapest
    options do not fit.
    """
    if capacity_ms < 0:
        return None
    weights = [[_bins_of(option.cost_ms, capacity_ms, bins) for option in opts] for opts in parts]
    # least[n] is the least loss of the parts so far at a weight of exactly n bins.
    least = np.full(bins + 1, np.inf)
    least[0] = 0.0
    taken = np.zeros((len(parts), bins + 1), dtype=np.int32)
    for p, options in enumerate(parts):
        by_option = np.full((len(options), bins + 1), np.inf)
        for row, option, weight in zip(by_option, options, weights[p], strict=True):
            if weight <= bins:
                row[weight:] = least[: bins + 1 - weight] + option.loss
        taken[p], least = by_option.argmin(0), by_option.min(0)
    if not np.isfinite(least).any():
        return None
    at, choice = int(least.argmin()), []
    for p in reversed(range(len(parts))):
        index = int(taken[p, at])
        choice.append(index)
        at -= weights[p][index]
    return choice[::-1]


def _bins_of(cost_ms: float, capacity_ms: float, bins: int) -> int:
    if cost_ms <= 0:
        return 0
    # The small tolerance keeps a cost of exactly n bins from being rounded up to n + 1.
    return math.ceil(cost_ms / capacity_ms * bins - 1e-9) if capacity_ms > 0 else bins + 1
