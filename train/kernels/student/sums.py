"""Sums that many programs add to, and that do not depend on who comes first.

Floating-point addition is not associative, and programs end in any order; so gradients are summed as
fixed-point numbers in int64. Then the same steps on the same GPU give the same student bit for bit,
which makes a resumed training equal an uninterrupted one, and lets a search be replayed.

A sum may lie within +-2^19, where float32 gradients of a mean squared error never get, and is exact
to 2^-44 per number added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE = 2.0**44
"""What 1 is stored as."""
_ONE = tl.constexpr(ONE)


@triton.jit
def add_to_sum(sums_ptr, value, mask=None):
    """Add float32 numbers to sums, in any order with the same result."""
    tl.atomic_add(sums_ptr, (value * _ONE).to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def add_wide_to_sum(sums_ptr, at, value, mask, M: tl.constexpr, N: tl.constexpr):
    """`add_to_sum` of [M, N] tiles that as int64 would not fit a multiprocessor's shared memory."""
    left, right = _halves(value, M, N)
    left_at, right_at = _halves(at, M, N)
    left_mask, right_mask = _halves(mask, M, N)
    add_to_sum(sums_ptr + left_at, left, left_mask)
    add_to_sum(sums_ptr + right_at, right, right_mask)


@triton.jit
def _halves(tile, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), (0, 2, 1)))


@triton.jit
def sum_value(fixed):
    """A sum as float32."""
    return fixed.to(tl.float32) * (1.0 / _ONE)


def to_sums(values: Tensor) -> Tensor:
    """Float32 numbers as int64 sums."""
    return (values * ONE).to(torch.int64)


def values_of(sums: Tensor) -> Tensor:
    """Int64 sums as float32 numbers."""
    return sums.float() / ONE
