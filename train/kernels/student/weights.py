"""Parameters of a student in one flat buffer, and their packed copy in the kernels' layout and type.

The flat buffers (parameters and gradients, float32) hold the parameters in the order of
`student.parameters()`; the student's tensors become views of them, so its state dict and its optimizers
keep working. The packed buffers hold the same values, padded with zeros to the kernels' widths, and the
gradients in the same layout (`train.kernels.student.sums`). `source[i]` is the index of packed value i
in the flat buffer, or -1 for padding; one kernel copies in each direction.

    head      [C, E], then the bias [C]
    block     W1 [I, C], b1 [I], W2 [C, I], b2 [C]
    upsample  [K, CI, K * CO], that is ky, input, (kx, output), then the bias [CO]; shuffled [K, K, CO]
    color    [16, C], then the bias [16]

A last stage that is merged with the color layer (`train.kernels.student.patches`) is not packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from lightfield.student import (
    ResidualBlock,
    ShuffledUpsample,
    Student,
    StudentSpec,
    TailChain,
    Upsample,
)
from train.kernels.student.colors import COLORS
from train.kernels.student.front import HEAD_CHUNK
from train.kernels.student.residual_block import WIDE_CHUNK
from train.kernels.student.sums import sum_value
from train.kernels.student.tail_block import MAX_WIDTH as MAX_TAIL_WIDTH

MIN_WIDTH = 16
"""Smallest side of a tensor core's tile."""
MAX_STREAM_WIDTH = 256
MAX_PATCH_WIDTH = 64
PACK_SIZE = 1024
"""Values that one program copies."""


def power_of_two_width(width: int) -> int:
    """Padded channels of a stream or of a narrow block: the next power of two."""
    return max(MIN_WIDTH, 1 << (width - 1).bit_length())


