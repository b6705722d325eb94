"""Hash grid in Triton: `encode` reads the table at points, `scatter` adds the table's gradient.

Letters: M the capacity of a buffer of samples, of which the first `count` (an int32 on the device) are
used; L levels. Points are [3, M] float32 in [0, 1]; features and their gradients are [L, M, 2]: the
values of one level are contiguous over the samples. A program handles one level, and the programs of
a level run at the same time, so the level's slice of the table stays in the L2 cache. Table, features
and gradients are all float16 or all float32. Twin: `train.hash_grid.torch`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor, nn

from train.grid_layout import INITIAL_RANGE, GridShape
from train.kernels.availability import INTERPRETED
from train.kernels.field.lattice import (
    DeviceLevels,
    corner_entry,
    lattice_position,
    level_numbers,
    packed,
    unpacked,
    weighted_corners,
    within_box,
)
from train.kernels.field.networks import narrowed

ENCODE_BLOCK, ENCODE_WARPS = 256, 4
SCATTER_ROWS, SCATTER_RUN, SCATTER_WARPS = 64, 8, 4
"""A row is RUN consecutive samples; one thread per corner iterates over a row."""
VECTOR_ADDS_SINCE = (9, 0)
"""Lowest compute capability with an atomic addition of two float32."""


def encode(
    points: Float[Tensor, "3 m"],
    table: Tensor,
    levels: DeviceLevels,
    count: Int32[Tensor, "1"],
    features: Float[Tensor, "l m 2"],
    *,
    block: int = ENCODE_BLOCK,
    warps: int = ENCODE_WARPS,
) -> None:
    """Write the features of the first `count` points; `table` and `features` have the same type."""
    capacity = points.shape[1]
    _encode[triton.cdiv(capacity, block), levels.count](
        points,
        words(table),
        levels.numbers,
        words(features),
        count,
        capacity,
        BLOCK=block,
        PADDED=levels.padded,
        num_warps=warps,
    )


def scatter(
    points: Float[Tensor, "3 m"],
    gradients: Float[Tensor, "l m 2"],
    levels: DeviceLevels,
    count: Int32[Tensor, "1"],
    table_gradient: Tensor,
    *,
    rows: int = SCATTER_ROWS,
    run: int = SCATTER_RUN,
    warps: int = SCATTER_WARPS,
) -> None:
    """Add to the gradient of the table, from the gradient of the first `count` features."""
    assert rows * 8 >= warps * 32, "with fewer elements than threads, some would be added twice"
    capacity = points.shape[1]
    _scatter[triton.cdiv(capacity, rows * run), levels.count](
        points,
        words(gradients),
        table_gradient,
        levels.numbers,
        count,
        capacity,
        ROWS=rows,
        RUN=run,
        PADDED=levels.padded,
        VECTOR=_adds_vectors(table_gradient),
        num_warps=warps,
    )


def words(pairs: Tensor) -> Tensor:
    """A float16 tensor of pairs as int32, one per pair; a float32 tensor unchanged."""
    return pairs.view(torch.int32) if pairs.dtype == torch.float16 else pairs


def _adds_vectors(table_gradient: Tensor) -> bool:
    if INTERPRETED or table_gradient.device.type != "cuda" or torch.version.cuda is None:
        return False
    if table_gradient.dtype == torch.float16:
        return True
    return torch.cuda.get_device_capability(table_gradient.device) >= VECTOR_ADDS_SINCE


class TritonHashGrid(nn.Module):
    """Encoding of points in [0, 1]^3 in float32; differentiable in the table, not in the points.

    Raises:
        ConfigError: when the kernels do not support the shape.
    """

    def __init__(self, shape: GridShape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        self.levels = DeviceLevels.of(shape, "cpu")
        table = torch.empty(shape.entries * shape.features_per_level)
        self.table = nn.Parameter(
            table.uniform_(-INITIAL_RANGE, INITIAL_RANGE, generator=generator)
        )

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n lf"]:  # noqa: D102
        if self.levels.numbers.device != points.device:
            self.levels = DeviceLevels.of(self.shape, points.device)
        return _Lookup.apply(self.table, points, self.levels)  # pyright: ignore[reportReturnType]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, points: Tensor, levels: DeviceLevels) -> Tensor:
        n = len(points)
        by_axis = points.detach().float().t().contiguous()
        count = torch.full((1,), n, dtype=torch.int32, device=points.device)
        features = torch.empty((levels.count, n, 2), device=points.device)
        if n:
            encode(by_axis, table.detach(), levels, count, features)
        ctx.levels, ctx.table_shape = levels, table.shape
        ctx.save_for_backward(by_axis, count)
        return features.transpose(0, 1).reshape(n, 2 * levels.count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        by_axis, count = ctx.saved_tensors
        result = torch.zeros(ctx.table_shape, device=grad.device)
        per_level = (
            grad.float().reshape(len(grad), ctx.levels.count, 2).transpose(0, 1).contiguous()
        )
        if len(grad):
            scatter(by_axis, per_level, ctx.levels, count, result)
        return result, None, None


@triton.jit
def _encode(points, table, numbers, features, count, capacity,
            BLOCK: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Features [L, M, 2] of points [3, M]: trilinear interpolation in a level's lattice.

    Grid: [blocks of BLOCK samples, L]. Twin: `train.hash_grid.torch.TorchHashGrid`.
    """
    start = tl.program_id(0) * BLOCK
    level = tl.program_id(1)
    used = tl.load(count)
    if start >= used:
        return
    scale, resolution, offset, size, hashed = level_numbers(numbers, level, PADDED)
    sample = start + tl.arange(0, BLOCK)
    live = sample < used
    x = within_box(tl.load(points + sample, mask=live, other=0.0))
    y = within_box(tl.load(points + capacity + sample, mask=live, other=0.0))
    z = within_box(tl.load(points + 2 * capacity + sample, mask=live, other=0.0))
    feature_0, feature_1 = weighted_corners(
        table, x, y, z, scale, resolution, offset, size, hashed, live
    )
    row = level.to(tl.int64) * capacity
    if features.dtype.element_ty == tl.int32:
        pair = packed(feature_0.to(tl.float16), feature_1.to(tl.float16))
        tl.store(features + row + sample, pair, mask=live)
    else:
        tl.store(features + 2 * (row + sample), feature_0, mask=live)
        tl.store(features + 2 * (row + sample) + 1, feature_1, mask=live)


