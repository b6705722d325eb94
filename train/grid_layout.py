"""Memory layout of the hash grid's table, identical to tiny-cuda-nn's.

Letters: level l has scale s_l = base * b^l - 1 and resolution r_l = ceil(s_l) + 1. A coordinate x in
[0, 1] lies at x * s_l + 0.5 in the level's lattice; the offset of 0.5 keeps the lattices of the levels
from aligning. A lattice point (x, y, z) is entry x + y r + z r^2 of its level if the table is large
enough for all points of the level (`dense`), otherwise x ^ y p1 ^ z p2 modulo the table's size
(`hashed`).

All implementations have the same parameter: one flat vector of entries * features values, one level
after the other, the features of an entry side by side. So they can load each other's weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightfield.errors import ConfigError

PRIMES = (1, 2654435761, 805459861)
INITIAL_RANGE = 1e-4
MOST_PARAMETERS = 2**31 - 1
"""The kernels index the table's values in 32 bits."""


@dataclass(frozen=True)
class Level:
    """One lattice and the slice [offset, offset + size) of the table that holds its features."""

    scale: float
    resolution: int
    offset: int
    size: int
    hashed: bool


@dataclass(frozen=True)
class GridShape:
    """Sizes of a hash grid."""

    levels: int
    features_per_level: int
    log2_table_size: int
    base_resolution: int
    finest_resolution: int

    def __post_init__(self) -> None:
        if min(self.levels, self.features_per_level) < 1 or self.base_resolution < 2:
            raise ConfigError(
                "needs at least 1 level, 1 feature per level and a base resolution of 2",
                where="hash grid",
            )
        if self.finest_resolution < self.base_resolution:
            raise ConfigError(
                f"the finest resolution {self.finest_resolution} is below the base resolution "
                f"{self.base_resolution}",
                where="hash grid",
            )
        if not 3 <= self.log2_table_size <= 24:
            raise ConfigError("log2 of the table size must be 3 to 24", where="hash grid")
        if self.entries * self.features_per_level > MOST_PARAMETERS:
            raise ConfigError(
                f"{self.entries:,} entries of {self.features_per_level} features are more than "
                f"{MOST_PARAMETERS:,} values",
                where="hash grid",
                remedy="choose fewer levels or features, or a smaller table",
            )

    @property
    def per_level_scale(self) -> float:
        """b, the factor between the scales of consecutive levels."""
        if self.levels == 1:
            return 1.0
        return math.exp(math.log(self.finest_resolution / self.base_resolution) / (self.levels - 1))

    @property
    def width(self) -> int:
        """Features per point, over all levels."""
        return self.levels * self.features_per_level

    @property
    def entries(self) -> int:
        """Entries of the table, over all levels."""
        last = self.placed_levels()[-1]
        return last.offset + last.size

    def placed_levels(self) -> tuple[Level, ...]:
        """All levels, coarse to fine, in the order of the table."""
        table_size = 1 << self.log2_table_size
        # float32 at each step, as in tiny-cuda-nn: the last bit can change a resolution.
        growth = np.float32(math.log2(np.float32(self.per_level_scale)))
        offset, placed = 0, []
        for index in range(self.levels):
            factor = np.float32(math.exp2(np.float32(index) * growth))
            scale = factor * np.float32(self.base_resolution) - np.float32(1)
            resolution = math.ceil(scale) + 1
            points = resolution**3
            size = min(-(-points // 8) * 8, table_size)
            placed.append(Level(float(scale), resolution, offset, size, points > table_size))
            offset += size
        return tuple(placed)
