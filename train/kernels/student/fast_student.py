"""Forward and backward pass of a student in Triton kernels, for training without batch norms.

Letters: N windows of h x w rays, R = N h w rows, D coordinates per ray; s the up-sampling factor. All
tensors between the kernels are rows of channels, padded to widths that tensor cores support. Parameters
and their gradients stay float32 (`train.kernels.student.weights`); activations are bfloat16, except that
the body's stream is summed in float32. The backward pass is written out below, without autograd.

After the first call with a shape, a step allocates almost no memory and does not synchronize, so a CUDA
graph can capture it. The paper's network takes 80 kB of memory per ray. Twin: `Student` with
`train.distillation_step.masked_mse`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lightfield.errors import ConfigError
from lightfield.student import Student, StudentSpec
from train.kernels.availability import LARGEST_INDEX
from train.kernels.student import front, residual_block, tail_block, upsampling
from train.kernels.student.activation import activation_kind
from train.kernels.student.colors import ColorOutput, PixelColors
from train.kernels.student.patches import Patches
from train.kernels.student.sums import to_sums, values_of
from train.kernels.student.weight_gradients import Product, WeightGradients
from train.kernels.student.weights import StudentWeights, multiple, unsupported


def supports(spec: StudentSpec) -> str | None:
    """The reason why `FastStudent` cannot train a student, or None when it can."""
    return unsupported(spec)


class _Activations:
    """Intermediate results of the forward and backward pass of one shape, allocated once.

    The body's rows are padded to whole programs. Padding rows hold finite values, and their gradients
    are zero because no kernel writes to them in the last slot of `dy`.
    """

    def __init__(self, weights: StudentWeights, windows: tuple[int, int, int], *, keep: bool):
        self.keep = keep
        self.grid = windows
        n, height, width = windows
        device, dtype = weights.packed.device, weights.packed.dtype
        self.rays = n * height * width
        rows = self.rows = multiple(self.rays, max(residual_block.WIDE_ROWS, front.HEAD_ROWS))
        slots, channels, e = len(weights.body) + 1, weights.stream_width, weights.encoded_width
        inner = sum(block.inner for block in weights.body) if keep else 0
        shapes = {
            "encoded": (rows, e),
            "x": (slots, rows, channels),
            "dy": (slots if keep else 0, rows, channels),
            "g": (rows * inner,),
            "d": (rows * inner,),
        }
        _refuse_overflow(weights, windows, rows)
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.arena = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = [
            part.view(shape)
            for part, shape in zip(self.arena.split(sizes), shapes.values(), strict=True)
        ]
        self.encoded, self.x, self.dy, self.g, self.d = parts
        self.at = {
            name: int(part.storage_offset()) for name, part in zip(shapes, parts, strict=True)
        }
        self.slope = torch.empty(rows, channels, dtype=dtype, device=device)
        self.streams: list[list[Tensor]] = []
        self.tail_dy: list[Tensor] = []
        self.grids = [windows]
        for stage in weights.tail:
            height, width = height * stage.factor, width * stage.factor
            self.grids.append((n, height, width))
            size = (n * height * width, stage.width)
            self.streams.append(
                [
                    torch.empty(size, dtype=dtype, device=device)
                    for _ in range(len(stage.blocks) + 1)
                ]
            )
            if keep:
                self.tail_dy.append(torch.empty(size, dtype=dtype, device=device))
        if keep:
            self.numbers = torch.zeros(2, device=device)
            self.products = WeightGradients(self._products(weights), rows, device)

    def _products(self, weights: StudentWeights) -> list[Product]:
        slot, channels, before = self.x[0].numel(), weights.stream_width, 0
        offsets = weights.head
        products = [
            Product(
                self.at["dy"], channels, self.at["encoded"], weights.encoded_width,
                offsets.weight, offsets.bias,
            )
        ]  # fmt: skip
        for i, block in enumerate(weights.body):
            kept = before * self.rows
            products += [
                Product(
                    self.at["d"] + kept, block.inner, self.at["x"] + i * slot, channels,
                    block.expand.weight, block.expand.bias,
                ),
                Product(
                    self.at["dy"] + (i + 1) * slot, channels, self.at["g"] + kept, block.inner,
                    block.contract.weight, block.contract.bias,
                ),
            ]  # fmt: skip
            before += block.inner
        return products


def _refuse_overflow(weights: StudentWeights, windows: tuple[int, int, int], rows: int) -> None:
    """Raise a ConfigError for windows whose indices overflow the kernels' int32."""
    widest = max(weights.encoded_width, weights.stream_width, *(b.inner for b in weights.body))
    sizes, pixels = [rows * widest], math.prod(windows)
    for stage in weights.tail:
        pixels *= stage.factor**2
        sizes.append(pixels * stage.width)
    sizes.append(math.prod(windows) * weights.spec.factor**2 * weights.spec.output_channels)
    if max(sizes) > LARGEST_INDEX:
        raise ConfigError(
            f"{windows[0]} windows of {windows[1]} x {windows[2]} rays exceed the kernels' int32",
            where="distill.windows",
            remedy="choose fewer or smaller windows",
        )


