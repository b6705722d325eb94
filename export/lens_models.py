"""The three models of a lens in SnapML's terms: tensors, operators, sizes.

SnapML has no batch axis and names the sizes x = width, y = height, z = channels. A tensor [1, C, H,
W] has (x, y, z) = (W, H, C), and its data are channel-last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper

from export.graph import IR_VERSIONS, TensorShape, load_model, operator_name, values_of
from export.onnx_tensors import (
    all_nodes,
    is_external,
    require_sound_tensors,
    size_in_bytes,
    stored_tensors,
)
from lightfield.encoding import encodings_per_coordinate

LENS_OPSET = 11
COLOR_SCALE = 255.0
"""Factor from the student's colors (0 to 1) to SnapML's textures (0 to 255)."""
LARGEST_BYTES = 10_000_000
"""Snap's limit for the SnapML assets of one lens, after import."""

RAY_OPERATORS = frozenset(
    {"Add", "Concat", "Constant", "Cos", "Div", "MatMul", "Mul", "Reshape", "Sin", "Slice", "Sub"}
    | {"Transpose"}
)
"""Operators that SnapML runs on the CPU, where Sampler and Embedder get float32."""
STUDENT_OPERATORS = frozenset(
    {"Add", "Conv", "ConvTranspose", "GeluSnap", "Mul", "Relu", "Sigmoid"}
)
"""Operators that SnapML runs on every backend, and GeluSnap, which some backends refuse."""

Size = tuple[int, int, int]


@dataclass(frozen=True)
class LensModel:
    """One model of a lens: its inputs and outputs by name, as (x, y, z)."""

    role: str
    inputs: dict[str, Size]
    outputs: dict[str, Size]
    output_scale: float = 1.0

    @property
    def file_name(self) -> str:
        """Name of the model's file in a project."""
        return f"{self.role.capitalize()}.onnx"

    @property
    def operators(self) -> frozenset[str]:
        """Operators that the model's graph may use."""
        return STUDENT_OPERATORS if self.role == "student" else RAY_OPERATORS


def lens_models(
    rays: tuple[int, int], image: tuple[int, int], points: int, frequencies: int
) -> tuple[LensModel, LensModel, LensModel]:
    """Sampler, Embedder and student of a lens; sizes are (height, width)."""
    (ray_height, ray_width), (height, width) = rays, image
    n, d, k = ray_height * ray_width, 3 * points, encodings_per_coordinate(frequencies)
    return (
        LensModel("sampler", {"c2w33": (3, 3, 1), "c2w13": (3, 1, 1)}, {"pts": (d, n, 1)}),
        LensModel("embedder", {"rays": (d, n, 1)}, {"embbrays": (d, n, k)}),
        LensModel(
            "student",
            {"input": (ray_width, ray_height, d * k)},
            {"output": (width, height, 3)},
            COLOR_SCALE,
        ),
    )


def model_faults(path: Path, expected: LensModel) -> list[str]:
    """Why SnapML, or the other models of the lens, cannot use an ONNX file; empty when they can.

    Raises:
        ExportError: when the file is missing or not ONNX, or its weights contradict their sizes.
    """
    model = load_model(path)
    require_sound_tensors(model, path)
    inputs, outputs = values_of(model)
    return [
        *graph_faults(model, expected.operators),
        *_tensor_faults("input", inputs, expected.inputs),
        *_tensor_faults("output", outputs, expected.outputs),
    ]


def graph_faults(model: onnx.ModelProto, operators: frozenset[str]) -> Iterator[str]:
    """Why Lens Studio cannot read a graph, or some of SnapML's backends cannot run the graph."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": LENS_OPSET} or len(model.opset_import) > 1:
        yield f"opsets {opsets}, SnapML reads opset {LENS_OPSET}"
    if model.ir_version > IR_VERSIONS[LENS_OPSET]:
        yield f"IR version {model.ir_version} is newer than {IR_VERSIONS[LENS_OPSET]}"
    if any(is_external(tensor) for tensor in stored_tensors(model)):
        yield "weights are stored in another file"
    if model.functions:
        yield "the graph has local functions"
    for strange in sorted({operator_name(node) for node in all_nodes(model)} - operators):
        yield f"operator {strange} does not run on all of SnapML's backends"
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            yield from _convolution_faults(node, weights)


def _convolution_faults(node: onnx.NodeProto, weights: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Settings of a convolution that only some of SnapML's backends support."""
    settings = {each.name: each for each in node.attribute}
    name = f"{node.op_type} {node.name or ' '.join(node.output)}"
    shape = weights.get(node.input[1], ()) if len(node.input) > 1 else ()
    if len(shape) != 4:
        yield f"{name} is not a 2D convolution with stored weights"
    sizes = {key: list(each.ints) for key, each in settings.items()}
    sizes["kernel_shape"] = sizes.get("kernel_shape") or list(shape[2:])
    for key in ("kernel_shape", "strides", "pads", "output_padding"):
        if len(set(sizes.get(key, ()))) > 1:
            yield f"{name} has uneven {key} {sizes[key]}"
    if any(step != 1 for step in sizes.get("dilations", ())):
        yield f"{name} is dilated by {sizes['dilations']}"
    if "group" in settings and settings["group"].i != 1:
        yield f"{name} has {settings['group'].i} groups"
    if "auto_pad" in settings and settings["auto_pad"].s != b"NOTSET":
        yield f"{name} uses auto_pad {settings['auto_pad'].s.decode(errors='replace')}"
    if "output_shape" in settings:
        yield f"{name} uses output_shape"


def shape_fault(name: str, shape: TensorShape) -> str | None:
    """Why a SnapML tensor cannot have this shape; None when it can."""
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape):
        return f"{name} {list(shape)} has a dynamic axis"
    if any(not 0 < size < 2**31 for size in sizes):
        return f"{name} {list(shape)} has an impossible size"
    return None


def _tensor_faults(
    kind: str, found: dict[str, TensorShape], expected: dict[str, Size]
) -> Iterator[str]:
    if found.keys() != expected.keys():
        yield f"{kind}s {sorted(found)} instead of {sorted(expected)}"
        return
    for name, (x, y, z) in expected.items():
        if fault := shape_fault(f"{kind} {name}", found[name]):
            yield fault
        elif found[name] != (1, z, y, x):
            yield f"{kind} {name} is {list(found[name])} instead of {[1, z, y, x]}"


def scales_by_255(path: Path) -> bool:
    """Whether the last node of a graph multiplies by 255."""
    model = load_model(path)
    outputs = {value.name for value in model.graph.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer if not is_external(tensor)}
    return any(
        node.op_type == "Mul"
        and outputs & set(node.output)
        and any(
            name in weights and (numpy_helper.to_array(weights[name]) == COLOR_SCALE).all()
            for name in node.input
        )
        for node in model.graph.node
    )


def imported_bytes(path: Path) -> int:
    """Estimated size of a model in a lens, where Lens Studio stores float32 weights as float16."""
    size = path.stat().st_size
    for tensor in stored_tensors(load_model(path)):
        size += size_in_bytes(tensor) if is_external(tensor) else 0
        size -= size_in_bytes(tensor) // 2 if tensor.data_type == onnx.TensorProto.FLOAT else 0
    return size
