"""The student as an ONNX graph, from encoded rays [1, C, H, W] to colors [1, 3, sH, sW].

Two ways of up-sampling compute the same function:

- `trained` repeats the network operator by operator, with operators that all of SnapML's backends
  have. Pixel shuffle becomes a transposed convolution of ones.
- `phases` is the fastest way in ONNX Runtime. The s x s pixels of every ray (its phases) are
  channels of an ordinary convolution. The residual blocks work on single pixels, so they become
  grouped 1x1 convolutions with one group per phase. DepthToSpace moves the phases to their pixels
  at the end of the stage, and in the last stage after the colors.

A last stage of pixel shuffle without residual blocks has nothing between its convolution and the
convolution of the colors. In both ways the two convolutions become one.

A transposed convolution with kernel 4, stride 2, padding 1 is a 2x2 convolution over the corners
between rays: corner m of H + 1 reads the rays m - 1 and m and writes the output rows 2m - 1 (phase
0) and 2m (phase 1), with the kernel rows (2, 0) and (3, 1). The graph cuts off the surplus row and
column at each side. With kernel 3 and stride 3 the taps do not overlap, so a 1x1 convolution
suffices.

Inputs and outputs are float32 in every precision, so that an application can swap the files. In an
fp16 graph, weights and operators between two Cast nodes are in half precision. In an int8 graph,
each planned convolution reads its weights through DequantizeLinear, with one step per output
channel. A convolution with int8 arithmetic stands between pairs of QuantizeLinear and
DequantizeLinear, a pattern that runtimes replace by integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from jaxtyping import Float
from torch import nn

from export.graph import Contract, GraphBuilder, check_file, save_model
from export.quantization import Grid, Quantized, quantized_bias, quantized_weight
from lightfield.errors import ExportError
from lightfield.files import atomic_path
from lightfield.student import (
    BodyChain,
    Chain,
    ShuffledUpsample,
    Student,
    TailChain,
    TransposedUpsample,
    Upsample,
    folded,
)

KERNEL_ROWS_OF_PHASES = np.array([[2, 0], [3, 1]])
"""For each of the two phases, the rows of the 4x4 kernel that apply to the rays m - 1 and m."""


@dataclass(frozen=True)
class GraphVariant:
    """Opset, operators and precision of a student's graph."""

    opset: int
    upsampling: Literal["trained", "phases"]
    gelu: Literal["Gelu", "Erf", "GeluSnap"]
    """Operator of exact GELU: ONNX's Gelu (opset 20), a chain with Erf, or SnapML's GeluSnap."""
    half: bool = False
    """Weights and arithmetic in fp16."""
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    """By layer name, the convolutions with int8 weights and, optionally, int8 arithmetic."""

    @property
    def operators(self) -> frozenset[str]:
        """Operators that the precision adds to the graph."""
        casts = {"Cast"} if self.half else set()
        grids = {"QuantizeLinear", "DequantizeLinear"} if self.quantized else set()
        return frozenset(casts | grids)


ONNX_RUNTIME = GraphVariant(20, "phases", "Gelu")
"""Opset 20 has GELU as one operator, so that the runtime need not fuse it from several."""
ONNX_RUNTIME_HALF = replace(ONNX_RUNTIME, half=True)

OLDER_RUNTIMES = GraphVariant(17, "phases", "Erf")
OLDER_RUNTIMES_HALF = replace(OLDER_RUNTIMES, half=True)

SNAP_ML = GraphVariant(11, "trained", "GeluSnap")


def student_contract(student: Student, height: int, width: int, variant: GraphVariant) -> Contract:
    """The contract of the student's graph for height x width rays."""
    spec = student.spec
    return Contract(
        {"input": (1, spec.input_channels, height, width)},
        {"output": (1, spec.output_channels, spec.factor * height, spec.factor * width)},
        variant.opset,
        student_operators(student, variant),
    )


def student_operators(student: Student, variant: GraphVariant) -> frozenset[str]:
    """Operators that a student's graph may use."""
    gelu = {"Div", "Erf", "Add", "Mul"} if variant.gelu == "Erf" else {variant.gelu}
    activation = {"gelu": gelu, "sigmoid_gelu": {"Mul", "Sigmoid"}, "relu": {"Relu"}}
    phases = variant.upsampling == "phases"
    upsampling = {"Slice", "DepthToSpace"} if phases else {"ConvTranspose"}
    common = frozenset({"Conv", "Add", "Sigmoid"})
    return variant.operators | common | upsampling | activation[student.spec.activation]


