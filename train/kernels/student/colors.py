"""Output layer of the student with one row per pixel: colors, masked loss and gradients.

Letters: R rows of pixels, C channels of the stream. Twins: the student's `color` layer and
`train.distillation_step.masked_mse`. `train.kernels.student.patches` merges this layer with a last pixel
shuffle.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.sums import add_to_sum

ROWS = 128
PROGRAMS_PER_SM = 8
COLORS = 16
"""Padded number of output channels: the smallest side of a tensor core's tile."""


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
):
    """Colors [n, CHANNELS, plane] float32 from the last stream y [rows, C].

    `plane` is the number of pixels per image. Twin: the student's `color` layer and sigmoid.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, 16)
    y = tl.load(y_ptr + r[:, None] * C + c[None, :], mask=r[:, None] < rows, other=0.0)
    w = tl.load(weights_ptr + weight_at + k[:, None] * C + c[None, :])
    b = tl.load(weights_ptr + bias_at + k).to(tl.float32)
    color = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision="ieee") + b[None, :])
    at = (r // plane * CHANNELS * plane + r % plane)[:, None] + k[None, :] * plane
    tl.store(colors_ptr + at, color, mask=(r < rows)[:, None] & (k < CHANNELS)[None, :])


@triton.jit
def color_loss_kernel(
    y_ptr,
    dy_ptr,
    pixels_ptr,  # uint8 [rows, CHANNELS]
    mask_ptr,  # uint8 [rows]
    numbers_ptr,  # float32 [2]: number of unmasked pixels, and the loss to add to
    weights_ptr,
    gradients_ptr,  # int64 sums, laid out as the weights
    weight_at,
    bias_at,
    rows,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Masked mean squared error of the colors, with its gradients by y [rows, C] and by the layer.

    A program loops over tiles of ROWS rows. Twin: `train.distillation_step.masked_mse` by autograd.
    """
    dtype = y_ptr.dtype.element_ty
    c, k = tl.arange(0, C), tl.arange(0, 16)
    w = tl.load(weights_ptr + weight_at + k[:, None] * C + c[None, :])
    b = tl.load(weights_ptr + bias_at + k).to(tl.float32)
    scale = 1.0 / (CHANNELS * tl.load(numbers_ptr))
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
        color = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision="ieee") + b[None, :])
        error = tl.where(counts, color - pixel.to(tl.float32) / 255.0, 0.0)
        loss += tl.sum(error * error, axis=1)
        dz = 2 * scale * error * color * (1 - color)
        gb += tl.sum(dz, axis=0)
        dz = dz.to(dtype)
        gw = tl.dot(tl.trans(dz), y, gw, input_precision="ieee")
        dy = tl.dot(dz, w, input_precision="ieee")
        tl.store(dy_ptr + at, dy.to(dtype), mask=r[:, None] < rows)
    add_to_sum(gradients_ptr + weight_at + k[:, None] * C + c[None, :], gw)
    add_to_sum(gradients_ptr + bias_at + k, gb)
    tl.atomic_add(numbers_ptr + 1, tl.sum(loss, axis=0) * scale, sem="relaxed")


@runtime_checkable
class ColorOutput(Protocol):
    """Output layer of a student: colors of the last stream's rows, their loss and its gradients.

    The parameters and gradients of a layer lie in the packed buffers of `StudentWeights`, or in buffers
    of the layer's own, which the first three methods then maintain.
    """

    def refresh(self) -> None:
        """Update the layer's own weights from the student's parameters."""

    def clear(self) -> None:
        """Zero the layer's own gradients."""

    def publish_gradients(self) -> None:
        """Write the layer's own gradients to the parameters' `grad`."""

    def colors(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Colors [n, outputs, H, W] float32 of rows y [n h w, C]; `grid` is (n, h, w)."""
        ...

    def loss(
        self,
        y: Tensor,
        dy: Tensor,
        pixels: Tensor,
        mask: Tensor,
        numbers: Tensor,
        grid: tuple[int, int, int],
    ) -> None:
        """Write dy [n h w, C] and add the loss to numbers[1]; numbers[0] counts unmasked pixels.

        `pixels` are uint8 [n, H, W, outputs], `mask` uint8 [n, H, W].
        """


class PixelColors(ColorOutput):
    """Output layer with one row per pixel; its parameters lie in the packed buffers."""

    def __init__(self, packed: Tensor, gradients: Tensor, offsets: tuple[int, int], outputs: int):
        self._packed, self._gradients = packed, gradients
        self._offsets, self._outputs = offsets, outputs

    def colors(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:  # noqa: D102
        n, height, width = grid
        rows, c = y.shape
        colors = torch.empty(n, self._outputs, height, width, device=y.device)
        color_kernel[(triton.cdiv(rows, ROWS),)](
            y, colors, self._packed, *self._offsets, rows, height * width,
            C=c, CHANNELS=self._outputs, ROWS=ROWS, num_warps=4,
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
        """As `ColorOutput.loss`, with H = h and W = w."""
        rows, c = y.shape
        programs = min(triton.cdiv(rows, ROWS), PROGRAMS_PER_SM * processors(y.device))
        color_loss_kernel[(programs,)](
            y, dy, pixels, mask, numbers, self._packed, self._gradients, *self._offsets, rows,
            C=c, CHANNELS=self._outputs, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
