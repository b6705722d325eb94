"""Lattices of the hash grid: device functions that look up and interpolate the table.

Letters: B points, L levels padded to a power of two P, x, y, z in [0, 1]. Layout and order of the
arithmetic are those of `train.grid_layout` and of the twin `train.hash_grid.torch`. The table is
float16 with two features per entry, read as int32: one 4-byte load gives both features (feature 0 in
the low half).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightfield.errors import ConfigError
from train.grid_layout import GridShape

FEATURES = 2
MAX_LEVELS = 16
MAX_RESOLUTION = 1 << 24
"""Largest resolution at which float32 distinguishes neighboring lattice points. A level has at most
2^24 entries, so all indices into the table (at most 2^28 pairs) fit int32."""

PRIME_Y = tl.constexpr(2654435761)
PRIME_Z = tl.constexpr(805459861)


@dataclass(frozen=True)
class DeviceLevels:
    """Table of the levels on the device: rows of scale (float32 bits), resolution, offset, size, hashed.

    Columns beyond the last level have size 0, and the kernels return 0 as their features.
    """

    numbers: Tensor
    """int32 [5, padded]"""
    count: int
    padded: int

    @classmethod
    def of(cls, shape: GridShape, device: torch.device | str) -> DeviceLevels:
        """The levels of a grid.

        Raises:
            ConfigError: when the kernels do not support the grid's shape.
        """
        if (reason := unsupported(shape)) is not None:
            raise ConfigError(reason, where="grid triton", remedy="choose grid torch")
        levels, padded = shape.placed_levels(), MAX_LEVELS
        numbers = torch.zeros((5, padded), dtype=torch.int32)
        for index, level in enumerate(levels):
            row = (level.resolution, level.offset, level.size, int(level.hashed))
            numbers[1:, index] = torch.tensor(row, dtype=torch.int32)
        scales = torch.tensor([level.scale for level in levels], dtype=torch.float32)
        numbers[0, : len(levels)] = scales.view(torch.int32)
        return cls(numbers.to(device), len(levels), padded)


def unsupported(shape: GridShape) -> str | None:
    """The reason why the kernels cannot compute a grid of this shape, or None when they can."""
    if shape.features_per_level != FEATURES:
        return f"the kernels need {FEATURES} features per level, not {shape.features_per_level}"
    if shape.levels > MAX_LEVELS:
        return f"the kernels support at most {MAX_LEVELS} levels, not {shape.levels}"
    if shape.finest_resolution > MAX_RESOLUTION:
        return f"the kernels support resolutions up to {MAX_RESOLUTION}"
    return None


@triton.jit
def level_numbers(numbers, level, PADDED: tl.constexpr):
    """Scale, resolution, offset, size and `hashed` of one level, or of a tile of levels."""
    scale = tl.load(numbers + level).to(tl.float32, bitcast=True)
    resolution = tl.load(numbers + PADDED + level).to(tl.uint32)
    offset = tl.load(numbers + 2 * PADDED + level)
    size = tl.load(numbers + 3 * PADDED + level).to(tl.uint32)
    hashed = tl.load(numbers + 4 * PADDED + level) != 0
    return scale, resolution, offset, size, hashed


@triton.jit
def within_box(x):
    """The coordinate clamped to [0, 1], so that no address leaves the table."""
    return tl.where(x > 0, tl.minimum(x, 1.0), 0.0)  # NaN becomes 0


@triton.jit
def lattice_position(x, scale):
    """The lattice point below a coordinate (uint32), and the weight of the lattice point above."""
    position = x * scale + 0.5
    cell = tl.floor(position)
    return cell.to(tl.int32).to(tl.uint32), position - cell


@triton.jit
def corner_entry(x, y, z, resolution, size, hashed):
    """Entry of a lattice point within its level; all values are uint32."""
    dense = x + resolution * (y + resolution * z)
    # A point beyond the far side of the box wraps around, at most once: r^3 + r^2 + r < 2 size.
    dense = tl.where(dense >= size, dense - size, dense)
    scattered = (x ^ (y * PRIME_Y) ^ (z * PRIME_Z)) & (size - 1)
    return tl.where(hashed, scattered, dense)


@triton.jit
def unpacked(pair):
    """The two float16 values of an int32."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def packed(low, high):
    """Two float16 values as an int32."""
    low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def entry_features(table, entry, mask):
    """Features 0 and 1 of entries of a float32 table, or of an int32 table of float16 pairs."""
    if table.dtype.element_ty == tl.int32:
        return unpacked(tl.load(table + entry, mask=mask, other=0))
    else:  # noqa: RET505  (Triton compiles only one branch)
        feature_0 = tl.load(table + 2 * entry, mask=mask, other=0.0)
        feature_1 = tl.load(table + 2 * entry + 1, mask=mask, other=0.0)
        return feature_0, feature_1


@triton.jit
def weighted_corners(table, x, y, z, scale, resolution, offset, size, hashed, mask):
    """Features 0 and 1 (float32) at points in [0, 1], interpolated between eight corners.

    Twin: `train.hash_grid.torch.corners` and `embedding_bag`.
    """
    cell_x, upper_x = lattice_position(x, scale)
    cell_y, upper_y = lattice_position(y, scale)
    cell_z, upper_z = lattice_position(z, scale)
    sum_0 = tl.zeros_like(upper_x)
    sum_1 = tl.zeros_like(upper_x)
    for corner in tl.static_range(8):
        weight_x = upper_x if corner & 1 else 1 - upper_x
        weight_y = upper_y if corner & 2 else 1 - upper_y
        weight_z = upper_z if corner & 4 else 1 - upper_z
        entry = corner_entry(
            cell_x + (corner & 1),
            cell_y + ((corner >> 1) & 1),
            cell_z + (corner >> 2),
            resolution,
            size,
            hashed,
        )
        feature_0, feature_1 = entry_features(table, offset + entry.to(tl.int32), mask)
        weight = weight_x * (weight_y * weight_z)
        sum_0 += weight * feature_0.to(tl.float32)
        sum_1 += weight * feature_1.to(tl.float32)
    return sum_0, sum_1


@triton.jit
def interpolate(table, numbers, x, y, z, live, PADDED: tl.constexpr):
    """Features 0 and 1 of all levels at points x, y, z [B]: two float16 tiles [B, P].

    `table` is int32; points outside the mask `live` [B] get zeros.
    """
    scale, resolution, offset, size, hashed = level_numbers(
        numbers, tl.arange(0, PADDED), PADDED=PADDED
    )
    # Tiles are [P, B]: neighboring threads then hold neighboring points, which share cache lines.
    sum_0, sum_1 = weighted_corners(
        table,
        within_box(x)[None, :],
        within_box(y)[None, :],
        within_box(z)[None, :],
        scale[:, None],
        resolution[:, None],
        offset[:, None],
        size[:, None],
        hashed[:, None],
        live[None, :] & (size > 0)[:, None],
    )
    return tl.trans(sum_0.to(tl.float16)), tl.trans(sum_1.to(tl.float16))
