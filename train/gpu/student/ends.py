"""The student's two ends: points to the body's input, and colours to the loss and its gradient.

Letters: R rows (rays in front, pixels behind), C channels of the stream, D coordinates of a ray's
points, E encoded channels with padding. Twins: `lightfield.encoding.encode`, the student's `head` and
`colour`, and `train.distil_step.masked_mse`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.gpu.availability import processors
from train.gpu.student.activation import activate
from train.gpu.student.sums import add_to_sum

ENCODE_ROWS = 4
HEAD_ROWS = 128
HEAD_CHUNK = 64
HEAD_STAGES = 3
COLOUR_ROWS = 128
COLOUR_PROGRAMS_PER_SM = 8
COLOURS = 16
"""Output channels with padding, the least a tensor core takes."""


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
    """Encoded points [rows, E] of points [rays, D]; zero in the padding of both."""
    KINDS: tl.constexpr = 2 * FREQUENCIES + 1
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, E_TILE)
    d, k = c // KINDS, c % KINDS
    known = (r < rays)[:, None] & (d < D)[None, :]
    point = tl.load(points_ptr + r[:, None] * D + d[None, :], mask=known, other=0.0)
    octave = tl.exp2((k % FREQUENCIES).to(tl.float32))
    angle = point * octave[None, :]
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
    PRECISION: tl.constexpr,
):
    """act(W e + b) and act' there, [rows, C]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, CHUNK)
    h = tl.zeros([ROWS, C], tl.float32)
    for start in range(0, E, CHUNK):
        e = tl.load(encoded_ptr + r[:, None] * E + start + k[None, :])
        w = tl.load(weights_ptr + weight_at + c[:, None] * E + start + k[None, :])
        h = tl.dot(e, tl.trans(w), h, input_precision=PRECISION)
    h += tl.load(weights_ptr + bias_at + c).to(tl.float32)[None, :]
    value, slope = activate(h, KIND)
    at = r[:, None] * C + c[None, :]
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty))
    tl.store(slope_ptr + at, slope.to(x_ptr.dtype.element_ty))


@triton.jit
def colour_kernel(
    y_ptr,
    colours_ptr,
    weights_ptr,
    weight_at,
    bias_at,
    rows,
    plane,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Colours [n, CHANNELS, plane] in float32 of the last stream y [rows, C]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, 16)
    y = tl.load(y_ptr + r[:, None] * C + c[None, :], mask=r[:, None] < rows, other=0.0)
    w = tl.load(weights_ptr + weight_at + k[:, None] * C + c[None, :])
    b = tl.load(weights_ptr + bias_at + k).to(tl.float32)
    colour = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision=PRECISION) + b[None, :])
    at = (r // plane * CHANNELS * plane + r % plane)[:, None] + k[None, :] * plane
    tl.store(colours_ptr + at, colour, mask=(r < rows)[:, None] & (k < CHANNELS)[None, :])


@triton.jit
def colour_loss_kernel(
    y_ptr,
    dy_ptr,
    pixels_ptr,  # uint8 [rows, CHANNELS]
    mask_ptr,  # uint8 [rows]
    numbers_ptr,  # float32: how many numbers count, and the loss, which is added to
    weights_ptr,
    gradients_ptr,  # sums
    weight_at,
    bias_at,
    rows,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Masked mean squared error of the colours, its gradients to y and to the colours' layer."""
    dtype = y_ptr.dtype.element_ty
    c, k = tl.arange(0, C), tl.arange(0, 16)
    w = tl.load(weights_ptr + weight_at + k[:, None] * C + c[None, :])
    b = tl.load(weights_ptr + bias_at + k).to(tl.float32)
    share = 1.0 / (CHANNELS * tl.load(numbers_ptr))
    gw = tl.zeros([16, C], tl.float32)
    gb = tl.zeros([16], tl.float32)
    loss = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        r = tile * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * C + c[None, :]
        y = tl.load(y_ptr + at, mask=r[:, None] < rows, other=0.0)
        counts = tl.load(mask_ptr + r, mask=r < rows, other=0) != 0
        counts = counts[:, None] & (k < CHANNELS)[None, :]
        pixel = tl.load(pixels_ptr + r[:, None] * CHANNELS + k[None, :], mask=counts, other=0)
        colour = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision=PRECISION) + b[None, :])
        error = tl.where(counts, colour - pixel.to(tl.float32) / 255.0, 0.0)
        loss += tl.sum(error * error, axis=1)
        dz = 2 * share * error * colour * (1 - colour)
        gb += tl.sum(dz, axis=0)
        dz = dz.to(dtype)
        gw = tl.dot(tl.trans(dz), y, gw, input_precision=PRECISION)
        dy = tl.dot(dz, w, input_precision=PRECISION)
        tl.store(dy_ptr + at, dy.to(dtype), mask=r[:, None] < rows)
    add_to_sum(gradients_ptr + weight_at + k[:, None] * C + c[None, :], gw)
    add_to_sum(gradients_ptr + bias_at + k, gb)
    tl.atomic_add(numbers_ptr + 1, tl.sum(loss, axis=0) * share, sem="relaxed")


