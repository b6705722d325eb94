"""Bringing a cut student's layers back to what they computed before, ahead of any training.

What cuts leave out adds up from block to block. So each convolution of the cut student is fitted anew,
from the first to the last, by least squares over real inputs: a block's first one to the hidden channels
that the original had there, its second one to the difference between the stream that the original had
before its next kept block and the stream that has come so far; whoever reads a chain's last stream gets
the best linear guess of the original's from it. (Layer-wise reconstruction, as in He et al. 2017, along
a residual stream.) A pixel weighs as much as its colors can still move: where the sigmoid is saturated,
streams run to thousands and mean nothing.

Without norms this decides over life and death. A student that loses blocks at random places paints
everything white, with gradients of zero, and does not recover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.student import (
    BodyChain,
    Chain,
    ResidualBlock,
    ShuffledUpsample,
    Student,
    TransposedUpsample,
)
from prune.importance import Batch
from prune.least_squares import Stream, regression
from prune.slimming import Channels, Keep

LEAST_WEIGHT = 1e-3
"""Of a saturated pixel; of one in the middle of the sigmoid it is a quarter."""


class Original:
    """The student that cut ones are brought back to, in evaluation mode; what its modules make of some
    images is computed once for all of them, and kept."""

    @torch.no_grad()
    def __init__(self, student: Student, batches: Sequence[Batch]):
        self.student = student.eval()
        self.inputs = [x for x, _ in batches]
        self.weights = [color_slopes(student(x)) for x in self.inputs]
        """What each pixel weighs."""
        self._streams: dict[nn.Module, Stream] = {}

    def behind(self, module: nn.Module, stream: Stream) -> Stream:
        """The stream behind one of the student's modules, ahead of which it is `stream`."""
        if module not in self._streams:
            self._streams[module] = through(module, stream)
        return self._streams[module]


@torch.no_grad()
def reconciled(student: Student, original: Original, keep: Keep) -> Student:
    """Fit the layers of `student`, in place: what `slimmed` made of the original for a keep, in another
    form (`prune.conversion.converted`) or the same.

    Leaves it in evaluation mode, and the layers ahead of the first change as they are, but for what a
    block adds that stands right ahead of one that goes.
    """
    student.eval()
    everything = Keep.everything(original.student.spec)
    pair = _Pair(original, original.inputs, original.inputs)
    same_activation = student.spec.activation == original.student.spec.activation
    pairs = zip(student.chains(), original.student.chains(), strict=True)
    for c, (mine, its) in enumerate(pairs):
        whole = keep.widths[c] == everything.widths[c]
        pair = _entered(mine, its, keep.widths[c], pair, whole=whole)
        first = pair
        pair = _through_blocks(
            mine, its, keep.widths[c], keep.blocks[c], pair, same_activation=same_activation
        )
        pair = pair.plus(first) if isinstance(mine, BodyChain) else pair
    if not pair.one:
        colors = original.behind(original.student.color, pair.its)
        correct(student.color, pair.mine, colors, original.weights)
    return student


@dataclass(frozen=True)
class _Pair:
    """The streams of both students at one place; the same list while nothing has been cut."""

    original: Original
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
        its = self.original.behind(its_module, self.its)
        mine = its if same and self.one else through(my_module, self.mine)
        return _Pair(self.original, mine, its)

    def plus(self, other: _Pair) -> _Pair:
        """The sums of streams, each student's with its own."""
        its = _sum(self.its, other.its)
        return _Pair(self.original, its if self.one else _sum(self.mine, other.mine), its)

    def settled(self, kept: Channels) -> _Pair:
        """With the waiting block, whose second convolution leads to where the original's stream is."""
        block = self.waiting
        if block is None:
            return self
        hidden = through(block.hidden, self.mine)
        if isinstance(block.contract_norm, nn.Identity):
            target = [y[:, list(kept)] - x for x, y in zip(self.mine, self.its, strict=True)]
            correct(block.contract, hidden, target, self.original.weights)
        return replace(self, mine=_sum(self.mine, through(block.change, hidden)), waiting=None)


def _entered(mine: Chain, its: Chain, kept: Channels, pair: _Pair, *, whole: bool) -> _Pair:
    """The streams behind a chain's entry, which is fitted unless it computes what it did."""
    new, old = mine.entry, its.entry
    like = type(new) is type(old)
    match new, old:
        case ShuffledUpsample(), _ if not (like and pair.one and whole):
            _correct_shuffled(new, kept, pair, pair.original.behind(old, pair.its))
        case TransposedUpsample(), TransposedUpsample() if not pair.one:
            _read_guess(new, old, kept, pair)
        case _:
            pass
    pair = pair.through(new, old, same=like and whole)
    if isinstance(mine, BodyChain) and isinstance(its, BodyChain):
        same = type(mine.activation) is type(its.activation)
        pair = pair.through(mine.activation, its.activation, same=same)
    return pair


def _through_blocks(
    mine: Chain,
    its: Chain,
    kept: Channels,
    inners: Sequence[Channels],
    pair: _Pair,
    *,
    same_activation: bool,
) -> _Pair:
    """The streams behind a chain's blocks, which are fitted from the first change on."""
    original = pair.original
    rest = iter(mine.blocks.values())
    for b, its_block in enumerate(its.blocks.values()):
        if not inners[b]:
            pair = replace(pair, its=original.behind(its_block, pair.its))
            continue
        my_block = next(rest)
        whole = len(inners[b]) == its_block.expand.out_channels
        goes_next = not all(inners[b + 1 : b + 2])
        if pair.one and whole and same_activation and not goes_next:
            pair = pair.through(my_block, its_block, same=True)
            continue
        pair = pair.settled(kept)
        if not (pair.one and same_activation):
            target = [its_block.expand(x)[:, list(inners[b])] for x in pair.its]
            correct(my_block.expand, pair.mine, target, original.weights)
        pair = replace(pair, its=original.behind(its_block, pair.its), waiting=my_block)
    return pair.settled(kept)


def through(part: Callable[[Tensor], Tensor], stream: Stream) -> Stream:
    """A stream behind a part of a student."""
    return [part(x) for x in stream]


def _sum(stream: Stream, other: Stream) -> Stream:
    return [x + y for x, y in zip(stream, other, strict=True)]


def color_slopes(colors: Float[Tensor, "n rgb h w"]) -> Float[Tensor, "n 1 h w"]:
    """What each pixel weighs: the sigmoid's slope there."""
    return (colors * (1 - colors)).mean(1, keepdim=True) + LEAST_WEIGHT


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
    entry: ShuffledUpsample, out: Channels, streams: _Pair, target: Stream
) -> None:
    """Add to a convolution ahead of a pixel shuffle what the stream behind it lacks of a target."""
    phases = [functional.pixel_unshuffle(y[:, list(out)], entry.factor) for y in target]
    correct(entry.convolution, streams.mine, phases, streams.original.weights)


def _read_guess(
    mine: TransposedUpsample, its: TransposedUpsample, out: Channels, streams: _Pair
) -> None:
    """Let a transposed convolution make of its stream what `its` makes of the original's, as guessed
    from it."""
    assert mine.bias is not None
    assert its.bias is not None
    slope, constant = regression(streams.mine, streams.its, streams.original.weights)
    every = its.weight[:, list(out)]
    mine.weight.copy_(torch.einsum("goyx,gi->ioyx", every, slope))
    shift = constant @ every.sum((2, 3)) / its.factor**2
    mine.bias.copy_(its.bias[list(out)] + shift)
