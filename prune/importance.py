"""Importance of a student's channels, and the statistics that channel slicing needs.

Channels are ranked by the first-order Taylor expansion of the loss in their masks. Batch norms are
in evaluation mode, so the ranking is that of the folded weights and does not change when the scale
of a norm moves into a convolution. The loss of a *choice* is measured, not estimated: it is the
mean squared error of the sliced student (`prune.proposals`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.student import Student, StudentSpec
from prune.architecture import Shape
from prune.surgery import Channels, Inputs, Keep, Masks, Statistics, masked_forward

Batch = tuple[Float[Tensor, "_ _c _h _w"], Float[Tensor, "_ _rgb _sh _sw"]]
"""Inputs and their true images. Batches can have different sizes."""
Batches = Callable[[StudentSpec], Sequence[Batch]]
"""Returns the same images with the rays of any student."""


@dataclass(frozen=True)
class Ranking:
    """Channels of every layer that can be pruned, from most to least important, chain by chain."""

    widths: tuple[Channels, ...]
    blocks: tuple[tuple[Channels, ...], ...]

    def best(self, shape: Shape) -> Keep:
        """The most important channels for the widths of a shape."""
        return Keep(
            tuple(_first(order, n) for order, n in zip(self.widths, shape.widths, strict=True)),
            tuple(
                tuple(_first(order, n) for order, n in zip(orders, inner, strict=True))
                for orders, inner in zip(self.blocks, shape.blocks, strict=True)
            ),
        )


def rank_channels(student: Student, batches: Sequence[Batch]) -> Ranking:
    """Rank channels by `taylor_scores`."""
    scores = taylor_scores(student, batches)

    def order(score: Tensor) -> Channels:
        return tuple(score.argsort(descending=True, stable=True).tolist())

    return Ranking(
        tuple(map(order, scores.widths)), tuple(tuple(map(order, c)) for c in scores.blocks)
    )


def taylor_scores(student: Student, batches: Sequence[Batch]) -> Masks:
    """The squared derivative of the mean squared error with respect to each channel's mask, summed
    over the images (Molchanov et al. 2019, equation 8, with the mask as the parameter).

    The student is set to evaluation mode.
    """
    student.eval()
    masks = Masks.ones(student.spec, student.head.weight.device)
    scores = Masks.ones(student.spec, student.head.weight.device)
    for score in scores.all():
        score.zero_()
    for mask in masks.all():
        mask.requires_grad_(True)
    for x, truth in batches:
        for image, image_truth in zip(x.split(1), truth.split(1), strict=True):
            # The ranking must be the same each time, so that a search can be replayed.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True):
                error = masked_forward(student, image, masks) - image_truth
                gradients = torch.autograd.grad(error.square().mean(), masks.all())
            for score, gradient in zip(scores.all(), gradients, strict=True):
                score += gradient.square()
    return scores


@torch.no_grad()
def input_statistics(student: Student, batches: Sequence[Batch]) -> Statistics:
    """Means and covariances of every convolution's input over all images and pixels.

    The student is set to evaluation mode.
    """
    student.eval()
    images = sum(len(x) for x, _ in batches)
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def collecting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].flatten(2).double()
            share = values.shape[2] * images
            means[name] = means.get(name, 0) + values.sum((0, 2)) / share
            squares[name] = squares.get(name, 0) + (values @ values.mT).sum(0) / share

        return collect

    hooks = [
        module.register_forward_pre_hook(collecting(name))
        for name, module in student.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and name != "head"
    ]
    try:
        for x, _ in batches:
            student(x)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = student.head.weight.dtype
    return {
        name: Inputs(mean.to(dtype), (squares[name] - torch.outer(mean, mean)).to(dtype))
        for name, mean in means.items()
    }


@torch.no_grad()
def mean_squared_error(student: Student, batches: Sequence[Batch]) -> float:
    """Mean squared error over the batches. The student is set to evaluation mode."""
    student.eval()
    total = sum(float((student(x) - truth).square().mean()) * len(x) for x, truth in batches)
    return total / sum(len(x) for x, _ in batches)


def _first(order: Channels, count: int) -> Channels:
    return tuple(sorted(order[:count]))