def encode(points: Tensor, encoded: Tensor, frequencies: int) -> None:
    """Fill encoded [rows, E] from points [rays, D] (float32), rows a multiple of ENCODE_ROWS."""
    rows, e = encoded.shape
    encode_kernel[(rows // ENCODE_ROWS,)](
        points, encoded, points.shape[0],
        D=points.shape[1], FREQUENCIES=frequencies, E=e, E_TILE=triton.next_power_of_2(e),
        ROWS=ENCODE_ROWS, num_warps=4,
    )  # fmt: skip


def head(
    encoded: Tensor, x: Tensor, slope: Tensor, weights: Tensor, places: tuple[int, int], kind: int
) -> None:
    """The head's output x and its activation's slope [rows, C], rows a multiple of HEAD_ROWS."""
    rows, c = x.shape
    head_kernel[(rows // HEAD_ROWS,)](
        encoded, x, slope, weights, *places,
        E=encoded.shape[1], C=c, CHUNK=HEAD_CHUNK, ROWS=HEAD_ROWS, KIND=kind, PRECISION="ieee",
        num_warps=8, num_stages=HEAD_STAGES,
    )  # fmt: skip


def colour(y: Tensor, colours: Tensor, weights: Tensor, places: tuple[int, int]) -> None:
    """Colours [n, channels, h, w] (float32) of y [n h w, C]."""
    rows, c = y.shape
    colour_kernel[(triton.cdiv(rows, COLOUR_ROWS),)](
        y, colours, weights, *places, rows, colours.shape[2] * colours.shape[3],
        C=c, CHANNELS=colours.shape[1], ROWS=COLOUR_ROWS, PRECISION="ieee", num_warps=4,
    )  # fmt: skip


def colour_loss(
    y: Tensor,
    dy: Tensor,
    pixels: Tensor,
    mask: Tensor,
    numbers: Tensor,
    weights: Tensor,
    gradients: Tensor,
    places: tuple[int, int],
) -> None:
    """dy [R, C], and the loss added to numbers[1], given numbers[0] pixels that count.

    `pixels` are uint8 [R, channels], `mask` uint8 [R].
    """
    rows, c = y.shape
    programs = min(triton.cdiv(rows, COLOUR_ROWS), COLOUR_PROGRAMS_PER_SM * processors(y.device))
    colour_loss_kernel[(programs,)](
        y, dy, pixels, mask, numbers, weights, gradients, *places, rows,
        C=c, CHANNELS=pixels.shape[1], ROWS=COLOUR_ROWS, PRECISION="ieee", num_warps=4,
    )  # fmt: skip
