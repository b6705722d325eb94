"""Student and fused graph as programs in CoreML's intermediate language (MIL).

    student   input [1, C, H, W] fp16  ->  output [1, 3, sH, sW] fp16
    fused     pose [1, 3, 4] fp32      ->  rgb [1, 3, sH, sW] fp16

Programs are built operator by operator from folded weights, like the ONNX graphs. Tracing would
depend on the PyTorch versions that the converter supports, and conversion through torch.export has
silently replaced one kind of GELU by another. In the fused program everything before the first
convolution is fp32: in fp16 a coordinate near 4 is off by 0.002, which the highest of six
frequencies multiplies by 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from export.ray_graphs import PointMap
from lightfield.errors import ExportError
from lightfield.student import Chain, ShuffledUpsample, Student, TailChain


def student_program(ct: Any, student: Student, height: int, width: int) -> Any:
    """The program of a folded student on height x width rays; `ct` is the coremltools package.

    Raises:
        ExportError: when a weight is NaN or exceeds the range of fp16.
    """
    shape = (1, student.spec.input_channels, height, width)

    def image(mb: Any, rays: Any) -> Any:
        return _Network(mb, student).image(rays, "output")

    return _program(ct, "input", shape, "fp16", image)


def fused_program(ct: Any, student: Student, points: PointMap, height: int, width: int) -> Any:
    """The program from a pose to a folded student's image; `ct` is the coremltools package.

    Raises:
        ExportError: when a weight is NaN or exceeds the range of fp16.
    """

    def image(mb: Any, pose: Any) -> Any:
        encoded = _encoded(mb, points, student.spec.frequencies, pose)
        rays = mb.reshape(x=encoded, shape=[1, -1, height, width], name="rays_fp32")
        rays = mb.cast(x=rays, dtype="fp16", name="rays")
        return _Network(mb, student).image(rays, "rgb")

    return _program(ct, "pose", (1, 3, 4), "fp32", image)


def _program(
    ct: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    body: Callable[[Any, Any], Any],
) -> Any:
    """A program with one input; `body` adds the operators and returns the result."""
    mil, mb = ct.converters.mil.mil, ct.converters.mil.Builder
    source = mb.placeholder(shape=shape, dtype=getattr(mil.types, dtype))
    with mil.Function({name: source}, opset_version=ct.target.iOS16) as function:
        function.set_outputs([body(mb, function.inputs[name])])
    program = mil.Program()
    program.add_function("main", function)
    return program


def _encoded(mb: Any, points: PointMap, frequencies: int, pose: Any) -> Any:
    """The encodings [1, D, K, H*W] of all points, by the transposed point map."""

    def columns(values: np.ndarray) -> np.ndarray:
        return values.T.reshape(1, values.shape[-1], -1).astype(np.float32)

    rotation = mb.slice_by_size(x=pose, begin=[0, 0, 0], size=[1, 3, 3], name="rotation")
    center = mb.slice_by_size(x=pose, begin=[0, 0, 3], size=[1, 3, 1], name="center")
    directions = points.directions.T[None].astype(np.float32)
    rays = mb.matmul(x=rotation, y=directions, name="rays_in_world")
    if points.gain is not None:
        depths = mb.slice_by_size(x=rays, begin=[0, 2, 0], size=[1, 1, -1], name="depths")
        rays = mb.real_div(x=rays, y=depths, name="rays_at_unit_depth")
    along = mb.matmul(x=columns(points.spread), y=rays, name="along_rays")
    if points.gain is not None:
        gain = mb.matmul(x=columns(points.gain), y=center, name="gain_of_pose")
        gain = mb.add(x=gain, y=columns(points.gain_bias), name="gain_of_coordinate")
        along = mb.mul(x=along, y=gain, name="projected")
    shift = mb.matmul(x=columns(points.shift), y=center, name="shift_of_pose")
    if points.shift_bias.any():
        shift = mb.add(x=shift, y=columns(points.shift_bias), name="shift_of_coordinate")
    coordinates = mb.expand_dims(x=mb.add(x=along, y=shift, name="points"), axes=[2])
    powers = 2.0 ** np.arange(frequencies, dtype=np.float32).reshape(1, 1, -1, 1)
    phases = mb.mul(x=coordinates, y=powers, name="phases")
    sines, cosines = mb.sin(x=phases, name="sines"), mb.cos(x=phases, name="cosines")
    return mb.concat(values=[sines, cosines, coordinates], axis=2, name="encoded")


@dataclass(frozen=True)
class _Network:
    """Adds the modules of a student to a program, in fp16."""

    mb: Any
    student: Student

    def image(self, rays: Any, name: str) -> Any:
        body, *stages = self.student.chains()
        head = self.activation(self.pointwise(body.entry, rays, "head"), "head_activation")
        stream = self.mb.add(x=self.blocks(body, head), y=head, name="body")
        for stage in stages:
            stream = self.blocks(stage, self.upsample(stage, stream))
        return self.mb.sigmoid(x=self.pointwise(self.student.color, stream, "color"), name=name)

    def blocks(self, chain: Chain, x: Any) -> Any:
        for name, block in chain.blocks.items():
            layer = name.replace(".", "_")
            hidden = self.pointwise(block.expand, x, f"{layer}_expand")
            hidden = self.activation(hidden, f"{layer}_activation")
            change = self.pointwise(block.contract, hidden, f"{layer}_contract")
            x = self.mb.add(x=x, y=change, name=layer)
        return x

    def upsample(self, stage: TailChain, x: Any) -> Any:
        upsample, layer = stage.entry, stage.entry_name.replace(".", "_")
        if isinstance(upsample, ShuffledUpsample):
            phases = self.pointwise(upsample.convolution, x, f"{layer}_phases")
            return self.mb.pixel_shuffle(x=phases, upscale_factor=upsample.factor, name=layer)
        return self.mb.conv_transpose(
            x=x,
            **_weights(upsample, layer),
            strides=list(upsample.stride),
            pad_type="custom",
            pad=[int(upsample.padding[0])] * 4,
            name=layer,
        )

    def pointwise(self, conv: nn.Conv2d, x: Any, layer: str) -> Any:
        return self.mb.conv(x=x, **_weights(conv, layer), pad_type="valid", name=layer)

    def activation(self, x: Any, layer: str) -> Any:
        kind = self.student.spec.activation
        if kind == "relu":
            return self.mb.relu(x=x, name=layer)
        mode = "EXACT" if kind == "gelu" else "SIGMOID_APPROXIMATION"
        return self.mb.gelu(x=x, mode=mode, name=layer)


def _weights(conv: nn.Conv2d | nn.ConvTranspose2d, layer: str) -> dict[str, np.ndarray]:
    assert conv.bias is not None
    with np.errstate(over="ignore"):
        weights = {
            kind: values.detach().numpy().astype(np.float16)
            for kind, values in (("weight", conv.weight), ("bias", conv.bias))
        }
    if not all(np.isfinite(values).all() for values in weights.values()):
        raise ExportError("weights are NaN or exceed the range of fp16", where=layer)
    return weights
