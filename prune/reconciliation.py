"""Bringing a cut student's layers back to what they computed before, ahead of any training.

What cuts leave out adds up from block to block. So each convolution of the cut student is fitted anew,
from the first to the last, by least squares over real inputs: a block's first one to the hidden channels
that the original had there, its second one to the difference between the stream that the original had
before its next kept block and the stream that has come so far; whoever reads a chain's last stream gets
the best linear guess of the original's from it. (Layer-wise reconstruction, as in He et al. 2017, along
a residual stream.) A pixel weighs as much as its colours can still move: where the sigmoid is saturated,
streams run to thousands and mean nothing.

Without norms this decides over life and death. A student that loses blocks at random places paints
everything white, with gradients of zero, and does not recover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.light_field import GOLDEN
from lightfield.student import ResidualBlock, Student
from prune.chains import chains_of, entry_of
from prune.importance import Batch
from prune.slimming import Channels, Keep

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)
"""By what a fit's diagonal may be raised, relative to itself; the last leaves hardly a slope."""
LEAST_WEIGHT = 1e-3
"""Of a saturated pixel; of one in the middle of the sigmoid it is a quarter."""
MOST_PIXELS = 1 << 15
"""That one fit looks at; of more, every n-th."""
Stream = list[Tensor]
"""One tensor [n, c, h, w] per batch."""


@torch.no_grad()
def reconciled(
    student: Student, original: Student, keep: Keep, batches: Sequence[Batch]
) -> Student:
    """Fit the layers of `student`, in place: what `slimmed` made of the original for a keep, in another
    form (`prune.conversion.converted`) or the same.

    Leaves both in evaluation mode, and the layers ahead of the first change as they are, but for what a
    block adds that stands right ahead of one that goes.
    """
    student.eval()
    original.eval()
    inputs = [x for x, _ in batches]
    weights = [colour_slopes(original(x)) for x in inputs]
    everything = Keep.everything(original.spec)
    pair = _Pair(inputs, inputs)
    for c in range(len(keep.widths)):
        whole = keep.widths[c] == everything.widths[c]
        pair = _entered(student, original, c, keep.widths[c], pair, weights, whole=whole)
        head = pair
        pair = _through_blocks(student, original, c, keep, pair, weights)
        pair = pair.plus(head) if c == 0 else pair
    if not pair.one:
        correct(student.colour, pair.mine, through(original.colour, pair.its), weights)
    return student


@dataclass(frozen=True)
class _Pair:
    """The streams of both students at one place; the same list while nothing has been cut."""

    mine: Stream
    its: Stream
    waiting: ResidualBlock | None = None
    """A kept block that `mine` has yet to go through, once it is clear what comes behind it."""

    @property
    def one(self) -> bool:
        """Whether both students have done the same so far."""
        return self.mine is self.its

    def through(self, my_module: nn.Module, its_module: nn.Module, *, same: bool) -> _Pair:
        """Behind a module of each; the same one is computed once."""
        its = through(its_module, self.its)
        return _Pair(its if same and self.one else through(my_module, self.mine), its)

    def plus(self, other: _Pair) -> _Pair:
        """The sums of streams, each student's with its own."""
        its = _sum(self.its, other.its)
        return _Pair(its if self.one else _sum(self.mine, other.mine), its)

    def settled(self, kept: Channels, weights: Sequence[Tensor]) -> _Pair:
        """With the waiting block, whose second convolution leads to where the original's stream is."""
        block = self.waiting
        if block is None:
            return self
        hidden = [block.activation(block.expand_norm(block.expand(x))) for x in self.mine]
        if isinstance(block.contract_norm, nn.Identity):
            target = [y[:, list(kept)] - x for x, y in zip(self.mine, self.its, strict=True)]
            correct(block.contract, hidden, target, weights)
        added = [block.contract_norm(block.contract(g)) for g in hidden]
        return _Pair(_sum(self.mine, added), self.its)


