"""Sums of many programs: exact, and the same in every order."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from train.kernels.student.sums import add_to_sum, add_wide_to_sum, sum_value, to_sums, values_of

PROGRAMS, M, N = 300, 16, 32


@triton.jit
def summing_kernel(
    values_ptr, sums_ptr, order_ptr, M: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr
):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(values_ptr + tl.load(order_ptr + tl.program_id(0)) * M * N + at)
    mask = at % 7 != 0
    if WIDE:
        add_wide_to_sum(sums_ptr, at, value, mask, M, N)
    else:
        add_to_sum(sums_ptr + at, value, mask)


@triton.jit
def values_kernel(sums_ptr, values_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(values_ptr + i, sum_value(tl.load(sums_ptr + i)))


@pytest.mark.parametrize("wide", [False, True])
def test_sums_are_exact_and_the_same_in_any_order(device, wide):
    torch.manual_seed(0)
    values = torch.randn(PROGRAMS, M, N, device=device) * 10 ** torch.randn(M, N, device=device)
    found = []
    for seed in range(2):
        order = torch.randperm(PROGRAMS, generator=torch.Generator().manual_seed(seed)).to(device)
        sums = torch.zeros(M, N, dtype=torch.int64, device=device)
        summing_kernel[(PROGRAMS,)](values, sums, order, M=M, N=N, WIDE=wide)
        found.append(sums)
    assert torch.equal(*found)
    expected = values.double().sum(0)
    expected.flatten()[::7] = 0
    error = found[0].double() / 2**44 - expected
    assert error.abs().max() <= PROGRAMS * 2**-44
    there = torch.empty(M, N, device=device)
    values_kernel[(1,)](found[0], there, SIZE=M * N)
    assert torch.equal(there, values_of(found[0]))
    assert torch.equal(values_of(to_sums(there)), there)
