"""The colors of pixels that a tail leaves one row each, their loss and its gradient.

Letters: R rows of pixels, C channels of the stream. Twins: the student's `color` and
`train.distil_step.masked_mse`. Where the last stage and the colors are one layer:
`train.kernels.student.patches`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.sums import add_to_sum

ROWS = 128
PROGRAMS_PER_SM = 8
COLORS = 16
"""Output channels with padding, the least a tensor core takes."""


@triton.jit
def color_kernel(
    y_ptr,
    colors_ptr,
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
    """Colors [n, CHANNELS, plane] in float32 of the last stream y [rows, C]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, 16)
    y = tl.load(y_ptr + r[:, None] * C + c[None, :], mask=r[:, None] < rows, other=0.0)
    w = tl.load(weights_ptr + weight_at + k[:, None] * C + c[None, :])
    b = tl.load(weights_ptr + bias_at + k).to(tl.float32)
    color = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision=PRECISION) + b[None, :])
    at = (r // plane * CHANNELS * plane + r % plane)[:, None] + k[None, :] * plane
    tl.store(colors_ptr + at, color, mask=(r < rows)[:, None] & (k < CHANNELS)[None, :])


@triton.jit
def color_loss_kernel(
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
    """Masked mean squared error of the colors, its gradients to y and to the colors' layer."""
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
        color = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision=PRECISION) + b[None, :])
        error = tl.where(counts, color - pixel.to(tl.float32) / 255.0, 0.0)
        loss += tl.sum(error * error, axis=1)
        dz = 2 * share * error * color * (1 - color)
        gb += tl.sum(dz, axis=0)
        dz = dz.to(dtype)
        gw = tl.dot(tl.trans(dz), y, gw, input_precision=PRECISION)
        dy = tl.dot(dz, w, input_precision=PRECISION)
        tl.store(dy_ptr + at, dy.to(dtype), mask=r[:, None] < rows)
    add_to_sum(gradients_ptr + weight_at + k[:, None] * C + c[None, :], gw)
    add_to_sum(gradients_ptr + bias_at + k, gb)
    tl.atomic_add(numbers_ptr + 1, tl.sum(loss, axis=0) * share, sem="relaxed")


class PixelColors:
    """The end of one student, whose layer lies in the packed buffers of `train.kernels.student.weights`."""

    def __init__(self, packed: Tensor, gradients: Tensor, places: tuple[int, int], outputs: int):
        self._packed, self._gradients = packed, gradients
        self._places, self._outputs = places, outputs

    def refresh(self) -> None:
        """Its layer is refreshed with all packed weights."""

    def clear(self) -> None:
        """Its gradients are cleared with all packed ones."""

    def colors(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Colors [n, outputs, h, w] (float32) of y [n h w, C]; `grid` is (n, h, w)."""
        n, height, width = grid
        rows, c = y.shape
        colors = torch.empty(n, self._outputs, height, width, device=y.device)
        color_kernel[(triton.cdiv(rows, ROWS),)](
            y, colors, self._packed, *self._places, rows, height * width,
            C=c, CHANNELS=self._outputs, ROWS=ROWS, PRECISION="ieee", num_warps=4,
        )  # fmt: skip
        return colors

    def loss(
        self,
        y: Tensor,
        dy: Tensor,
        pixels: Tensor,
        mask: Tensor,
        numbers: Tensor,
        grid: tuple[int, int, int],
    ) -> None:
        """dy [n h w, C], and the loss added to numbers[1], given numbers[0] pixels that count.

        `pixels` are uint8 [n, h, w, outputs], `mask` uint8 [n, h, w].
        """
        rows, c = y.shape
        programs = min(triton.cdiv(rows, ROWS), PROGRAMS_PER_SM * processors(y.device))
        color_loss_kernel[(programs,)](
            y, dy, pixels, mask, numbers, self._packed, self._gradients, *self._places, rows,
            C=c, CHANNELS=self._outputs, ROWS=ROWS, PRECISION="ieee", num_warps=4,
        )  # fmt: skip

    def publish_gradients(self) -> None:
        """Its gradients are published with all packed ones."""