class FastStudent:
    """Colors and gradients of an ordinary `Student`, whose optimizers need no change.

    The student's parameters become views of one flat buffer, and after `step_gradients` their gradients
    do too. float32 activations are for tests in Triton's interpreter.

    Raises:
        ConfigError: when `supports` returns a reason.
    """

    def __init__(self, student: Student, dtype: torch.dtype = torch.bfloat16):
        reason = supports(student.spec)
        if reason is not None:
            raise ConfigError(f"the kernels cannot train this student: {reason}", where="student")
        self.student, self.spec = student, student.spec
        self.weights = StudentWeights(student, dtype)
        self._output = self._output_of(student, dtype)
        self.kind = activation_kind(student.spec.activation, dtype)
        before, table = 0, []
        for block in self.weights.body:
            table.append((*block.offsets, before, block.inner))
            before += block.inner
        self._table = torch.tensor(table, dtype=torch.int32, device=self.weights.flat.device)
        self._activations: dict[tuple[int, int, int, bool], _Activations] = {}

    def flat_gradients(self) -> Float[Tensor, " p"]:
        """All gradients of the last step (float32), in the order of the parameters; a view."""
        return self.weights.gradients

    def forget(self) -> None:
        """Free the activations of all shapes."""
        self._activations.clear()

    @torch.no_grad()
    def colors(self, points: Float[Tensor, "n h w d"]) -> Float[Tensor, "n rgb sh sw"]:
        """Colors of windows of rays, from the points of the rays."""
        self._refresh()
        activations = self._of(points, keep=False)
        y = self._forward(points, activations)
        return self._output.colors(y, activations.grids[-1])

    @torch.no_grad()
    def step_gradients(
        self,
        points: Float[Tensor, "n h w d"],
        pixels: UInt8[Tensor, "n sh sw rgb"],
        mask: Bool[Tensor, "n 1 sh sw"],
    ) -> Float[Tensor, ""]:
        """The masked mean squared error; writes the gradient of each parameter to its `grad`.

        The next step of the same shape overwrites the returned loss.
        """
        for part in self.parts(points, pixels, mask).values():
            part()
        return self._of(points, keep=True).numbers[1]

    def parts(
        self,
        points: Float[Tensor, "n h w d"],
        pixels: UInt8[Tensor, "n sh sw rgb"],
        mask: Bool[Tensor, "n 1 sh sw"],
    ) -> dict[str, Callable[[], object]]:
        """The parts of `step_gradients` by name, in their order; benchmarks call them separately."""
        a = self._of(points, keep=True)
        inputs = [a.x[-1], *(streams[-1] for streams in a.streams)]
        forward = {
            f"tail {i} forward": functools.partial(self._stage, i, inputs[i], a)
            for i in range(len(a.streams))
        }
        backward = {
            f"tail {i} backward": functools.partial(self._stage_backward, i, a)
            for i in reversed(range(len(a.streams)))
        }
        return {
            "weights to bfloat16": self._refresh,
            "clearing": lambda: self._clear(mask, a),
            "encode and head": lambda: self._front(points, a),
            "body forward": lambda: self._body(a),
            **forward,
            "color, loss and gradient": lambda: self._loss(inputs[-1], pixels, mask, a),
            **backward,
            "body backward": lambda: self._body_gradients(a),
            "body weight gradients": lambda: self._body_weight_gradients(a),
            "gradients to float32": self._publish_gradients,
        }

    def _output_of(self, student: Student, dtype: torch.dtype) -> ColorOutput:
        weights, outputs = self.weights, self.spec.output_channels
        if weights.patch_width is not None:
            return Patches(student, weights.tail[-1].width, weights.patch_width, dtype)
        layer = weights.color
        assert layer is not None
        offsets = (layer.weight, layer.bias)
        return PixelColors(weights.packed, weights.packed_gradients, offsets, outputs)

    def _of(self, points: Tensor, *, keep: bool) -> _Activations:
        n, height, width, _ = points.shape
        key = (n, height, width, keep)
        if key not in self._activations:
            self._activations[key] = _Activations(self.weights, (n, height, width), keep=keep)
        return self._activations[key]

    def _forward(self, points: Tensor, a: _Activations) -> Tensor:
        """The last stream [rows, C] of the tail."""
        self._front(points, a)
        self._body(a)
        y = a.x[-1]
        for i in range(len(a.streams)):
            y = self._stage(i, y, a)
        return y

    def _refresh(self) -> None:
        """Update the kernels' weights from the parameters."""
        self.weights.refresh()
        self._output.refresh()

    def _publish_gradients(self) -> None:
        """Write the gradients to the parameters' `grad`."""
        self.weights.publish_gradients()
        self._output.publish_gradients()

    def _clear(self, mask: Tensor, a: _Activations) -> None:
        """Zero gradients and loss, and count the unmasked pixels."""
        self.weights.packed_gradients.zero_()
        self._output.clear()
        a.numbers.zero_()
        a.numbers[0].copy_(mask.sum())

    def _front(self, points: Tensor, a: _Activations) -> None:
        weights, offsets = self.weights, self.weights.head
        front.encode(
            points.reshape(a.rays, -1).float().contiguous(), a.encoded, self.spec.frequencies
        )
        front.head(
            a.encoded, a.x[0], a.slope, weights.packed, (offsets.weight, offsets.bias), self.kind
        )

    def _body(self, a: _Activations) -> None:
        residual_block.wide_forward(
            a.x, a.g, a.d, self.weights.packed, self._table,
            kind=self.kind, keep=a.keep, outer_skip=True,
        )  # fmt: skip

    def _stage(self, i: int, x: Tensor, a: _Activations) -> Tensor:
        """Output rows of one stage of the tail, from its input rows x."""
        weights, stage, streams = self.weights.packed, self.weights.tail[i], a.streams[i]
        offsets = (stage.upsample.weight, stage.upsample.bias)
        upsampling.upsample(
            x, streams[0], weights, offsets, a.grids[i], stage.factor, stage.kernel,
            shuffled=stage.shuffled,
        )  # fmt: skip
        for block, before, after in zip(stage.blocks, streams, streams[1:], strict=False):
            tail_block.narrow_forward(before, after, weights, block.offsets, block.inner, self.kind)
        return streams[-1]

    def _loss(self, y: Tensor, pixels: Tensor, mask: Tensor, a: _Activations) -> None:
        counted = mask.flatten().view(torch.uint8)
        self._output.loss(y, a.tail_dy[-1], pixels.contiguous(), counted, a.numbers, a.grids[-1])

    def _stage_backward(self, i: int, a: _Activations) -> None:
        """Gradients of one stage; replaces the gradient of its output in place."""
        weights, gradients = self.weights.packed, self.weights.packed_gradients
        stage, dy = self.weights.tail[i], a.tail_dy[i]
        for block, x in reversed(list(zip(stage.blocks, a.streams[i], strict=False))):
            tail_block.narrow_backward(
                x, dy, dy, weights, gradients, block.offsets, block.inner, self.kind
            )
        self._upsampling_bias_gradient(i, dy, a.grids[i])
        x = a.streams[i - 1][-1] if i else a.x[-1]
        dx = a.tail_dy[i - 1] if i else a.dy[-1]
        upsampling.upsample_gradients(
            x, dy, dx, weights, gradients, stage.upsample.weight, a.grids[i], stage.factor,
            stage.kernel,
        )  # fmt: skip

    def _upsampling_bias_gradient(self, i: int, dy: Tensor, grid: tuple[int, int, int]) -> None:
        """Bias gradient of an up-sampling layer: the sum of its dy over pixels (per phase if shuffled).

        The first block gives the sum without another pass: that block's dx = dy + dh W1, so the sum of
        dx is the sum of dy (its b2 gradient) plus W1 times the sum of dh (its b1 gradient).
        """
        stage, gradients = self.weights.tail[i], self.weights.packed_gradients
        if stage.shuffled:
            (n, height, width), s = grid, stage.factor
            phases = dy.view(n, height, s, width, s, stage.width)
            sums = phases.sum((0, 1, 3), dtype=torch.float32).flatten()
            gradients[stage.upsample.bias :][: len(sums)].copy_(to_sums(sums))
            return
        result = gradients[stage.upsample.bias :][: stage.width]
        if not stage.blocks:
            result.copy_(to_sums(torch.sum(dy, 0, dtype=torch.float32)))
            return
        w1_at, b1_at, _, b2_at = stage.blocks[0].offsets
        inner, width = stage.blocks[0].inner, stage.width
        w1 = self.weights.packed[w1_at:][: inner * width].view(inner, width).float()
        b1, b2 = values_of(gradients[b1_at:][:inner]), values_of(gradients[b2_at:][:width])
        result.copy_(to_sums(torch.addmv(b2, w1.mT, b1)))

    def _body_gradients(self, a: _Activations) -> None:
        residual_block.wide_backward(a.dy, a.d, a.slope, self.weights.packed, self._table)

    def _body_weight_gradients(self, a: _Activations) -> None:
        a.products.add(a.arena, self.weights.packed_gradients)
