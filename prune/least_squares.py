"""Weighted least squares over the pixels of streams: what fits of layers are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lightfield.light_field import GOLDEN

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)
"""By what a fit's diagonal may be raised, relative to itself; the last leaves hardly a slope."""
MOST_PIXELS = 1 << 15
"""That one fit looks at; of more, every n-th."""
Stream = list[Tensor]
"""One tensor [n, c, h, w] per batch."""


def regression(inputs: Stream, targets: Stream, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted least squares over all pixels: a matrix [targets, inputs] and a constant [targets].

    How much ridge it takes is decided by the half of the pixels that a first fit leaves out. Layer
    after layer goes by what came of the one before: a fit that fails on pixels it has not seen would let
    their streams grow without bounds.

    Args:
        inputs: what is to be guessed from.
        targets: of the same sizes.
        weights: one tensor [n, 1, h, w] per batch, of any size.
    """
    every = _every(inputs)
    share = _shares(weights, inputs, every)
    (x, x_mean), (y, y_mean) = (_centered(_columns(stream, every)) for stream in (inputs, targets))
    at = torch.arange(len(share), dtype=torch.float64, device=share.device)
    here = at * GOLDEN % 1 < 0.5  # neighbors of all kinds fall into both
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
    """Weighted means of inputs x and targets y, and of their products, not centered; in double
    precision."""

    weight: Float[Tensor, ""]
    x: Float[Tensor, " c"]
    y: Float[Tensor, " t"]
    xx: Float[Tensor, "c c"]
    xy: Float[Tensor, "c t"]
    yy: Float[Tensor, " t"]
    """Of each target with itself."""

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "c pixels"],
        y: Float[Tensor, "t pixels"],
        share: Float[Tensor, " pixels"],
    ) -> _Moments:
        """Over pixels of which each has its share of the weight."""
        weight = share.sum()
        share = share / weight
        weighted = x * share
        return cls(
            weight, weighted.sum(1), y @ share, weighted @ x.mT, weighted @ y.mT, y.square() @ share
        )

    def plus(self, other: _Moments) -> _Moments:
        """Of both together."""
        weight = self.weight + other.weight
        mine, its = self.weight / weight, other.weight / weight
        pairs = (
            (self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy),
            (self.yy, other.yy),
        )  # fmt: skip
        return _Moments(weight, *(mine * a + its * b for a, b in pairs))

    def fitted(self, ridges: Float[Tensor, " r"]) -> tuple[Tensor, Tensor]:
        """By each ridge a linear guess of the targets: slopes [r, t, c] and constants [r, t]."""
        among = self.xx - torch.outer(self.x, self.x)
        between = self.xy - torch.outer(self.x, self.y)
        # The constant is for channels that do not vary.
        raised = among + torch.diag_embed(ridges[:, None] * among.diagonal() + 1e-8)
        factors = torch.linalg.cholesky(raised)
        slopes = torch.cholesky_solve(between.expand(len(ridges), -1, -1), factors).mT
        return slopes, self.y - slopes @ self.x

    def errors(
        self, slopes: Float[Tensor, "r t c"], constants: Float[Tensor, "r t"]
    ) -> Float[Tensor, " r"]:
        """The summed mean squared error of each such guess here."""
        wrong = self.yy + ((slopes @ self.xx - 2 * self.xy.mT) * slopes).sum(2)
        wrong += constants.square() + 2 * constants * (slopes @ self.x - self.y)
        return wrong.sum(1)


def _every(stream: Stream) -> int:
    """Of how many pixels one is looked at; odd, since factors of two are the up-sampling's phases."""
    return -(-sum(x[:, 0].numel() for x in stream) // MOST_PIXELS) | 1


def _columns(stream: Stream, every: int) -> Float[Tensor, "c pixels"]:
    """Every n-th pixel, in double precision."""
    return torch.cat([x.permute(1, 0, 2, 3).flatten(1)[:, ::every] for x in stream], 1).double()


def _centered(columns: Float[Tensor, "c pixels"]) -> tuple[Tensor, Tensor]:
    """About their means, so that products of large numbers do not cancel; and the means."""
    mean = columns.mean(1)
    return columns - mean[:, None], mean


def _shares(weights: Sequence[Tensor], like: Stream, every: int) -> Float[Tensor, " pixels"]:
    """What each pixel weighs that is looked at."""
    pooled = [
        functional.adaptive_avg_pool2d(weight, (x.shape[2], x.shape[3]))
        for weight, x in zip(weights, like, strict=True)
    ]
    return _columns(pooled, every)[0]
