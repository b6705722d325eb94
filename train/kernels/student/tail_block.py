"""Narrow residual blocks, of the student's tail, where memory is the limit: one pass over it.

Letters as in `train.kernels.student.residual_block`; C and I are powers of two from 16 to 64. Forward
keeps x only; backward reads x and dy once, computes the rest again, and sums the weights' gradients in
the registers of programs that live as long as there are rows. Products with ones sum over rows, which
tensor cores do for little. Twin: `lightfield.student.ResidualBlock`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.activation import activate
from train.kernels.student.sums import add_to_sum

WIDEST = 64
"""Widest stream and inner width of the narrow kernels."""
FORWARD_SIZE = 4096
"""Numbers in a forward tile."""
BACKWARD_ROWS = 64
"""Of 128 rows and 64 channels, registers would spill."""
WARPS = 4
STAGES = 3
FORWARD_PROGRAMS = 3
"""Per multiprocessor, as many as fit."""
BACKWARD_PROGRAMS = {16: 4, 32: 3, 64: 2}
"""Per multiprocessor, by width."""


@triton.jit
def narrow_forward_kernel(
    x_ptr,
    y_ptr,
    weights_ptr,
    w1_at,
    b1_at,
    w2_at,
    b2_at,
    rows,
    C: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One residual block, y from x."""
    dtype = x_ptr.dtype.element_ty
    c, i = tl.arange(0, C), tl.arange(0, INNER)
    w1 = tl.load(weights_ptr + w1_at + i[:, None] * C + c[None, :])
    w2 = tl.load(weights_ptr + w2_at + c[:, None] * INNER + i[None, :])
    b1 = tl.load(weights_ptr + b1_at + i).to(tl.float32)
    b2 = tl.load(weights_ptr + b2_at + c).to(tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        r = tile * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=r[:, None] < rows, other=0.0)
        h = tl.dot(x, tl.trans(w1), input_precision=PRECISION) + b1[None, :]
        g, _ = activate(h, KIND)
        y = tl.dot(g.to(dtype), tl.trans(w2), input_precision=PRECISION)
        y += b2[None, :] + x.to(tl.float32)
        tl.store(y_ptr + at, y.to(dtype), mask=r[:, None] < rows)


@triton.jit
def narrow_backward_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    weights_ptr,
    gradients_ptr,  # sums, laid out as the weights
    w1_at,
    b1_at,
    w2_at,
    b2_at,
    rows,
    C: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One residual block, dx from x and dy; adds the weights' gradients."""
    dtype = x_ptr.dtype.element_ty
    c, i = tl.arange(0, C), tl.arange(0, INNER)
    one = tl.arange(0, 16)
    at1 = i[:, None] * C + c[None, :]
    at2 = c[:, None] * INNER + i[None, :]
    w1 = tl.load(weights_ptr + w1_at + at1)
    w2 = tl.load(weights_ptr + w2_at + at2)
    b1 = tl.load(weights_ptr + b1_at + i).to(tl.float32)
    gw1 = tl.zeros([INNER, C], tl.float32)
    gw2 = tl.zeros([C, INNER], tl.float32)
    gb1 = tl.zeros([INNER, 16], tl.float32)
    gb2 = tl.zeros([C, 16], tl.float32)
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(dtype)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        r = tile * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=r[:, None] < rows, other=0.0)
        dy = tl.load(dy_ptr + at, mask=r[:, None] < rows, other=0.0)
        h = tl.dot(x, tl.trans(w1), input_precision=PRECISION) + b1[None, :]
        g, slope = activate(h, KIND)
        dh = (tl.dot(dy, w2, input_precision=PRECISION) * slope).to(dtype)
        dx = tl.dot(dh, w1, input_precision=PRECISION) + dy.to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dtype), mask=r[:, None] < rows)
        turned = tl.trans(dh)
        gw1 = tl.dot(turned, x, gw1, input_precision=PRECISION)
        gb1 = tl.dot(turned, ones, gb1, input_precision=PRECISION)
        turned = tl.trans(dy)
        gw2 = tl.dot(turned, g.to(dtype), gw2, input_precision=PRECISION)
        gb2 = tl.dot(turned, ones, gb2, input_precision=PRECISION)
    add_to_sum(gradients_ptr + w1_at + at1, gw1)
    add_to_sum(gradients_ptr + w2_at + at2, gw2)
    first = one[None, :] == 0
    add_to_sum(gradients_ptr + b1_at + i[:, None] + one[None, :], gb1, first)
    add_to_sum(gradients_ptr + b2_at + c[:, None] + one[None, :], gb2, first)


def narrow_forward(
    x: Tensor, y: Tensor, weights: Tensor, places: tuple[int, int, int, int], inner: int, kind: int
) -> None:
    """y [R, C] of one block; `places` are where W1, b1, W2, b2 begin in `weights`."""
    rows, channels = x.shape
    tile = FORWARD_SIZE // max(channels, inner)
    programs = FORWARD_PROGRAMS * processors(x.device)
    narrow_forward_kernel[(min(triton.cdiv(rows, tile), programs),)](
        x, y, weights, *places, rows,
        C=channels, INNER=inner, ROWS=tile, KIND=kind, PRECISION="ieee",
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip


def narrow_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    weights: Tensor,
    gradients: Tensor,
    places: tuple[int, int, int, int],
    inner: int,
    kind: int,
) -> None:
    """dx [R, C] of one block, which may be dy; adds its weights' gradients to sums."""
    rows, channels = x.shape
    programs = BACKWARD_PROGRAMS[max(channels, inner)] * processors(x.device)
    narrow_backward_kernel[(min(triton.cdiv(rows, BACKWARD_ROWS), programs),)](
        x, dy, dx, weights, gradients, *places, rows,
        C=channels, INNER=inner, ROWS=BACKWARD_ROWS, KIND=kind, PRECISION="ieee",
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
