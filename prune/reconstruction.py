"""Layer-wise reconstruction of a pruned student before any training, by weighted least squares.

The errors of a cut add up from block to block. Therefore each convolution of the pruned student is
fitted again, from the first to the last, on real inputs. A block's first convolution is fitted to
the original's hidden channels. Its second convolution is fitted to the difference between the
original stream before the next kept block and the pruned stream so far. The convolution that reads
a chain's last stream gets the best linear prediction of the original stream. (Layer-wise
reconstruction as in He et al. 2017, along a residual stream.) A pixel's weight is the slope of the
sigmoid at its colors: where the sigmoid is saturated, streams reach thousands without any effect.

Without normalization layers this step is essential: after random blocks have been dropped, the
output saturates to white, gradients vanish, and training does not recover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.light_field import GOLDEN
from lightfield.student import (
    BodyChain,
    Chain,
    ResidualBlock,
    ShuffledUpsample,
    Student,
    TransposedUpsample,
)
from prune.importance import Batch
from prune.surgery import Channels, Keep

MIN_WEIGHT = 1e-3
"""Weight of a saturated pixel; a pixel in the middle of the sigmoid has a weight of about 1/4."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)
"""Candidates for the ridge, relative to the diagonal; the last one leaves almost no slope."""
MAX_PIXELS = 1 << 15
"""Maximum number of pixels of one regression; of more pixels, every n-th is used."""
Stream = list[Tensor]
"""One tensor [n, c, h, w] per batch."""


class Original:
    """The student before the cut, in evaluation mode, with its streams on the calibration images.

    Each stream is computed once for all students that are cut from it.
    """

    @torch.no_grad()
    def __init__(self, student: Student, batches: Sequence[Batch]):
        self.student = student.eval()
        self.inputs = [x for x, _ in batches]
        self.weights = [color_slopes(student(x)) for x in self.inputs]
        """Weight of each pixel."""
        self._streams: dict[nn.Module, Stream] = {}

    def after(self, module: nn.Module, stream: Stream) -> Stream:
        """The stream after one of the student's modules, whose input is `stream`."""
        if module not in self._streams:
            self._streams[module] = through(module, stream)
        return self._streams[module]


@torch.no_grad()
def reconstructed(student: Student, original: Original, keep: Keep) -> Student:
    """Reconstruct the layers of a pruned student in place, and return it in evaluation mode.

    Layers before the first change stay as they are, except the last block before a dropped one.

    Args:
        student: the original student after slicing by `keep`, converted or not.
        original: the student before the cut.
        keep: the channels that were kept.
    """
    student.eval()
    everything = Keep.everything(original.student.spec)
    pair = _Pair(original, original.inputs, original.inputs)
    same_activation = student.spec.activation == original.student.spec.activation
    pairs = zip(student.chains(), original.student.chains(), strict=True)
    for c, (pruned, whole) in enumerate(pairs):
        uncut = keep.widths[c] == everything.widths[c]
        pair = _after_entry(pruned, whole, keep.widths[c], pair, uncut=uncut)
        first = pair
        pair = _after_blocks(
            pruned, whole, keep.widths[c], keep.blocks[c], pair, same_activation=same_activation
        )
        pair = pair.plus(first) if isinstance(pruned, BodyChain) else pair
    if not pair.equal:
        colors = original.after(original.student.color, pair.original)
        correct(student.color, pair.pruned, colors, original.weights)
    return student


@dataclass(frozen=True)
class _Pair:
    """The streams of the pruned and the original student at one place.

    Both are the same list as long as nothing has been cut.
    """

    source: Original
    pruned: Stream
    original: Stream
    pending: ResidualBlock | None = None
    """A kept block that the pruned stream has not passed yet, because the block's second
    convolution is fitted to the stream before the next kept block."""

    @property
    def equal(self) -> bool:
        """Whether both students have computed the same so far."""
        return self.pruned is self.original

    def through(self, pruned: nn.Module, original: nn.Module, *, same: bool) -> _Pair:
        """The streams after a module of each student; equal streams are computed once."""
        after = self.source.after(original, self.original)
        return _Pair(
            self.source, after if same and self.equal else through(pruned, self.pruned), after
        )

    def plus(self, other: _Pair) -> _Pair:
        """The sums of the streams at two places."""
        original = _sum(self.original, other.original)
        pruned = original if self.equal else _sum(self.pruned, other.pruned)
        return _Pair(self.source, pruned, original)

    def settled(self, kept: Channels) -> _Pair:
        """The streams after the pending block, whose second convolution is fitted to the original
        stream."""
        block = self.pending
        if block is None:
            return self
        hidden = through(block.hidden, self.pruned)
        if isinstance(block.contract_norm, nn.Identity):
            pairs = zip(self.pruned, self.original, strict=True)
            target = [y[:, list(kept)] - x for x, y in pairs]
            correct(block.contract, hidden, target, self.source.weights)
        pruned = _sum(self.pruned, through(block.change, hidden))
        return replace(self, pruned=pruned, pending=None)


