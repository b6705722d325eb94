"""Hash grid in plain PyTorch: the reference implementation, and the fastest one on CPUs.

For each level, entries and trilinear weights of the eight corners around each point form two [n, 8]
arrays, and `embedding_bag` sums the corners. The backward pass of `embedding_bag` is slow, so this
module adds pairs of features to the table as complex numbers: one scattered addition per pair.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.grid_layout import INITIAL_RANGE, PRIMES, GridShape, Level


class TorchHashGrid(nn.Module):
    """Encoding of points in [0, 1]^3; differentiable in the table, not in the points."""

    def __init__(self, shape: GridShape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        self.levels = shape.placed_levels()
        table = torch.empty(shape.entries * shape.features_per_level)
        self.table = nn.Parameter(
            table.uniform_(-INITIAL_RANGE, INITIAL_RANGE, generator=generator)
        )

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n lf"]:  # noqa: D102
        table = self.table.view(-1, self.shape.features_per_level)
        return _Lookup.apply(table, points, self.levels)  # pyright: ignore[reportReturnType]


def corners(
    points: Float[Tensor, "3 n"], level: Level
) -> tuple[Int[Tensor, "n 8"], Float[Tensor, "n 8"]]:
    """Entries and trilinear weights of the eight lattice points around each point.

    Corner c takes the upper lattice point along x, y, z if bit 0, 1, 2 of c is set.
    """
    position = points * level.scale + 0.5
    cell = position.floor()
    upper_weight = position - cell
    weights = (1 - upper_weight, upper_weight)
    terms = _axis_terms(cell, level)
    combine = torch.bitwise_xor if level.hashed else torch.add
    shape = (points.shape[1], 8)
    entry = torch.empty(shape, dtype=terms[0].dtype, device=points.device)
    weight = torch.empty(shape, dtype=points.dtype, device=points.device)
    for z in (0, 1):
        for y in (0, 1):
            entry_yz = combine(terms[y][1], terms[z][2])
            weight_yz = weights[y][1] * weights[z][2]
            for x in (0, 1):
                corner = x + 2 * y + 4 * z
                combine(terms[x][0], entry_yz, out=entry[:, corner])
                torch.mul(weights[x][0], weight_yz, out=weight[:, corner])
    if not level.hashed:
        # Corners beyond the far side of the box wrap around, as in tiny-cuda-nn.
        entry.remainder_(level.size)
    return entry, weight


def _axis_terms(cell: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Summands (dense) or xor terms (hashed) of each axis, for the lower and upper lattice point."""
    r = level.resolution
    # Only the low bits of a product survive the modulo, so reduced primes give the same entries, and
    # their products often fit int32, which is twice as fast.
    factors = [p % level.size for p in PRIMES] if level.hashed else [1, r, r * r]
    narrow = max(factors) * (r + 1) < 2**31
    dtype = torch.int32 if narrow else torch.int64
    factor = torch.tensor(factors, dtype=dtype, device=cell.device)[:, None]
    lower = cell.to(dtype) * factor
    upper = lower + factor
    if level.hashed:
        lower, upper = lower & (level.size - 1), upper & (level.size - 1)
    return lower, upper


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, points: Tensor, levels: tuple[Level, ...]) -> Tensor:
        by_axis = points.t().contiguous()
        features, saved = [], []
        for level in levels:
            entry, weight = corners(by_axis, level)
            rows = table[level.offset : level.offset + level.size]
            features.append(F.embedding_bag(entry, rows, mode="sum", per_sample_weights=weight))
            saved += [entry, weight]
        ctx.levels, ctx.table_shape = levels, table.shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*saved)
        return torch.cat(features, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        saved = ctx.saved_tensors
        result = grad.new_zeros(ctx.table_shape)
        per_level = grad.view(len(grad), len(ctx.levels), -1).unbind(1)
        for level, grad_level, entry, weight in zip(
            ctx.levels, per_level, saved[::2], saved[1::2], strict=True
        ):
            rows = result[level.offset : level.offset + level.size]
            add_corners(rows, entry, weight, grad_level)
        return result, None, None


def add_corners(
    rows: Float[Tensor, "size f"],
    entry: Int[Tensor, "n 8"],
    weight: Float[Tensor, "n 8"],
    grad: Float[Tensor, "n f"],
) -> None:
    """Add weight * grad to `rows` in place: the transpose of the weighted lookup."""
    n, features = grad.shape
    flat = entry.view(-1)
    if features % 2:
        for f in range(features):
            rows[:, f].index_add_(0, flat, (weight * grad[:, f : f + 1]).view(-1))
        return
    pairs = torch.view_as_complex(rows.view(len(rows), -1, 2))
    product = torch.empty((n, 8, 2), dtype=grad.dtype, device=grad.device)
    for pair in range(features // 2):
        for f in (0, 1):
            torch.mul(weight, grad[:, 2 * pair + f, None], out=product[:, :, f])
        pairs[:, pair].index_add_(0, flat, torch.view_as_complex(product).view(-1))