def _entered(
    student: Student,
    original: Student,
    chain: int,
    kept: Channels,
    pair: _Pair,
    weights: Sequence[Tensor],
    *,
    whole: bool,
) -> _Pair:
    """The streams behind a chain's entry, which is fitted unless it computes what it did."""
    mine, its = entry_of(student, chain), entry_of(original, chain)
    like = type(mine) is type(its)
    if isinstance(mine, nn.Sequential) and not (like and pair.one and whole):
        _correct_shuffled(mine, kept, pair, through(its, pair.its), weights)
    elif chain and like and not pair.one:
        _read_guess(mine, its, kept, pair, weights)
    pair = pair.through(mine, its, same=like and whole)
    if chain == 0:
        same = student.spec.activation == original.spec.activation
        pair = pair.through(student.head_activation, original.head_activation, same=same)
    return pair


def _through_blocks(
    student: Student,
    original: Student,
    chain: int,
    keep: Keep,
    pair: _Pair,
    weights: Sequence[Tensor],
) -> _Pair:
    """The streams behind a chain's blocks, which are fitted from the first change on."""
    same_activation = student.spec.activation == original.spec.activation
    kept, inners = keep.widths[chain], keep.blocks[chain]
    rest = iter([block for _, block in chains_of(student)[chain]])
    for b, (_, its_block) in enumerate(chains_of(original)[chain]):
        if not inners[b]:
            pair = _Pair(pair.mine, through(its_block, pair.its), pair.waiting)
            continue
        my_block = next(rest)
        whole = len(inners[b]) == its_block.expand.out_channels
        goes_next = not all(inners[b + 1 : b + 2])
        if pair.one and whole and same_activation and not goes_next:
            pair = pair.through(my_block, its_block, same=True)
            continue
        pair = pair.settled(kept, weights)
        if not (pair.one and same_activation):
            target = [its_block.expand(x)[:, list(inners[b])] for x in pair.its]
            correct(my_block.expand, pair.mine, target, weights)
        pair = _Pair(pair.mine, through(its_block, pair.its), my_block)
    return pair.settled(kept, weights)


def through(module: nn.Module, stream: Stream) -> Stream:
    """A stream behind a module."""
    return [module(x) for x in stream]


def _sum(stream: Stream, other: Stream) -> Stream:
    return [x + y for x, y in zip(stream, other, strict=True)]


def colour_slopes(colours: Float[Tensor, "n rgb h w"]) -> Float[Tensor, "n 1 h w"]:
    """What each pixel weighs: the sigmoid's slope there."""
    return (colours * (1 - colours)).mean(1, keepdim=True) + LEAST_WEIGHT


def correct(
    convolution: nn.Conv2d, inputs: Stream, target: Stream, weights: Sequence[Tensor]
) -> None:
    """Add to a 1x1 convolution what its outputs lack of a target."""
    lacking = [y - convolution(x) for x, y in zip(inputs, target, strict=True)]
    slope, constant = regression(inputs, lacking, weights)
    assert convolution.bias is not None
    convolution.weight += slope[:, :, None, None]
    convolution.bias += constant


def _correct_shuffled(
    entry: nn.Sequential, out: Channels, streams: _Pair, target: Stream, weights: Sequence[Tensor]
) -> None:
    """Add to a convolution ahead of a pixel shuffle what the stream behind it lacks of a target."""
    convolution, shuffle = entry[0], entry[1]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(shuffle, nn.PixelShuffle)
    factor = shuffle.upscale_factor
    phases = [functional.pixel_unshuffle(y[:, list(out)], factor) for y in target]
    correct(convolution, streams.mine, phases, weights)


def _read_guess(
    mine: nn.Module, its: nn.Module, out: Channels, streams: _Pair, weights: Sequence[Tensor]
) -> None:
    """Let a transposed convolution make of its stream what `its` makes of the original's, as guessed
    from it."""
    assert isinstance(mine, nn.ConvTranspose2d)
    assert isinstance(its, nn.ConvTranspose2d)
    assert mine.bias is not None
    assert its.bias is not None
    slope, constant = regression(streams.mine, streams.its, weights)
    every = its.weight[:, list(out)]
    mine.weight.copy_(torch.einsum("goyx,gi->ioyx", every, slope))
    shift = constant @ every.sum((2, 3)) / (its.stride[0] * its.stride[1])
    mine.bias.copy_(its.bias[list(out)] + shift)