def _after_entry(
    pruned: Chain, original: Chain, kept: Channels, pair: _Pair, *, uncut: bool
) -> _Pair:
    """The streams after a chain's entry, which is fitted unless it computes the same as before."""
    new, old = pruned.entry, original.entry
    like = type(new) is type(old)
    match new, old:
        case ShuffledUpsample(), _ if not (like and pair.equal and uncut):
            _fit_shuffled(new, kept, pair, pair.source.after(old, pair.original))
        case TransposedUpsample(), TransposedUpsample() if not pair.equal:
            _fit_transposed(new, old, kept, pair)
        case _:
            pass
    pair = pair.through(new, old, same=like and uncut)
    if isinstance(pruned, BodyChain) and isinstance(original, BodyChain):
        same = type(pruned.activation) is type(original.activation)
        pair = pair.through(pruned.activation, original.activation, same=same)
    return pair


def _after_blocks(
    pruned: Chain,
    original: Chain,
    kept: Channels,
    inners: Sequence[Channels],
    pair: _Pair,
    *,
    same_activation: bool,
) -> _Pair:
    """The streams after a chain's blocks, which are fitted from the first change on."""
    source = pair.source
    rest = iter(pruned.blocks.values())
    for b, old in enumerate(original.blocks.values()):
        if not inners[b]:
            pair = replace(pair, original=source.after(old, pair.original))
            continue
        new = next(rest)
        uncut = len(inners[b]) == old.expand.out_channels
        next_is_dropped = not all(inners[b + 1 : b + 2])
        if pair.equal and uncut and same_activation and not next_is_dropped:
            pair = pair.through(new, old, same=True)
            continue
        pair = pair.settled(kept)
        if not (pair.equal and same_activation):
            target = [old.expand(x)[:, list(inners[b])] for x in pair.original]
            correct(new.expand, pair.pruned, target, source.weights)
        pair = replace(pair, original=source.after(old, pair.original), pending=new)
    return pair.settled(kept)


def through(part: Callable[[Tensor], Tensor], stream: Stream) -> Stream:
    """The stream after a part of a student."""
    return [part(x) for x in stream]


def _sum(stream: Stream, other: Stream) -> Stream:
    return [x + y for x, y in zip(stream, other, strict=True)]


def color_slopes(colors: Float[Tensor, "n rgb h w"]) -> Float[Tensor, "n 1 h w"]:
    """Weight of each pixel: the slope of the sigmoid there."""
    return (colors * (1 - colors)).mean(1, keepdim=True) + MIN_WEIGHT


def correct(
    convolution: nn.Conv2d, inputs: Stream, target: Stream, weights: Sequence[Tensor]
) -> None:
    """Fit a 1x1 convolution to a target by a correction of its weights."""
    missing = [y - convolution(x) for x, y in zip(inputs, target, strict=True)]
    slope, constant = regression(inputs, missing, weights)
    assert convolution.bias is not None
    convolution.weight += slope[:, :, None, None]
    convolution.bias += constant


def _fit_shuffled(entry: ShuffledUpsample, out: Channels, pair: _Pair, target: Stream) -> None:
    """Fit the convolution before a pixel shuffle to the stream after it."""
    phases = [functional.pixel_unshuffle(y[:, list(out)], entry.factor) for y in target]
    correct(entry.convolution, pair.pruned, phases, pair.source.weights)


def _fit_transposed(
    new: TransposedUpsample, old: TransposedUpsample, out: Channels, pair: _Pair
) -> None:
    """Let a transposed convolution read the best linear prediction of the original stream."""
    assert new.bias is not None
    assert old.bias is not None
    slope, constant = regression(pair.pruned, pair.original, pair.source.weights)
    every = old.weight[:, list(out)]
    new.weight.copy_(torch.einsum("goyx,gi->ioyx", every, slope))
    shift = constant @ every.sum((2, 3)) / old.factor**2
    new.bias.copy_(old.bias[list(out)] + shift)


