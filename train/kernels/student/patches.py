"""Output layer of a student that ends in one pixel shuffle: a patch of pixels per row of the stream.

When the last stage is a pixel shuffle without blocks, nothing lies between its convolution V and the
color layer C, so the kernels multiply by the product C V. No tensor of image size but the image is
stored. The gradients of V and C are computed from the gradient of the product.

Letters: R rows of the stream, C its channels; a row has S x S pixels (phases) of O output channels, at
column phase * O + o, padded to P. Twin: `lightfield.student`'s last stage and color layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightfield.student import ShuffledUpsample, Student
from train.kernels.availability import processors
from train.kernels.student.colors import ColorOutput
from train.kernels.student.sums import add_to_sum, values_of

ROWS = 64
WARPS = 4
PROGRAMS_PER_SM = 2


@triton.jit
def _pixel(r, k, height, width, CHANNELS: tl.constexpr, S: tl.constexpr):
    """Index among all images' pixels of column k of row r's patch [R, P], and row r's image [R]."""
    image = r // (width * height)
    phase = k // CHANNELS
    line = S * (r // width)[:, None] + (phase // S)[None, :]  # images are stacked vertically
    return line * (S * width) + (S * (r % width))[:, None] + (phase % S)[None, :], image


@triton.jit
def patch_colors_kernel(
    y_ptr,
    colors_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    height,
    width,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Colors [n, CHANNELS, S h, S w] float32 from the stream y [rows, C].

    weight [P, C], bias [P]. Twin: the last stage and the color layer of `lightfield.student.Student`.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C), tl.arange(0, P)
    y = tl.load(y_ptr + r[:, None] * C + c[None, :], mask=r[:, None] < rows, other=0.0)
    w = tl.load(weight_ptr + k[:, None] * C + c[None, :])
    logit = tl.dot(y, tl.trans(w), input_precision="ieee") + tl.load(bias_ptr + k)[None, :]
    pixel, image = _pixel(r, k, height, width, CHANNELS, S)
    plane = S * height * S * width
    at = pixel + (image * (CHANNELS - 1))[:, None] * plane + (k % CHANNELS)[None, :] * plane
    known = (r < rows)[:, None] & (k < S * S * CHANNELS)[None, :]
    tl.store(colors_ptr + at, tl.sigmoid(logit), mask=known)


@triton.jit
def patch_loss_kernel(
    y_ptr,
    dy_ptr,
    pixels_ptr,  # uint8 [n, S h, S w, CHANNELS]
    mask_ptr,  # uint8 [n, S h, S w]
    numbers_ptr,  # float32 [2]: number of unmasked pixels, and the loss to add to
    weight_ptr,
    bias_ptr,
    gradients_ptr,  # int64 sums: weight [P, C], then bias [P]
    rows,
    height,
    width,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Masked mean squared error of the colors, with its gradients by y [rows, C] and by the layer.

    A program loops over tiles of ROWS rows. Twin: `train.distillation_step.masked_mse` by autograd.
    """
    dtype = y_ptr.dtype.element_ty
    c, k = tl.arange(0, C), tl.arange(0, P)
    weight_at = k[:, None] * C + c[None, :]
    w = tl.load(weight_ptr + weight_at)
    b = tl.load(bias_ptr + k)
    scale = 1.0 / (CHANNELS * tl.load(numbers_ptr))
    gw = tl.zeros([P, C], tl.float32)
    gb = tl.zeros([P], tl.float32)
    loss = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        r = tile * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * C + c[None, :]
        y = tl.load(y_ptr + at, mask=r[:, None] < rows, other=0.0)
        pixel, _ = _pixel(r, k, height, width, CHANNELS, S)
        known = (r < rows)[:, None] & (k < S * S * CHANNELS)[None, :]
        counts = tl.load(mask_ptr + pixel, mask=known, other=0) != 0
        truth = tl.load(
            pixels_ptr + pixel * CHANNELS + (k % CHANNELS)[None, :], mask=counts, other=0
        )
        color = tl.sigmoid(tl.dot(y, tl.trans(w), input_precision="ieee") + b[None, :])
        error = tl.where(counts, color - truth.to(tl.float32) / 255.0, 0.0)
        loss += tl.sum(error * error, axis=1)
        dz = 2 * scale * error * color * (1 - color)
        gb += tl.sum(dz, axis=0)
        dz = dz.to(dtype)
        gw = tl.dot(tl.trans(dz), y, gw, input_precision="ieee")
        dy = tl.dot(dz, w, input_precision="ieee")
        tl.store(dy_ptr + at, dy.to(dtype), mask=r[:, None] < rows)
    add_to_sum(gradients_ptr + weight_at, gw)
    add_to_sum(gradients_ptr + P * C + k, gb)
    tl.atomic_add(numbers_ptr + 1, tl.sum(loss, axis=0) * scale, sem="relaxed")


class Patches(ColorOutput):
    """Output layer with a patch of pixels per row; `channels` and `padded` (P) include padding."""

    def __init__(self, student: Student, channels: int, padded: int, dtype: torch.dtype):
        last, color = student.chains()[-1], student.color
        assert isinstance(last.entry, ShuffledUpsample)
        convolution = last.entry.convolution
        assert convolution.bias is not None
        assert color.bias is not None
        self.factor, self.outputs = last.entry.factor, student.spec.output_channels
        self._layers = [convolution.weight, convolution.bias, color.weight, color.bias]
        device = convolution.weight.device
        self._weight = torch.zeros(padded, channels, dtype=dtype, device=device)
        self._bias = torch.zeros(padded, device=device)
        self._sums = torch.zeros(padded * (channels + 1), dtype=torch.int64, device=device)

    def refresh(self) -> None:
        """Compute the product of the two layers."""
        weight, bias, mixing, offset = self._matrices()
        product = torch.einsum("ow,wpi->poi", mixing, weight).flatten(0, 1)
        self._weight[: len(product), : product.shape[1]].copy_(product)
        self._bias[: len(product)].copy_((bias.T @ mixing.T + offset).flatten())

    def clear(self) -> None:  # noqa: D102
        self._sums.zero_()

    def colors(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """As `ColorOutput.colors`, with H = S h and W = S w."""
        n, height, width = grid
        size = (n, self.outputs, self.factor * height, self.factor * width)
        colors = torch.empty(size, device=y.device)
        patch_colors_kernel[(triton.cdiv(len(y), ROWS),)](
            y, colors, self._weight, self._bias, len(y), height, width,
            C=y.shape[1], P=len(self._bias), CHANNELS=self.outputs, S=self.factor, ROWS=ROWS,
            num_warps=WARPS,
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
        """As `ColorOutput.loss`, with H = S h and W = S w."""
        _, height, width = grid
        programs = min(triton.cdiv(len(y), ROWS), PROGRAMS_PER_SM * processors(y.device))
        patch_loss_kernel[(programs,)](
            y, dy, pixels, mask, numbers, self._weight, self._bias, self._sums,
            len(y), height, width,
            C=y.shape[1], P=len(self._bias), CHANNELS=self.outputs, S=self.factor, ROWS=ROWS,
            num_warps=WARPS,
        )  # fmt: skip

    def publish_gradients(self) -> None:
        """Write the gradients of both layers, from the gradient of their product."""
        weight, bias, mixing, _ = self._matrices()
        phases, inputs = weight.shape[1:]
        used, padded = phases * self.outputs, len(self._bias)
        sums = values_of(self._sums)
        of_product = sums[: padded * self._weight.shape[1]].view(padded, -1)[:used, :inputs]
        of_product = of_product.reshape(phases, self.outputs, inputs)
        of_bias = sums[-padded:][:used].view(phases, self.outputs)
        of_mixing = torch.einsum("poi,wpi->ow", of_product, weight) + (bias @ of_bias).T
        gradients = (
            torch.einsum("ow,poi->wpi", mixing, of_product),
            (of_bias @ mixing).T,
            of_mixing,
            of_bias.sum(0),
        )
        for layer, gradient in zip(self._layers, gradients, strict=True):
            assert layer.grad is not None
            layer.grad.copy_(gradient.reshape(layer.shape))

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight [w, phases, i] and bias [w, phases] of the convolution; [o, w], [o] of the colors."""
        weight, bias, mixing, offset = (layer.detach() for layer in self._layers)
        phases = self.factor**2
        return (
            weight[:, :, 0, 0].unflatten(0, (-1, phases)),
            bias.view(-1, phases),
            mixing[:, :, 0, 0],
            offset,
        )
