"""Wide stacks of residual blocks of 1x1 convolutions, x + W2 act(W1 x + b1) + b2: the student's body.

Letters: R rows (rays or pixels, channels last), C the stream's channels, I a block's inner channels,
h = W1 x + b1, g = act(h), d = act'(h); dy, dh, dx are gradients. C is a power of two, at least 16, and
I is a multiple of WIDE_CHUNK: narrower layers are padded with zeros, which stay zeros.

A 1x1 convolution does not mix rows, so one program takes its rows through all blocks of a stack, with
the stream in float32 registers. The forward pass stores x, g and d of each block, the backward pass
replaces d by dh in place, and `train.kernels.student.weight_gradients` multiplies them to the gradients
of the weights. Storing d moves a seventh more bytes than recomputing h, but saves a seventh of the
arithmetic, which limits the speed.

Twin: `lightfield.student.ResidualBlock`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.student.activation import activate

WIDE_ROWS = 128
"""Rows of one program; buffers hold a multiple of this number of rows."""
WIDE_CHUNK = 64
"""Inner channels of one product; inner widths are padded to a multiple of this number."""
WIDE_WARPS = 8
FORWARD_STAGES = 2
BACKWARD_STAGES = 2


@triton.jit
def wide_forward_kernel(
    x_ptr,  # [blocks + 1, rows, C]; x[0] is the input
    g_ptr,  # per block [rows, I]
    d_ptr,  # per block [rows, I]
    weights_ptr,
    table_ptr,  # per block: offsets of W1, b1, W2, b2, inner channels of the earlier blocks, I
    rows,
    blocks,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    KEEP: tl.constexpr,
    OUTER_SKIP: tl.constexpr,
):
    """A stack of residual blocks, with a skip connection around the stack if OUTER_SKIP.

    KEEP stores g and d. Twin: the student's `body`, a sequence of `ResidualBlock`.
    """
    dtype = x_ptr.dtype.element_ty
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    tile = r[:, None] * C + c[None, :]
    stream = tl.load(x_ptr + tile).to(tl.float32)
    slot_ptr = x_ptr
    for b in range(blocks):
        w1_at = tl.multiple_of(tl.load(table_ptr + 6 * b), 16)
        b1_at = tl.multiple_of(tl.load(table_ptr + 6 * b + 1), 16)
        w2_at = tl.multiple_of(tl.load(table_ptr + 6 * b + 2), 16)
        b2_at = tl.multiple_of(tl.load(table_ptr + 6 * b + 3), 16)
        before = tl.multiple_of(tl.load(table_ptr + 6 * b + 4), 16).to(tl.int64)
        inner = tl.multiple_of(tl.load(table_ptr + 6 * b + 5), 16)
        x = tl.load(slot_ptr + tile, cache_modifier=".cg")
        stream += tl.load(weights_ptr + b2_at + c).to(tl.float32)[None, :]
        for start in range(0, inner, CHUNK):
            i = start + tl.arange(0, CHUNK)
            w1 = tl.load(weights_ptr + w1_at + i[:, None] * C + c[None, :])
            w2 = tl.load(weights_ptr + w2_at + c[:, None] * inner + i[None, :])
            b1 = tl.load(weights_ptr + b1_at + i).to(tl.float32)
            h = tl.dot(x, tl.trans(w1), input_precision="ieee") + b1[None, :]
            value, slope = activate(h, KIND)
            g = value.to(dtype)
            stream = tl.dot(g, tl.trans(w2), stream, input_precision="ieee")
            if KEEP:
                kept = before * rows + r[:, None] * inner + i[None, :]
                tl.store(g_ptr + kept, g)
                tl.store(d_ptr + kept, slope.to(dtype))
        slot_ptr += rows * C
        tl.store(slot_ptr + tile, stream.to(dtype))
        tl.debug_barrier()  # the next block reads values that other threads of this program wrote
    if OUTER_SKIP:
        stream += tl.load(x_ptr + tile).to(tl.float32)
        tl.store(slot_ptr + tile, stream.to(dtype))


@triton.jit
def wide_backward_kernel(
    last_ptr,  # dy[blocks], the given gradient of the stack's output
    dy_ptr,  # [blocks + 1, rows, C]; dy[0] becomes the gradient by the head's h
    d_ptr,  # per block [rows, I]: act'(h), replaced by dh
    slope_ptr,  # [rows, C]: the head's act'(h), used with OUTER_SKIP
    weights_ptr,
    table_ptr,
    rows,
    blocks,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER_SKIP: tl.constexpr,
):
    """Gradients of a stack's streams (dy) and inner channels (dh), from the last block to the first.

    Twin: autograd through the student's `body`.
    """
    dtype = dy_ptr.dtype.element_ty
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    tile = r[:, None] * C + c[None, :]
    slot_ptr = last_ptr
    stream = tl.load(last_ptr + tile).to(tl.float32)
    for step in range(blocks):
        b = blocks - 1 - step
        w1_at = tl.multiple_of(tl.load(table_ptr + 6 * b), 16)
        w2_at = tl.multiple_of(tl.load(table_ptr + 6 * b + 2), 16)
        before = tl.multiple_of(tl.load(table_ptr + 6 * b + 4), 16).to(tl.int64)
        inner = tl.multiple_of(tl.load(table_ptr + 6 * b + 5), 16)
        dy = tl.load(slot_ptr + tile, cache_modifier=".cg")
        for start in range(0, inner, CHUNK):
            i = start + tl.arange(0, CHUNK)
            kept = before * rows + r[:, None] * inner + i[None, :]
            w2 = tl.load(weights_ptr + w2_at + c[:, None] * inner + i[None, :])
            w1 = tl.load(weights_ptr + w1_at + i[:, None] * C + c[None, :])
            slope = tl.load(d_ptr + kept)
            dg = tl.dot(dy, w2, input_precision="ieee")
            dh = (dg * slope.to(tl.float32)).to(dtype)
            stream = tl.dot(dh, w1, stream, input_precision="ieee")
            tl.store(d_ptr + kept, dh)
        slot_ptr -= rows * C
        tl.store(slot_ptr + tile, stream.to(dtype))
        tl.debug_barrier()
    if OUTER_SKIP:
        stream += tl.load(last_ptr + tile).to(tl.float32)
        stream *= tl.load(slope_ptr + tile).to(tl.float32)
        tl.store(dy_ptr + tile, stream.to(dtype))


def wide_forward(
    x: Tensor,
    g: Tensor,
    d: Tensor,
    weights: Tensor,
    table: Tensor,
    *,
    kind: int,
    keep: bool,
    outer_skip: bool,
) -> None:
    """Write x[1:] of x [blocks + 1, R, C] from x[0], and g and d [R * sum of I] if `keep`."""
    slots, rows, channels = x.shape
    wide_forward_kernel[(rows // WIDE_ROWS,)](
        x, g, d, weights, table, rows, slots - 1,
        C=channels, CHUNK=WIDE_CHUNK, ROWS=WIDE_ROWS, KIND=kind, KEEP=keep, OUTER_SKIP=outer_skip,
        num_warps=WIDE_WARPS, num_stages=FORWARD_STAGES,
    )  # fmt: skip


def wide_backward(
    dy: Tensor, d: Tensor, slope: Tensor | None, weights: Tensor, table: Tensor
) -> None:
    """Write dy[:-1] of dy [blocks + 1, R, C] from dy[-1], and replace d by dh.

    With `slope`, the stack has an outer skip connection, and dy[0] is multiplied by `slope`.
    """
    slots, rows, channels = dy.shape
    wide_backward_kernel[(rows // WIDE_ROWS,)](
        dy[-1], dy, d, dy if slope is None else slope, weights, table, rows, slots - 1,
        C=channels, CHUNK=WIDE_CHUNK, ROWS=WIDE_ROWS, OUTER_SKIP=slope is not None,
        num_warps=WIDE_WARPS, num_stages=BACKWARD_STAGES,
    )  # fmt: skip
