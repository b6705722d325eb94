"""A field asked by lanes that live long: a point to a lane, and what passes between lanes and tiles.

`train.gpu.lattice.interpolate` spreads points and levels over a tile, which suits a kernel that does
nothing else. Inside the renderer's loop Triton would carry the layout that its matrix units want back
into the lanes' own state, and work on each lane four times. Here lanes and tiles meet in a scratch of
each program's own in global memory, which stays in cache: some 200 bytes a point where the table's
corners take 4096. Whoever writes it is separated from whoever reads it by a barrier.

Scratch of a program of B lanes, int32: [16, B] pairs of features, [8, B] pairs of harmonics, [4, B]
float32 results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from train.gpu.lattice import level_numbers, packed, unpacked, weighted_corners, within_box

SCRATCH_ROWS = tl.constexpr(28)
HARMONICS_ROW = tl.constexpr(16)
RESULTS_ROW = tl.constexpr(24)


@triton.jit
def store_features(
    scratch, table, numbers, x, y, z, live,
    PADDED: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Look up all levels at points [B] of the box; points that are not `live` [B] get zeros.

    Rows of scratch beyond the last level, rounded up to four, are not written.
    """
    x, y, z = within_box(x), within_box(y), within_box(z)
    place = scratch + tl.arange(0, LANES)
    # Four levels' loads at a time are enough under way; unrolling all takes a minute to compile.
    for level in range(0, LEVELS, 4):
        a = _level(table, numbers + level, x, y, z, live, PADDED)
        b = _level(table, numbers + level + 1, x, y, z, live, PADDED)
        c = _level(table, numbers + level + 2, x, y, z, live, PADDED)
        d = _level(table, numbers + level + 3, x, y, z, live, PADDED)
        # All loads before a store, which the compiler would not move them across.
        tl.store(place + level * LANES, a)
        tl.store(place + (level + 1) * LANES, b)
        tl.store(place + (level + 2) * LANES, c)
        tl.store(place + (level + 3) * LANES, d)


@triton.jit
def _level(table, numbers, x, y, z, live, PADDED: tl.constexpr):
    """Both features of the level whose numbers these are, packed."""
    scale, resolution, offset, size, hashed = level_numbers(numbers, 0, PADDED=PADDED)
    sum_0, sum_1 = weighted_corners(
        table, x, y, z, scale, resolution, offset, size, hashed, live & (size > 0)
    )
    return packed(sum_0.to(tl.float16), sum_1.to(tl.float16))


@triton.jit
def load_pairs(scratch, ROW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The two halves of `ROWS` rows of pairs: float16 tiles [B, ROWS]."""
    place = (tl.arange(0, ROWS) + ROW)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low, high = unpacked(tl.load(scratch + place))
    return tl.trans(low), tl.trans(high)


@triton.jit
def load_harmonics(scratch, LANES: tl.constexpr):
    """Harmonics [B, 16], float16: row j of the scratch holds harmonics j and j + 8."""
    column = tl.arange(0, 16)
    place = (column % 8 + HARMONICS_ROW)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low, high = unpacked(tl.load(scratch + place))
    lower = (column < 8)[:, None]
    tile = tl.where(lower, low, high)
    return tl.trans(tile)


@triton.jit
def store_harmonics(scratch, x, y, z, live, LANES: tl.constexpr):
    """Spherical harmonics of unit vectors [B], as `train.spherical_harmonics`, where `live`."""
    xx, yy, zz = x * x, y * y, z * z
    xy, yz, xz = x * y, y * z, x * z
    place = scratch + HARMONICS_ROW * LANES + tl.arange(0, LANES)
    h0, h8 = 0.28209479177387814 + 0 * x, 0.5462742152960396 * (xx - yy)
    h1, h9 = -0.4886025119029199 * y, 0.5900435899266435 * y * (yy - 3 * xx)
    h2, h10 = 0.4886025119029199 * z, 2.890611442640554 * xy * z
    h3, h11 = -0.4886025119029199 * x, 0.4570457994644658 * y * (1 - 5 * zz)
    h4, h12 = 1.0925484305920792 * xy, 0.3731763325901154 * z * (5 * zz - 3)
    h5, h13 = -1.0925484305920792 * yz, 0.4570457994644658 * x * (1 - 5 * zz)
    h6, h14 = 0.31539156525252005 * (3 * zz - 1), 1.445305721320277 * z * (xx - yy)
    h7, h15 = -1.0925484305920792 * xz, 0.5900435899266435 * x * (3 * yy - xx)
    tl.store(place, _halves(h0, h8), mask=live)
    tl.store(place + LANES, _halves(h1, h9), mask=live)
    tl.store(place + 2 * LANES, _halves(h2, h10), mask=live)
    tl.store(place + 3 * LANES, _halves(h3, h11), mask=live)
    tl.store(place + 4 * LANES, _halves(h4, h12), mask=live)
    tl.store(place + 5 * LANES, _halves(h5, h13), mask=live)
    tl.store(place + 6 * LANES, _halves(h6, h14), mask=live)
    tl.store(place + 7 * LANES, _halves(h7, h15), mask=live)


@triton.jit
def _halves(low, high):
    return packed(low.to(tl.float16), high.to(tl.float16))


@triton.jit
def store_results(scratch, h, emitted, LANES: tl.constexpr):
    """Three colours, of columns 0 to 2 of `emitted` [B, 16], and column 0 of `h` [B, 16]."""
    column = tl.arange(0, 16)[None, :]
    place = scratch + RESULTS_ROW * LANES + tl.arange(0, LANES)[:, None] + column * LANES
    tl.store(place, emitted.to(tl.int32, bitcast=True), mask=column < 3)
    tl.store(place + 3 * LANES, h.to(tl.int32, bitcast=True), mask=column == 0)


@triton.jit
def load_results(scratch, LANES: tl.constexpr):
    """Red, green, blue and geometry feature 0, float32 [B]."""
    place = scratch + RESULTS_ROW * LANES + tl.arange(0, LANES)
    red, green = tl.load(place), tl.load(place + LANES)
    blue, h = tl.load(place + 2 * LANES), tl.load(place + 3 * LANES)
    return (
        red.to(tl.float32, bitcast=True),
        green.to(tl.float32, bitcast=True),
        blue.to(tl.float32, bitcast=True),
        h.to(tl.float32, bitcast=True),
    )
