"""Narrow residual blocks of the student's up-sampling tail, where memory bandwidth limits the speed.

Letters as in `train.kernels.student.residual_block`; C and I are powers of two from 16 to 64. The
forward pass stores only its output; the backward pass reads x and dy once and recomputes the rest.
Programs loop over the rows and sum the gradients of the weights in registers. Sums over rows are
products with ones, which cost little on tensor cores. Twin: `lightfield.student.ResidualBlock`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.activation import activate
from train.kernels.student.sums import add_to_sum

MAX_WIDTH = 64
"""Largest stream width and inner width of the narrow kernels."""
FORWARD_SIZE = 4096
"""Values of a forward tile."""
BACKWARD_ROWS = 64
"""Rows of a backward tile; with 128 rows and 64 channels, registers would spill."""
WARPS = 4
STAGES = 3
FORWARD_PROGRAMS = 3
"""Programs per multiprocessor: the largest number that fits."""
BACKWARD_PROGRAMS = {16: 4, 32: 3, 64: 2}
"""Programs per multiprocessor, by width."""


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
    STAGES: tl.constexpr,
):
    """Output y [rows, C] of one residual block from x [rows, C]. Twin: `ResidualBlock`."""
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
        h = tl.dot(x, tl.trans(w1), input_precision="ieee") + b1[None, :]
        g, _ = activate(h, KIND)
        y = tl.dot(g.to(dtype), tl.trans(w2), input_precision="ieee")
        y += b2[None, :] + x.to(tl.float32)
        tl.store(y_ptr + at, y.to(dtype), mask=r[:, None] < rows)


@triton.jit
def narrow_backward_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    weights_ptr,
    gradients_ptr,  # int64 sums, laid out as the weights
    w1_at,
    b1_at,
    w2_at,
    b2_at,
    rows,
    C: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient dx [rows, C] of one residual block from x and dy [rows, C]; adds weight gradients.

    Twin: autograd through `ResidualBlock`.
    """
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
        h = tl.dot(x, tl.trans(w1), input_precision="ieee") + b1[None, :]
        g, slope = activate(h, KIND)
        dh = (tl.dot(dy, w2, input_precision="ieee") * slope).to(dtype)
        dx = tl.dot(dh, w1, input_precision="ieee") + dy.to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dtype), mask=r[:, None] < rows)
        transposed = tl.trans(dh)
        gw1 = tl.dot(transposed, x, gw1, input_precision="ieee")
        gb1 = tl.dot(transposed, ones, gb1, input_precision="ieee")
        transposed = tl.trans(dy)
        gw2 = tl.dot(transposed, g.to(dtype), gw2, input_precision="ieee")
        gb2 = tl.dot(transposed, ones, gb2, input_precision="ieee")
    add_to_sum(gradients_ptr + w1_at + at1, gw1)
    add_to_sum(gradients_ptr + w2_at + at2, gw2)
    first = one[None, :] == 0
    add_to_sum(gradients_ptr + b1_at + i[:, None] + one[None, :], gb1, first)
    add_to_sum(gradients_ptr + b2_at + c[:, None] + one[None, :], gb2, first)


def narrow_forward(
    x: Tensor, y: Tensor, weights: Tensor, offsets: tuple[int, int, int, int], inner: int, kind: int
) -> None:
    """Write y [R, C] of one block; `offsets` are those of W1, b1, W2, b2 in `weights`."""
    rows, channels = x.shape
    tile = FORWARD_SIZE // max(channels, inner)
    programs = FORWARD_PROGRAMS * processors(x.device)
    narrow_forward_kernel[(min(triton.cdiv(rows, tile), programs),)](
        x, y, weights, *offsets, rows,
        C=channels, INNER=inner, ROWS=tile, KIND=kind,
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip


def narrow_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    weights: Tensor,
    gradients: Tensor,
    offsets: tuple[int, int, int, int],
    inner: int,
    kind: int,
) -> None:
    """Write dx [R, C] of one block (dx may be dy), and add the weight gradients to `gradients`."""
    rows, channels = x.shape
    programs = BACKWARD_PROGRAMS[max(channels, inner)] * processors(x.device)
    narrow_backward_kernel[(min(triton.cdiv(rows, BACKWARD_ROWS), programs),)](
        x, dy, dx, weights, gradients, *offsets, rows,
        C=channels, INNER=inner, ROWS=BACKWARD_ROWS, KIND=kind,
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