def regression(inputs: Stream, targets: Stream, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted least squares over all pixels: a matrix [targets, inputs] and a constant [targets].

    How much ridge it takes is decided by the half of the pixels that a first fit leaves out. Layer
    after layer goes by what came of the one before: a fit that fails on pixels it has not seen would let
    their streams grow without bounds.
    """
    count = inputs[0].shape[1]
    seen, left_out = _moments(weights, inputs, targets)
    ridges = torch.tensor(RIDGES, dtype=torch.float64, device=seen.mean.device)
    errors = left_out.errors(*seen.fitted(count, ridges))
    chosen = ridges[errors.argmin()][None]
    (slope,), (constant,) = seen.plus(left_out).fitted(count, chosen)
    return slope.to(inputs[0].dtype), constant.to(inputs[0].dtype)


def covariance(stream: Stream, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted mean [c] and covariance [c, c] of a stream over all pixels, in double precision."""
    half, other = _moments(weights, stream)
    both = half.plus(other)
    return both.mean, both.covariance


@dataclass(frozen=True)
class _Moments:
    """Weighted first and second moments of channels, in double precision."""

    total: Float[Tensor, ""]
    mean: Float[Tensor, " c"]
    square: Float[Tensor, "c c"]
    """Means of products, not centred."""

    @property
    def covariance(self) -> Float[Tensor, "c c"]:
        return self.square - torch.outer(self.mean, self.mean)

    def plus(self, other: _Moments) -> _Moments:
        """Of both together."""
        total = self.total + other.total
        mine, its = self.total / total, other.total / total
        mean = mine * self.mean + its * other.mean
        return _Moments(total, mean, mine * self.square + its * other.square)

    def fitted(self, count: int, ridges: Float[Tensor, " r"]) -> tuple[Tensor, Tensor]:
        """By each ridge a linear guess of all further channels from the first `count`: slopes
        [r, targets, count] and constants [r, targets]."""
        spread = self.covariance
        among, between = spread[:count, :count], spread[:count, count:]
        raised = torch.diag_embed(ridges[:, None] * among.diagonal() + 1e-8)
        slopes = torch.linalg.solve(among + raised, between).mT
        return slopes, self.mean[count:] - slopes @ self.mean[:count]

    def errors(
        self, slopes: Float[Tensor, "r targets count"], constants: Float[Tensor, "r targets"]
    ) -> Float[Tensor, " r"]:
        """The summed mean squared error of each such guess here."""
        count = slopes.shape[2]
        among, between = self.square[:count, :count], self.square[:count, count:]
        its, mean = self.square[count:, count:].diagonal(), self.mean
        wrong = its + ((slopes @ among - 2 * between.T) * slopes).sum(2) + constants.square()
        wrong += 2 * constants * (slopes @ mean[:count] - mean[count:])
        return wrong.sum(1)


def _moments(weights: Sequence[Tensor], *streams: Stream) -> tuple[_Moments, _Moments]:
    """Moments of the channels of streams of one size, put behind one another, over either half of the
    pixels."""
    first = streams[0]
    pixels = sum(x[:, 0].numel() for x in first)
    every = -(-pixels // MOST_PIXELS) | 1  # odd: factors of two are the up-sampling's phases
    halves: list[list[Tensor]] = [[], []]
    count = 0
    for *parts, weight in zip(*streams, weights, strict=True):
        share = functional.adaptive_avg_pool2d(weight, (parts[0].shape[2], parts[0].shape[3]))
        columns = torch.cat([_columns(x, every) for x in (*parts, share)])
        at = torch.arange(columns.shape[1], dtype=torch.float64, device=columns.device) + count
        here = at * GOLDEN % 1 < 0.5  # neighbours of all kinds fall into both
        count += len(at)
        halves[0].append(columns[:, here])
        halves[1].append(columns[:, ~here])
    return _moments_of(halves[0]), _moments_of(halves[1])


def _moments_of(parts: Sequence[Float[Tensor, "channels_and_weight _"]]) -> _Moments:
    """Of columns of channels and, last, their weight."""
    total = mean = square = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for part in parts:
        columns, share = part[:-1], part[-1]
        weighted = columns * share
        total, mean, square = (
            total + share.sum(), mean + weighted.sum(1), square + weighted @ columns.T
        )  # fmt: skip
    return _Moments(total, mean / total, square / total)


def _columns(x: Float[Tensor, "n c h w"], every: int) -> Float[Tensor, "c pixels"]:
    """Every n-th pixel, in double precision."""
    return x.permute(1, 0, 2, 3).flatten(1)[:, ::every].double()
