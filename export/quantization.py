"""int8 quantization: grids of 256 levels for activations, one step per output channel for weights.

The values of a grid are step * (level - zero_point) for the levels -128 to 127. Weights are
symmetric, with zero_point 0 and levels -127 to 127, so that the integer sums of a runtime need no
correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Grid:
    """The values that int8 activations can have."""

    step: float
    zero_point: int

    @classmethod
    def between(cls, low: float, high: float) -> Grid:
        """The finest grid that covers a range; the range is widened to include zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (HIGHEST - LOWEST) or 1.0
        return cls(step, int(np.clip(round(LOWEST - low / step), LOWEST, HIGHEST)))

    def rounded(self, x: Tensor) -> Tensor:
        """Values rounded to the grid, as QuantizeLinear and DequantizeLinear round them."""
        levels = (x / self.step).round().add(self.zero_point).clamp(LOWEST, HIGHEST)
        return (levels - self.zero_point) * self.step


@dataclass(frozen=True)
class Quantized:
    """How a convolution is quantized: int8 weights, and int8 arithmetic if both grids are given."""

    input: Grid | None = None
    output: Grid | None = None

    @property
    def is_integer(self) -> bool:
        """Whether the arithmetic is int8."""
        return self.input is not None and self.output is not None


def quantized_weight(
    weight: Float[np.ndarray, "a b k k"], axis: int
) -> tuple[Int[np.ndarray, "a b k k"], Float[np.ndarray, " c"]]:
    """Weights as int8 levels, and the step of each output channel along `axis`."""
    others = tuple(other for other in range(4) if other != axis)
    largest = np.abs(weight).max(axis=others)
    steps = np.where(largest > 0, largest / HIGHEST, 1.0).astype(np.float32)
    shape = [-1 if other == axis else 1 for other in range(4)]
    return np.rint(weight / steps.reshape(shape)).astype(np.int8), steps


def quantized_bias(
    bias: Float[np.ndarray, " c"], steps: Float[np.ndarray, " c"], grid: Grid
) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """A bias in the units of the integer sums: int32 levels, and their steps."""
    units = (steps * np.float32(grid.step)).astype(np.float32)
    limit = 2**31 - 1
    levels = np.clip(np.rint(bias.astype(np.float64) / units), -limit, limit)
    return levels.astype(np.int32), units