@triton.jit
def _scatter(points, gradients, table_gradient, numbers, count, capacity,
             ROWS: tl.constexpr, RUN: tl.constexpr, PADDED: tl.constexpr,
             VECTOR: tl.constexpr):  # fmt: skip
    """Table gradient [entries, 2] from feature gradients [L, M, 2] at points [3, M].

    Grid: [blocks of ROWS * RUN samples, L]. A thread handles one corner of RUN consecutive samples,
    and sums in registers as long as the corner's entry stays the same. The thread's corner is chosen
    by the parity of the lattice point: a step into a neighboring cell then changes the entries of
    four of the eight threads instead of all. Twin: `train.hash_grid.torch.add_corners`.
    """
    start = tl.program_id(0) * (ROWS * RUN)
    level = tl.program_id(1)
    used = tl.load(count)
    if start >= used:
        return
    scale, resolution, offset, size, hashed = level_numbers(numbers, level, PADDED)
    corner = tl.arange(0, 8).to(tl.uint32)[None, :]
    row = start + tl.arange(0, ROWS) * RUN
    gradient_row = level.to(tl.int64) * capacity
    held = tl.zeros((ROWS, 8), dtype=tl.int32)
    sum_0 = tl.zeros((ROWS, 8), dtype=tl.float32)
    sum_1 = tl.zeros((ROWS, 8), dtype=tl.float32)
    for step in range(RUN):
        sample = row + step
        live = sample < used
        gradient_0, gradient_1 = _gradient_pair(gradients, gradient_row + sample, live)
        x = within_box(tl.load(points + sample, mask=live, other=0.0))[:, None]
        y = within_box(tl.load(points + capacity + sample, mask=live, other=0.0))[:, None]
        z = within_box(tl.load(points + 2 * capacity + sample, mask=live, other=0.0))[:, None]
        x, weight_x = _corner_along(x, scale, corner)
        y, weight_y = _corner_along(y, scale, corner >> 1)
        z, weight_z = _corner_along(z, scale, corner >> 2)
        entry = offset + corner_entry(x, y, z, resolution, size, hashed).to(tl.int32)
        matters = ((gradient_0 != 0) | (gradient_1 != 0))[:, None]
        leaves = matters & (entry != held)
        _add(table_gradient, held, sum_0, sum_1, leaves, VECTOR)
        held = tl.where(leaves, entry, held)
        weight = weight_x * (weight_y * weight_z)
        sum_0 = tl.where(leaves, 0.0, sum_0) + weight * gradient_0[:, None]
        sum_1 = tl.where(leaves, 0.0, sum_1) + weight * gradient_1[:, None]
    _add(table_gradient, held, sum_0, sum_1, held >= 0, VECTOR)


@triton.jit
def _gradient_pair(gradients, index, live):
    """Gradients of features 0 and 1 at `index`, float32; zero where not `live`."""
    if gradients.dtype.element_ty == tl.int32:
        low, high = unpacked(tl.load(gradients + index, mask=live, other=0))
        return low.to(tl.float32), high.to(tl.float32)
    else:  # noqa: RET505  (Triton compiles only one branch)
        low = tl.load(gradients + 2 * index, mask=live, other=0.0)
        high = tl.load(gradients + 2 * index + 1, mask=live, other=0.0)
        return low, high


@triton.jit
def _corner_along(x, scale, parity):
    """The lattice point next to x whose parity is bit 0 of `parity`, and its weight."""
    cell, upper = lattice_position(x, scale)
    above = (cell ^ parity) & 1
    return cell + above, tl.where(above != 0, upper, 1 - upper)


@triton.jit
def _add(table_gradient, entry, value_0, value_1, mask, VECTOR: tl.constexpr):
    """Add pairs of values to the table's gradient where `mask` holds and a value is not zero."""
    mask = mask & ((value_0 != 0) | (value_1 != 0))
    HALF: tl.constexpr = table_gradient.dtype.element_ty == tl.float16
    target = table_gradient + 2 * entry
    if HALF:
        value_0 = narrowed(value_0)
        value_1 = narrowed(value_1)
    if VECTOR and HALF:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $3, 0;
            @p red.relaxed.gpu.global.add.noftz.f16x2 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r",
            [target.to(tl.int64), packed(value_0, value_1), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    elif VECTOR:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $4, 0;
            @p red.relaxed.gpu.global.add.v2.f32 [$1], {$2, $3};
            mov.u32 $0, 0;
            }""",
            "=r,l,f,f,r",
            [target.to(tl.int64), value_0, value_1, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(target, value_0, mask=mask, sem="relaxed")
        tl.atomic_add(target + 1, value_1, mask=mask, sem="relaxed")
