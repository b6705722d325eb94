"""Input of the student: positional encoding of a ray's points, and the head layer.

Letters: R rows of rays, C channels of the stream, D coordinates of a ray's points, E padded encoded
channels. Twins: `lightfield.encoding.encode` and the student's `head`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.student.activation import activate

ENCODE_ROWS = 4
HEAD_ROWS = 128
HEAD_CHUNK = 64
HEAD_STAGES = 3


@triton.jit
def encode_kernel(
    points_ptr,
    encoded_ptr,
    rays,
    D: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    E: tl.constexpr,
    E_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Encoded points [rows, E] of points [rays, D]; padding rows and channels are zero.

    Twin: `lightfield.encoding.encode`.
    """
    KINDS: tl.constexpr = 2 * FREQUENCIES + 1
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, E_TILE)
    d, k = c // KINDS, c % KINDS
    known = (r < rays)[:, None] & (d < D)[None, :]
    point = tl.load(points_ptr + r[:, None] * D + d[None, :], mask=known, other=0.0)
    frequency = tl.exp2((k % FREQUENCIES).to(tl.float32))
    angle = point * frequency[None, :]
    wave = tl.where((k < FREQUENCIES)[None, :], tl.sin(angle), tl.cos(angle))
    value = tl.where((k == 2 * FREQUENCIES)[None, :], point, wave)
    value = tl.where(known, value, 0.0)
    tl.store(
        encoded_ptr + r[:, None] * E + c[None, :],
        value.to(encoded_ptr.dtype.element_ty),
        mask=(c < E)[None, :],
    )


@triton.jit
def head_kernel(
    encoded_ptr,
    x_ptr,
    slope_ptr,
    weights_ptr,
    weight_at,
    bias_at,
    E: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
):
    """x = act(W e + b) and slope = act'(W e + b), [rows, C], from encoded e [rows, E].

    Twin: the student's `head`.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, CHUNK)
    h = tl.zeros([ROWS, C], tl.float32)
    for start in range(0, E, CHUNK):
        e = tl.load(encoded_ptr + r[:, None] * E + start + k[None, :])
        w = tl.load(weights_ptr + weight_at + c[:, None] * E + start + k[None, :])
        h = tl.dot(e, tl.trans(w), h, input_precision="ieee")
    h += tl.load(weights_ptr + bias_at + c).to(tl.float32)[None, :]
    value, slope = activate(h, KIND)
    at = r[:, None] * C + c[None, :]
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty))
    tl.store(slope_ptr + at, slope.to(x_ptr.dtype.element_ty))


def encode(points: Tensor, encoded: Tensor, frequencies: int) -> None:
    """Write encoded [rows, E] from points [rays, D] (float32); rows is a multiple of ENCODE_ROWS."""
    rows, e = encoded.shape
    encode_kernel[(rows // ENCODE_ROWS,)](
        points, encoded, points.shape[0],
        D=points.shape[1], FREQUENCIES=frequencies, E=e, E_TILE=triton.next_power_of_2(e),
        ROWS=ENCODE_ROWS, num_warps=4,
    )  # fmt: skip


def head(
    encoded: Tensor, x: Tensor, slope: Tensor, weights: Tensor, offsets: tuple[int, int], kind: int
) -> None:
    """Write the head's output x and the activation's slope [rows, C]; rows % HEAD_ROWS == 0."""
    rows, c = x.shape
    head_kernel[(rows // HEAD_ROWS,)](
        encoded, x, slope, weights, *offsets,
        E=encoded.shape[1], C=c, CHUNK=HEAD_CHUNK, ROWS=HEAD_ROWS, KIND=kind,
        num_warps=8, num_stages=HEAD_STAGES,
    )  # fmt: skip
