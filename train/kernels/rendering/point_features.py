"""Exchange of features and results between one-point-per-lane code and tiles of the networks.

`train.kernels.field.lattice.interpolate` distributes points and levels over a tile, which suits a kernel
that does nothing else. Inside the renderer's loop Triton would propagate the layout of the tensor cores
to the lanes' state and compute each lane four times. So lanes and tiles exchange their values through a
scratch in global memory, one per program, which stays in cache: about 200 bytes per point, where the
corners of the table take 4096. A barrier separates writes from reads.

Scratch of a program of B lanes, int32: [16, B] pairs of features, [8, B] pairs of harmonics, [4, B]
float32 results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from train.kernels.field.lattice import (
    level_numbers,
    packed,
    unpacked,
    weighted_corners,
    within_box,
)
from train.kernels.field.rays import harmonics

SCRATCH_ROWS = tl.constexpr(28)
HARMONICS_ROW = tl.constexpr(16)
RESULTS_ROW = tl.constexpr(24)


@triton.jit
def store_features(
    scratch, table, numbers, x, y, z, live,
    PADDED: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the features of all levels at points [B]; points outside the mask `live` [B] get zeros.

    Rows of the scratch beyond the last level, rounded up to four, are not written. Twin:
    `train.kernels.field.lattice.interpolate`.
    """
    x, y, z = within_box(x), within_box(y), within_box(z)
    slot = scratch + tl.arange(0, LANES)
    # Four levels hide the latency of loads; unrolling all levels takes a minute to compile.
    for level in range(0, LEVELS, 4):
        a = _level(table, numbers + level, x, y, z, live, PADDED)
        b = _level(table, numbers + level + 1, x, y, z, live, PADDED)
        c = _level(table, numbers + level + 2, x, y, z, live, PADDED)
        d = _level(table, numbers + level + 3, x, y, z, live, PADDED)
        # All loads come first, because the compiler does not move loads across a store.
        tl.store(slot + level * LANES, a)
        tl.store(slot + (level + 1) * LANES, b)
        tl.store(slot + (level + 2) * LANES, c)
        tl.store(slot + (level + 3) * LANES, d)


@triton.jit
def _level(table, numbers, x, y, z, live, PADDED: tl.constexpr):
    """Features of one level at points [B], packed; `numbers` points to the level's column."""
    scale, resolution, offset, size, hashed = level_numbers(numbers, 0, PADDED=PADDED)
    sum_0, sum_1 = weighted_corners(
        table, x, y, z, scale, resolution, offset, size, hashed, live & (size > 0)
    )
    return packed(sum_0.to(tl.float16), sum_1.to(tl.float16))


@triton.jit
def load_pairs(scratch, ROW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Low and high halves of `ROWS` rows of pairs: two float16 tiles [B, ROWS]."""
    slot = (tl.arange(0, ROWS) + ROW)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low, high = unpacked(tl.load(scratch + slot))
    return tl.trans(low), tl.trans(high)


@triton.jit
def load_harmonics(scratch, LANES: tl.constexpr):
    """Harmonics [B, 16] (float16); row j of the scratch holds harmonics j and j + 8."""
    column = tl.arange(0, 16)
    slot = (column % 8 + HARMONICS_ROW)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low, high = unpacked(tl.load(scratch + slot))
    lower = (column < 8)[:, None]
    tile = tl.where(lower, low, high)
    return tl.trans(tile)


@triton.jit
def store_harmonics(scratch, x, y, z, live, LANES: tl.constexpr):
    """Write the spherical harmonics of unit vectors [B] where `live`."""
    values = harmonics(x, y, z)
    slot = scratch + HARMONICS_ROW * LANES + tl.arange(0, LANES)
    for j in tl.static_range(8):
        pair = packed(values[j].to(tl.float16), values[j + 8].to(tl.float16))
        tl.store(slot + j * LANES, pair, mask=live)


@triton.jit
def store_results(scratch, h, emitted, LANES: tl.constexpr):
    """Write columns 0 to 2 of `emitted` [B, 16] (colors) and column 0 of `h` [B, 16]."""
    column = tl.arange(0, 16)[None, :]
    slot = scratch + RESULTS_ROW * LANES + tl.arange(0, LANES)[:, None] + column * LANES
    tl.store(slot, emitted.to(tl.int32, bitcast=True), mask=column < 3)
    tl.store(slot + 3 * LANES, h.to(tl.int32, bitcast=True), mask=column == 0)


@triton.jit
def load_results(scratch, LANES: tl.constexpr):
    """Red, green, blue and geometry feature 0, each float32 [B]."""
    slot = scratch + RESULTS_ROW * LANES + tl.arange(0, LANES)
    red, green = tl.load(slot), tl.load(slot + LANES)
    blue, h = tl.load(slot + 2 * LANES), tl.load(slot + 3 * LANES)
    return (
        red.to(tl.float32, bitcast=True),
        green.to(tl.float32, bitcast=True),
        blue.to(tl.float32, bitcast=True),
        h.to(tl.float32, bitcast=True),
    )
