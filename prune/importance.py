"""What each part of a student is worth: mean squared error gained when it goes.

Channels are ranked by first-order Taylor expansion of the loss in their mask, computed with batch
norms in evaluation mode, so the ranking is that of the folded weights and does not change when a
norm's scale moves into a convolution. How much a *choice* costs is then measured, not estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.student import Student
from prune.slimming import Channels, Keep, Masks, StageKeep, masked_forward

Batch = tuple[Float[Tensor, "n c h w"], Float[Tensor, "n rgb sh sw"]]


@dataclass(frozen=True)
class Ranking:
    """Every prunable layer's channels from most to least important, and mean activations."""

    stream: Channels
    body: tuple[Channels, ...]
    tail_width: tuple[Channels, ...]
    tail: tuple[tuple[Channels, ...], ...]
    mean_hidden: dict[str, Tensor]


def rank_channels(student: Student, batches: Sequence[Batch]) -> Ranking:
    """Rank channels by the squared gradient of the loss with respect to their mask, summed over
    pictures (Molchanov et al. 2017, applied to masks)."""
    student.eval()
    device = student.head.weight.device
    masks = Masks.ones(student.spec, device)
    leaves = masks.all()
    scores = [torch.zeros_like(leaf) for leaf in leaves]
    sums: dict[str, Tensor] = {}
    pictures = 0
    for x, truth in batches:
        for i in range(len(x)):
            for leaf in leaves:
                leaf.requires_grad_(True)
            hidden: dict[str, Tensor] = {}
            error = masked_forward(student, x[i : i + 1], masks, hidden) - truth[i : i + 1]
            gradients = torch.autograd.grad(error.square().mean(), leaves)
            for score, gradient in zip(scores, gradients, strict=True):
                score += gradient.square()
            for name, value in hidden.items():
                mean = value.detach().mean((0, 2, 3))
                sums[name] = sums.get(name, torch.zeros_like(mean)) + mean
            pictures += 1
    ranked = iter([tuple(s.argsort(descending=True, stable=True).tolist()) for s in scores])
    return Ranking(
        next(ranked),
        tuple(next(ranked) for _ in masks.body),
        tuple(next(ranked) for _ in masks.tail_width),
        tuple(tuple(next(ranked) for _ in stage) for stage in masks.tail),
        {name: total / pictures for name, total in sums.items()},
    )


@torch.no_grad()
def mean_squared_error(student: Student, batches: Sequence[Batch]) -> float:
    """Mean squared error of the student over the batches, in its evaluation mode."""
    student.eval()
    total = sum(float((student(x) - truth).square().mean()) * len(x) for x, truth in batches)
    return total / sum(len(x) for x, _ in batches)


def narrowed(
    ranking: Ranking,
    stream: int,
    body: Sequence[int],
    tail_width: Sequence[int],
    tail: Sequence[Sequence[int]],
) -> Keep:
    """The keep with the best-ranked channels for the given widths; 0 drops a block."""

    def best(order: Channels, width: int) -> Channels:
        return tuple(sorted(order[:width]))

    return Keep(
        best(ranking.stream, stream),
        tuple(best(order, width) for order, width in zip(ranking.body, body, strict=True)),
        tuple(
            StageKeep(
                best(ranking.tail_width[s], tail_width[s]),
                tuple(best(order, w) for order, w in zip(ranking.tail[s], tail[s], strict=True)),
            )
            for s in range(len(tail_width))
        ),
    )
