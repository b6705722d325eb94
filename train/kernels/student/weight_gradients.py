"""Weight and bias gradients of many 1x1 convolutions in one launch: A^T B, and column sums of A.

Letters: A [R, M] is the gradient of a layer's output, B [R, N] the layer's input; both lie in one buffer
of activations. A program computes one tile of one layer's [M, N] gradient over a part of the rows.
Column sums are products with ones on tensor cores. Twin: `A.T @ B` and `A.sum(0)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.sums import add_to_sum, add_wide_to_sum

TILE_M = 128
TILE_N = 256
TILE_ROWS = 64
WARPS = 8
STAGES = 4
COLUMNS = 9
"""Columns of the table, which has one row per tile."""


@dataclass(frozen=True)
class Product:
    """One layer: offsets and widths of its A and B, and offsets of its weight and bias gradients."""

    a_at: int
    m: int
    b_at: int
    n: int
    weight_at: int
    bias_at: int


@triton.jit
def weight_gradients_kernel(
    activations_ptr,
    gradients_ptr,  # int64 sums
    table_ptr,
    rows,
    rows_per_program,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One tile [TILE_M, TILE_N] of one product A^T B, summed over one program's rows.

    Grid: [rows of the table, parts of the R rows]. Twin: `A.T @ B` and `A.sum(0)`.
    """
    dtype = activations_ptr.dtype.element_ty
    entry = table_ptr + 9 * tl.program_id(0)
    a_at = tl.multiple_of(tl.load(entry), 16)
    a_stride = tl.multiple_of(tl.load(entry + 1).to(tl.int32), 16)
    b_at = tl.multiple_of(tl.load(entry + 2), 16)
    b_stride = tl.multiple_of(tl.load(entry + 3).to(tl.int32), 16)
    weight_at = tl.load(entry + 4).to(tl.int32)
    weight_stride = tl.multiple_of(tl.load(entry + 5).to(tl.int32), 16)
    bias_at = tl.load(entry + 6).to(tl.int32)
    m_left = tl.multiple_of(tl.load(entry + 7).to(tl.int32), 16)
    n_left = tl.multiple_of(tl.load(entry + 8).to(tl.int32), 16)
    m, n = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    one = tl.arange(0, 16)
    ones = tl.full([TILE_ROWS, 16], 1.0, tl.float32).to(dtype)
    weight = tl.zeros([TILE_M, TILE_N], tl.float32)
    bias = tl.zeros([TILE_M, 16], tl.float32)
    first_row = tl.program_id(1) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, rows)
    a_ptr = activations_ptr + a_at + first_row.to(tl.int64) * a_stride
    b_ptr = activations_ptr + b_at + first_row.to(tl.int64) * b_stride
    r = tl.arange(0, TILE_ROWS)
    a_tile = r[:, None] * a_stride + m[None, :]
    b_tile = r[:, None] * b_stride + n[None, :]
    for _ in range(first_row, last_row, TILE_ROWS):
        a = tl.load(a_ptr + a_tile, mask=m[None, :] < m_left, other=0.0)
        b = tl.load(b_ptr + b_tile, mask=n[None, :] < n_left, other=0.0)
        transposed = tl.trans(a)
        weight = tl.dot(transposed, b, weight, input_precision="ieee")
        bias = tl.dot(transposed, ones, bias, input_precision="ieee")
        a_ptr += TILE_ROWS * a_stride
        b_ptr += TILE_ROWS * b_stride
    add_wide_to_sum(
        gradients_ptr,
        weight_at + m[:, None] * weight_stride + n[None, :],
        weight,
        (m[:, None] < m_left) & (n[None, :] < n_left),
        TILE_M,
        TILE_N,
    )
    add_to_sum(
        gradients_ptr + bias_at + m[:, None] + one[None, :],
        bias,
        (m[:, None] < m_left) & (one[None, :] == 0) & (bias_at >= 0),
    )


class WeightGradients:
    """Weight gradients of a stack of layers, planned once; `rows` is a multiple of TILE_ROWS."""

    def __init__(self, products: list[Product], rows: int, device: torch.device):
        assert rows % TILE_ROWS == 0
        widest = max(max(p.m, p.n) for p in products)
        self.tile_m = min(TILE_M, max(16, triton.next_power_of_2(widest)))
        self.tile_n = min(TILE_N, max(16, triton.next_power_of_2(widest)))
        self.rows = rows
        table = [
            (
                p.a_at + m, p.m, p.b_at + n, p.n, p.weight_at + m * p.n + n, p.n,
                p.bias_at + m if n == 0 else -1, p.m - m, p.n - n,
            )
            for p in products
            for m in range(0, p.m, self.tile_m)
            for n in range(0, p.n, self.tile_n)
        ]  # fmt: skip
        assert all(len(entry) == COLUMNS for entry in table)
        self.table = torch.tensor(table, dtype=torch.int64, device=device)
        splits = max(1, min(processors(device) // len(table), rows // (8 * TILE_ROWS)))
        self.rows_per_program = TILE_ROWS * triton.cdiv(rows // TILE_ROWS, splits)

    def add(self, activations: Tensor, gradients: Tensor) -> None:
        """Add all products to `gradients` (flat int64 sums)."""
        grid = (len(self.table), triton.cdiv(self.rows, self.rows_per_program))
        weight_gradients_kernel[grid](
            activations, gradients, self.table, self.rows, self.rows_per_program,
            TILE_M=self.tile_m, TILE_N=self.tile_n, TILE_ROWS=TILE_ROWS,
            num_warps=WARPS if self.tile_m >= 64 else 4, num_stages=STAGES,
        )  # fmt: skip