def multiple(width: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `width`."""
    return -(-width // of) * of


def unsupported(spec: StudentSpec) -> str | None:
    """The reason why the kernels cannot compute a student, or None when they can."""
    if spec.norm != "none":
        return "the kernels do not support batch norms"
    if spec.stream_width > MAX_STREAM_WIDTH:
        return f"its stream is wider than {MAX_STREAM_WIDTH} channels"
    if not spec.inner_widths or not spec.tail:
        return "it has no body or no up-sampling tail"
    if any(max(stage.width, *stage.inner_widths, 1) > MAX_TAIL_WIDTH for stage in spec.tail):
        return f"its tail is wider than {MAX_TAIL_WIDTH} channels"
    if spec.output_channels > COLORS:
        return f"it has more than {COLORS} output channels"
    return None


def patch_width(spec: StudentSpec) -> int | None:
    """Padded values per patch if the last stage is merged with the color layer, otherwise None."""
    if (
        len(spec.tail) < 2
        or spec.tail[-1].operator != "pixel_shuffle"
        or spec.tail[-1].inner_widths
    ):
        return None
    width = power_of_two_width(spec.tail[-1].factor ** 2 * spec.output_channels)
    return width if width <= MAX_PATCH_WIDTH else None


@dataclass(frozen=True)
class LayerOffsets:
    """Offsets of a layer's weight and bias in the packed buffers."""

    weight: int
    bias: int


@dataclass(frozen=True)
class BlockOffsets:
    """Offsets of a residual block's layers, and its padded inner width."""

    expand: LayerOffsets
    contract: LayerOffsets
    inner: int

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Offsets of W1, b1, W2, b2."""
        return self.expand.weight, self.expand.bias, self.contract.weight, self.contract.bias


@dataclass(frozen=True)
class StageOffsets:
    """One stage of the tail: offsets of its layers, factor, padded width and kernel side."""

    upsample: LayerOffsets
    blocks: tuple[BlockOffsets, ...]
    factor: int
    width: int
    kernel: int
    shuffled: bool
    """Whether the up-sampling layer is a 1x1 convolution with pixel shuffle."""


@triton.jit
def pack_kernel(flat_ptr, packed_ptr, source_ptr, size, SIZE: tl.constexpr):
    """packed[i] = flat[source[i]], or 0 where source[i] is -1; all [size]."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    source = tl.load(source_ptr + i, mask=i < size, other=-1)
    value = tl.load(flat_ptr + source, mask=source >= 0, other=0.0)
    tl.store(packed_ptr + i, value.to(packed_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def unpack_kernel(packed_ptr, flat_ptr, source_ptr, size, SIZE: tl.constexpr):
    """flat[source[i]] = packed[i]; packed are int64 sums [size]."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    source = tl.load(source_ptr + i, mask=i < size, other=-1)
    value = sum_value(tl.load(packed_ptr + i, mask=i < size, other=0))
    tl.store(flat_ptr + source, value, mask=source >= 0)


class StudentWeights:
    """Flat and packed buffers of one student, and the offsets of its layers in the packed buffers."""

    def __init__(self, student: Student, dtype: torch.dtype):
        self.spec = spec = student.spec
        self.parameters = list(student.parameters())
        self._flatten()
        self._indices: list[Tensor] = []
        self._size = 0
        self.encoded_width = multiple(spec.input_channels, HEAD_CHUNK)
        self.stream_width = power_of_two_width(spec.stream_width)
        body, *stages = student.chains()
        self.head = self._layer(body.entry, self.stream_width, self.encoded_width)
        self.body = tuple(
            self._block(block, self.stream_width, multiple(block.expand.out_channels, WIDE_CHUNK))
            for block in body.blocks.values()
        )
        self.patch_width = patch_width(spec)
        self.tail = tuple(self._stages(stages if self.patch_width is None else stages[:-1]))
        self.color = (
            self._layer(student.color, COLORS, self.tail[-1].width)
            if self.patch_width is None
            else None
        )
        self.source = torch.cat(self._indices).to(torch.int32)
        self.packed = torch.zeros(self._size, dtype=dtype, device=self.flat.device)
        self.packed_gradients = torch.zeros(self._size, dtype=torch.int64, device=self.flat.device)

    def refresh(self) -> None:
        """Copy the parameters into the packed buffer."""
        grid = (triton.cdiv(self._size, PACK_SIZE),)
        pack_kernel[grid](self.flat, self.packed, self.source, self._size, SIZE=PACK_SIZE)

    def publish_gradients(self) -> None:
        """Copy the packed gradients to the parameters' `grad`."""
        grid = (triton.cdiv(self._size, PACK_SIZE),)
        unpack_kernel[grid](
            self.packed_gradients, self.gradients, self.source, self._size, SIZE=PACK_SIZE
        )
        for parameter, gradient in zip(self.parameters, self._gradient_views, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _flatten(self) -> None:
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.gradients = torch.zeros_like(self.flat)
        self._gradient_views, self._index_of = [], {}
        indices = torch.arange(len(self.flat), device=self.flat.device).split(sizes)
        for parameter, value, gradient, index in zip(
            self.parameters,
            self.flat.split(sizes),
            self.gradients.split(sizes),
            indices,
            strict=True,
        ):
            parameter.data = value.view(parameter.shape)
            self._gradient_views.append(gradient.view(parameter.shape))
            self._index_of[parameter] = index.view(parameter.shape)

    def _append(self, index: Tensor, shape: tuple[int, ...]) -> int:
        """Append values of the flat buffer, padded to a shape; the offset of the first."""
        padded = torch.full(shape, -1, device=index.device)
        padded[tuple(slice(size) for size in index.shape)] = index
        offset = self._size
        self._indices.append(padded.flatten())
        self._size += padded.numel()
        return offset

    def _layer(self, layer: nn.Conv2d, outputs: int, inputs: int) -> LayerOffsets:
        assert layer.bias is not None
        weight = self._append(self._index_of[layer.weight][:, :, 0, 0], (outputs, inputs))
        return LayerOffsets(weight, self._append(self._index_of[layer.bias], (outputs,)))

    def _block(self, block: ResidualBlock, width: int, inner: int) -> BlockOffsets:
        expand = self._layer(block.expand, inner, width)
        return BlockOffsets(expand, self._layer(block.contract, width, inner), inner)

    def _upsample(self, upsample: Upsample, inputs: int, outputs: int) -> tuple[LayerOffsets, int]:
        """Where the layer begins, and its kernel as a transposed convolution's."""
        convolution = upsample.convolution
        assert convolution.bias is not None
        index, bias = self._index_of[convolution.weight], self._index_of[convolution.bias]
        bias_shape: tuple[int, ...] = (outputs,)
        if isinstance(upsample, ShuffledUpsample):
            factor = upsample.factor
            phases = (-1, factor, factor)
            index = index.unflatten(0, phases)[..., 0, 0].permute(1, 3, 2, 0)
            bias, bias_shape = bias.view(phases).permute(1, 2, 0), (factor, factor, outputs)
        else:
            index = index.permute(2, 0, 3, 1)  # ky, input, kx, output
        k = index.shape[0]
        weight = self._append(index, (k, inputs, k, outputs))
        return LayerOffsets(weight, self._append(bias, bias_shape)), k

    def _stages(self, stages: Sequence[TailChain]) -> list[StageOffsets]:
        offsets, inputs = [], self.stream_width
        for stage in stages:
            upsample, width = stage.entry, power_of_two_width(stage.entry.width)
            layer, k = self._upsample(upsample, inputs, width)
            blocks = tuple(
                self._block(block, width, power_of_two_width(block.expand.out_channels))
                for block in stage.blocks.values()
            )
            shuffled = isinstance(upsample, ShuffledUpsample)
            offsets.append(StageOffsets(layer, blocks, upsample.factor, width, k, shuffled))
            inputs = width
        return offsets