def regression(inputs: Stream, targets: Stream, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted least squares over all pixels: a matrix [targets, inputs] and a constant [targets].

    The ridge is chosen by the error on the half of the pixels that a first fit leaves out. Each
    layer is fitted on the output of the layer before, so a fit that fails on other pixels would let
    their streams grow without bounds.

    Args:
        inputs: the stream from which the target is predicted.
        targets: the stream to predict, of the same size.
        weights: one tensor [n, 1, h, w] per batch, of any size.
    """
    every = _every(inputs)
    share = _shares(weights, inputs, every)
    (x, x_mean), (y, y_mean) = (_centered(_columns(stream, every)) for stream in (inputs, targets))
    at = torch.arange(len(share), dtype=torch.float64, device=share.device)
    here = at * GOLDEN % 1 < 0.5  # both halves contain neighbors in all directions
    seen, left_out = (_Moments.of(x[:, half], y[:, half], share[half]) for half in (here, ~here))
    ridges = torch.tensor(RIDGES, dtype=torch.float64, device=share.device)
    errors = left_out.errors(*seen.fitted(ridges))
    (slope,), (constant,) = seen.plus(left_out).fitted(ridges[errors.argmin()][None])
    constant = constant + y_mean - slope @ x_mean
    return slope.to(inputs[0].dtype), constant.to(inputs[0].dtype)


def covariance(stream: Stream, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted mean [c] and covariance [c, c] of a stream over all pixels, in double precision."""
    every = _every(stream)
    share = _shares(weights, stream, every)
    x, shift = _centered(_columns(stream, every))
    weighted = x * (share / share.sum())
    mean = weighted.sum(1)
    return shift + mean, weighted @ x.mT - torch.outer(mean, mean)


@dataclass(frozen=True)
class _Moments:
    """Weighted means of inputs x and targets y and of their products, without centering, in double
    precision."""

    weight: Float[Tensor, ""]
    x: Float[Tensor, " c"]
    y: Float[Tensor, " t"]
    xx: Float[Tensor, "c c"]
    xy: Float[Tensor, "c t"]
    yy: Float[Tensor, " t"]
    """The product of each target with itself."""

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "c pixels"],
        y: Float[Tensor, "t pixels"],
        share: Float[Tensor, " pixels"],
    ) -> _Moments:
        """The moments over pixels with the given weights."""
        weight = share.sum()
        share = share / weight
        weighted = x * share
        return cls(
            weight, weighted.sum(1), y @ share, weighted @ x.mT, weighted @ y.mT, y.square() @ share
        )

    def plus(self, other: _Moments) -> _Moments:
        """The moments over the pixels of both."""
        weight = self.weight + other.weight
        here, there = self.weight / weight, other.weight / weight
        pairs = (
            (self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy),
            (self.yy, other.yy),
        )  # fmt: skip
        return _Moments(weight, *(here * a + there * b for a, b in pairs))

    def fitted(self, ridges: Float[Tensor, " r"]) -> tuple[Tensor, Tensor]:
        """The linear prediction of the targets for each ridge: slopes [r, t, c], constants [r,
        t]."""
        among = self.xx - torch.outer(self.x, self.x)
        between = self.xy - torch.outer(self.x, self.y)
        # The added constant is for channels that do not vary.
        raised = among + torch.diag_embed(ridges[:, None] * among.diagonal() + 1e-8)
        factors = torch.linalg.cholesky(raised)
        slopes = torch.cholesky_solve(between.expand(len(ridges), -1, -1), factors).mT
        return slopes, self.y - slopes @ self.x

    def errors(
        self, slopes: Float[Tensor, "r t c"], constants: Float[Tensor, "r t"]
    ) -> Float[Tensor, " r"]:
        """The summed mean squared error of each prediction over these pixels."""
        wrong = self.yy + ((slopes @ self.xx - 2 * self.xy.mT) * slopes).sum(2)
        wrong += constants.square() + 2 * constants * (slopes @ self.x - self.y)
        return wrong.sum(1)


def _every(stream: Stream) -> int:
    """The n of which every n-th pixel is used; odd, because even ones would select upsampling
    phases."""
    return -(-sum(x[:, 0].numel() for x in stream) // MAX_PIXELS) | 1


def _columns(stream: Stream, every: int) -> Float[Tensor, "c pixels"]:
    """Every n-th pixel in double precision."""
    return torch.cat([x.permute(1, 0, 2, 3).flatten(1)[:, ::every] for x in stream], 1).double()


def _centered(columns: Float[Tensor, "c pixels"]) -> tuple[Tensor, Tensor]:
    """Columns minus their means, so that products of large numbers do not cancel, and the means."""
    mean = columns.mean(1)
    return columns - mean[:, None], mean


def _shares(weights: Sequence[Tensor], like: Stream, every: int) -> Float[Tensor, " pixels"]:
    """The weight of each used pixel."""
    pooled = [
        functional.adaptive_avg_pool2d(weight, (x.shape[2], x.shape[3]))
        for weight, x in zip(weights, like, strict=True)
    ]
    return _columns(pooled, every)[0]