def student_model(
    student: Student, height: int, width: int, variant: GraphVariant
) -> onnx.ModelProto:
    """The graph of a student in evaluation mode, with its batch norms folded.

    Raises:
        ExportError: when weights hold NaN or infinity, or exceed the range of fp16.
    """
    graph = GraphBuilder(variant.opset)
    emit_student(graph, folded(student), "input", height, width, variant, name="output")
    return graph.model(student_contract(student, height, width, variant), title="Student")


def write_student_onnx(student: Student, height: int, width: int, path: Path) -> Path:
    """Write the graph for ONNX Runtime, for height x width rays, atomically.

    Pruning measures the latency of this file. The graph is written as built and is not compared
    with PyTorch; see `export.parity.student_parity`.

    Raises:
        ExportError: when weights hold NaN or infinity.
    """
    with atomic_path(path) as temporary:
        save_model(student_model(student, height, width, ONNX_RUNTIME), temporary)
        check_file(temporary, student_contract(student, height, width, ONNX_RUNTIME))
    return path


def emit_student(
    graph: GraphBuilder,
    student: Student,
    x: str,
    height: int,
    width: int,
    variant: GraphVariant,
    *,
    name: str,
) -> str:
    """Add the nodes of a folded student after `x` [N, C, H, W]; returns `name` [N, 3, sH, sW]."""
    assert student.spec.norm == "none"
    emitter = _Emitter(graph, student.cpu(), variant)
    body, *stages = student.chains()
    output = f"{name}.half" if variant.half else name
    if variant.half:
        x = graph.add("Cast", x, to=onnx.TensorProto.FLOAT16, name=f"{x}.half")
    stream = emitter.body(body, x)
    for stage in stages:
        last = stage is stages[-1]
        stream = emitter.stage(stage, stream, height, width, output if last else None)
        height, width = height * stage.entry.factor, width * stage.entry.factor
    if not stages:
        stream = emitter.color(stream, 1, output)
    if variant.half:
        return graph.add("Cast", stream, to=onnx.TensorProto.FLOAT, name=name)
    return stream


