"""Deterministic sums over programs: fixed-point addition in int64.

Floating-point addition is not associative, and programs finish in any order, so gradients are summed
as fixed-point numbers in int64. The same steps on the same GPU then give the same student bit for bit:
a resumed training equals an uninterrupted one, and a search can be replayed.

Sums must lie within +-2^19, which gradients of a mean squared error never reach. Each summand is
rounded to a multiple of 2^-44.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE = 2.0**44
"""The fixed-point representation of 1."""
_ONE = tl.constexpr(ONE)


@triton.jit
def add_to_sum(sums_ptr, value, mask=None):
    """Add float32 values to sums; the result does not depend on the order."""
    tl.atomic_add(sums_ptr, (value * _ONE).to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def add_wide_to_sum(sums_ptr, at, value, mask, M: tl.constexpr, N: tl.constexpr):
    """`add_to_sum` in two halves, for [M, N] tiles whose int64 values exceed shared memory."""
    left, right = _halves(value, M, N)
    left_at, right_at = _halves(at, M, N)
    left_mask, right_mask = _halves(mask, M, N)
    add_to_sum(sums_ptr + left_at, left, left_mask)
    add_to_sum(sums_ptr + right_at, right, right_mask)


@triton.jit
def _halves(tile, M: tl.constexpr, N: tl.constexpr):
    """Left and right half [M, N / 2] of a tile [M, N]."""
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), (0, 2, 1)))


@triton.jit
def sum_value(fixed):
    """A sum as float32."""
    return fixed.to(tl.float32) * (1.0 / _ONE)


def to_sums(values: Tensor) -> Tensor:
    """Float32 values as int64 sums."""
    return (values * ONE).to(torch.int64)


def values_of(sums: Tensor) -> Tensor:
    """Int64 sums as float32 values."""
    return sums.float() / ONE