@dataclass(frozen=True)
class _Emitter:
    """Adds the modules of a student to a graph; nodes are named after the modules."""

    graph: GraphBuilder
    student: Student
    variant: GraphVariant

    def body(self, body: BodyChain, x: str) -> str:
        head = self.activation(self.pointwise(body.entry, x, "head"), "head.activation")
        return self.graph.add("Add", self.blocks(body, head), head, name=body.name)

    def stage(self, stage: TailChain, x: str, height: int, width: int, output: str | None) -> str:
        """A tail stage on height x width pixels; the last one, with `output`, adds the colors."""
        upsample = stage.entry
        if output is not None and self.ends_linearly(stage):
            return self.patches(stage, x, output)
        stream = self.upsample(upsample, x, stage.entry_name)
        groups = upsample.factor**2 if self.variant.upsampling == "phases" else 1
        stream = self.blocks(stage, stream, groups)
        if output is not None:
            stream = self.color(stream, groups, output if groups == 1 else "color.phases")
        if groups == 1:
            return stream
        name = output or stage.name
        if isinstance(upsample, ShuffledUpsample) or upsample.factor == 3:
            return self.pixels(stream, upsample.factor, upsample.width, name)
        wide = self.pixels(stream, upsample.factor, upsample.width, f"{name}.uncut")
        begin, axes = self.shared("cut.begin", [1, 1]), self.shared("cut.axes", [2, 3])
        end = self.shared(f"{name}.end", [2 * height + 1, 2 * width + 1])
        return self.graph.add("Slice", wide, begin, end, axes, name=name)

    def ends_linearly(self, stage: TailChain) -> bool:
        """Whether last stage and colors become one convolution; an int8 plan lists them as two."""
        shuffled = isinstance(stage.entry, ShuffledUpsample) and not stage.blocks
        return shuffled and not self.variant.quantized

    def patches(self, stage: TailChain, x: str, output: str) -> str:
        """The colors of all pixels of each ray from one convolution, then moved to their pixels."""
        weight, bias = phase_convolution(stage.entry)
        kernel, offset = _arrays(self.student.color)
        phases, mixing = stage.entry.factor**2, kernel[:, :, 0, 0]
        bias = (bias.reshape(phases, -1) @ mixing.T + offset).reshape(-1)
        by_phase = weight.reshape(phases, stage.entry.width, -1)
        weight = np.einsum("ow,pwi->poi", mixing, by_phase).reshape(len(bias), -1, 1, 1)
        colors = self.weighted("Conv", x, weight, bias, stage.entry_name)
        colors = self.graph.add("Sigmoid", colors, name="color.phases")
        return self.pixels(colors, stage.entry.factor, len(offset), output)

    def upsample(self, upsample: Upsample, x: str, layer: str) -> str:
        if self.variant.upsampling == "trained" and isinstance(upsample, TransposedUpsample):
            strides, pads = [upsample.factor] * 2, [int(upsample.padding[0])] * 4
            weight, bias = _arrays(upsample)
            return self.weighted(
                "ConvTranspose", x, weight, bias, layer, strides=strides, pads=pads
            )
        weight, bias = phase_convolution(upsample)
        pads = [weight.shape[2] - 1] * 4
        phases = self.weighted("Conv", x, weight, bias, layer, pads=pads)
        if self.variant.upsampling == "phases" or upsample.factor == 1:
            return phases
        return self.pixels(phases, upsample.factor, upsample.width, f"{layer}.pixels")

    def blocks(self, chain: Chain, x: str, groups: int = 1) -> str:
        for layer, block in chain.blocks.items():
            hidden = self.pointwise(block.expand, x, f"{layer}.expand", groups)
            hidden = self.activation(hidden, f"{layer}.activation")
            change = self.pointwise(block.contract, hidden, f"{layer}.contract", groups)
            x = self.graph.add("Add", x, change, name=layer)
        return x

    def color(self, x: str, groups: int, name: str) -> str:
        return self.graph.add(
            "Sigmoid", self.pointwise(self.student.color, x, "color", groups), name=name
        )

    def activation(self, x: str, layer: str) -> str:
        add, kind = self.graph.add, self.student.spec.activation
        if kind == "relu":
            return add("Relu", x, name=layer)
        if kind == "sigmoid_gelu":
            scaled = add("Mul", x, self.shared("sigmoid_gelu.slope", 1.702), name=f"{layer}.scaled")
            return add("Mul", x, add("Sigmoid", scaled, name=f"{layer}.gate"), name=layer)
        if self.variant.gelu != "Erf":
            return add(self.variant.gelu, x, name=layer)
        # Runtimes recognize exactly this chain and fuse it to one GELU.
        scaled = add("Div", x, self.shared("gelu.root_two", 2**0.5), name=f"{layer}.scaled")
        erf = add("Erf", scaled, name=f"{layer}.erf")
        gate = add("Add", erf, self.shared("gelu.one", 1.0), name=f"{layer}.gate")
        twice = add("Mul", x, gate, name=f"{layer}.twice")
        return add("Mul", twice, self.shared("gelu.half", 0.5), name=layer)

    def pointwise(self, conv: nn.Conv2d, x: str, layer: str, groups: int = 1) -> str:
        """A 1x1 convolution, repeated for each of `groups` phases."""
        weight, bias = _arrays(conv)
        weight, bias = np.tile(weight, (groups, 1, 1, 1)), np.tile(bias, groups)
        return self.weighted("Conv", x, weight, bias, layer, group=groups)

    def weighted(
        self, operator: str, x: str, weight: np.ndarray, bias: np.ndarray, layer: str, **how: Any
    ) -> str:
        how["kernel_shape"] = weight.shape[2:]
        plan = self.variant.quantized.get(layer)
        if plan is None:
            kernel = self.constant(f"{layer}.weight", weight)
            offset = self.constant(f"{layer}.bias", bias)
            return self.graph.add(operator, x, kernel, offset, name=layer, **how)
        axis = 1 if operator == "ConvTranspose" else 0
        levels, steps = quantized_weight(weight, axis)
        kernel = self.dequantized(levels, steps, f"{layer}.weight", axis=axis)
        if plan.input is None or plan.output is None:
            offset = self.graph.constant(f"{layer}.bias", bias)
            return self.graph.add(operator, x, kernel, offset, name=layer, **how)
        x = self.on_grid(x, plan.input, f"{layer}.input")
        bias_levels, bias_steps = quantized_bias(bias, steps, plan.input)
        offset = self.dequantized(bias_levels, bias_steps, f"{layer}.bias", axis=0)
        sums = self.graph.add(operator, x, kernel, offset, name=f"{layer}.sums", **how)
        return self.on_grid(sums, plan.output, layer)

    def dequantized(self, levels: np.ndarray, steps: np.ndarray, layer: str, *, axis: int) -> str:
        """Dequantized weights, from int8 levels and one step per channel of an axis."""
        inputs = (
            self.graph.constant(f"{layer}.levels", levels),
            self.graph.constant(f"{layer}.steps", steps),
            self.graph.constant(f"{layer}.zeros", np.zeros(len(steps), levels.dtype)),
        )
        return self.graph.add("DequantizeLinear", *inputs, axis=axis, name=layer)

    def on_grid(self, x: str, grid: Grid, name: str) -> str:
        """Activations rounded to the values of a grid."""
        step = self.graph.constant(f"{name}.step", grid.step)
        zero = self.graph.constant(f"{name}.zero", np.int8(grid.zero_point))
        levels = self.graph.add("QuantizeLinear", x, step, zero, name=f"{name}.levels")
        return self.graph.add("DequantizeLinear", levels, step, zero, name=name)

    def constant(self, name: str, values: np.ndarray | float) -> str:
        """A weight in the precision of the variant."""
        if not self.variant.half:
            return self.graph.constant(name, values)
        with np.errstate(over="ignore"):
            half = np.asarray(values).astype(np.float16)
        if np.isinf(half).any() and np.isfinite(values).all():
            raise ExportError("weights exceed the range of fp16", where=name)
        return self.graph.constant(name, half)

    def pixels(self, x: str, factor: int, width: int, name: str) -> str:
        """The channels phase * width + c moved to their pixels."""
        if self.variant.upsampling == "phases":
            return self.graph.add("DepthToSpace", x, blocksize=factor, mode="DCR", name=name)
        # All of SnapML's backends have transposed convolutions. These taps do not overlap.
        taps = np.einsum("pq,cd->pcdq", np.eye(factor**2), np.eye(width)).astype(np.float32)
        kernel = self.constant(f"{name}.taps", taps.reshape(-1, width, factor, factor))
        zeros = self.constant(f"{name}.zeros", np.zeros(width, np.float32))
        how = {"strides": [factor] * 2, "kernel_shape": [factor] * 2, "pads": [0] * 4}
        return self.graph.add("ConvTranspose", x, kernel, zeros, name=name, **how)

    def shared(self, name: str, value: float | list[int]) -> str:
        if name in self.graph.weights:
            return name
        if isinstance(value, float):
            return self.constant(name, value)
        return self.graph.constant(name, value)


def _arrays(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[np.ndarray, np.ndarray]:
    assert conv.bias is not None
    return conv.weight.detach().numpy(), conv.bias.detach().numpy()


def phase_convolution(
    upsample: Upsample,
) -> tuple[Float[np.ndarray, "po i taps taps"], Float[np.ndarray, " po"]]:
    """An up-sampling layer as a convolution with output channels phase * width + channel."""
    weight, bias = _arrays(upsample.convolution)
    phases = upsample.factor**2
    if isinstance(upsample, ShuffledUpsample):
        by_channel = weight.reshape(upsample.width, phases, -1)
        by_phase = by_channel.transpose(1, 0, 2).reshape(*weight.shape)
        return by_phase, bias.reshape(upsample.width, phases).T.reshape(-1)
    rows = KERNEL_ROWS_OF_PHASES if upsample.factor == 2 else np.arange(3)[:, None]
    taps = rows.shape[1]
    # [in, out, phase_y, tap_y, phase_x, tap_x] -> [phase_y, phase_x, out, in, tap_y, tap_x]
    split = weight[:, :, rows][..., rows].transpose(2, 4, 1, 0, 3, 5)
    return split.reshape(-1, weight.shape[0], taps, taps), np.tile(bias, phases)
