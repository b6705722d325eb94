"""What is in an exported file: tensors, operators, arithmetic, and whether SnapML takes it.

Works on any ONNX file, not only on ours. Multiply-accumulates are counted as `lightfield.student` counts
them: a transposed convolution does kernel^2 * in * out of them per *input* pixel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import checker, helper, shape_inference

from export.coreml import package_facts
from export.graph import Shape, load_model, operators_of, shapes_by_onnx, values_of
from export.lens_models import (
    LARGEST_BYTES,
    RAY_OPERATORS,
    STUDENT_OPERATORS,
    imported_bytes,
    reader_faults,
)


@dataclass(frozen=True)
class Inspection:
    """What a file holds; None where it cannot be told."""

    path: Path
    kind: str
    size_bytes: int
    opset: int | None
    ir_version: int | None
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: dict[str, int]
    """How often each operator occurs."""
    weights: dict[str, int]
    """How many numbers of each type it stores, sizes and indices aside."""
    macs: int | None
    snapml_faults: list[str]
    """Why SnapML would not run it; empty when it would."""

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "path": str(self.path), "parameters": self.parameters}


def inspect(path: Path) -> Inspection:
    """Look into an ONNX file or a CoreML package.

    Raises:
        ExportError: when it is missing, or neither.
    """
    if path.suffix == ".mlpackage" or path.is_dir():
        return _inspect_package(path)
    model = load_model(path)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    inputs, outputs = values_of(model)
    return Inspection(
        path,
        "ONNX",
        path.stat().st_size,
        opsets.get(""),
        model.ir_version,
        inputs,
        outputs,
        operators_of(model),
        _weights_of(model),
        macs_of(model),
        list(_snapml_faults(path, model)),
    )


def _inspect_package(path: Path) -> Inspection:
    facts = package_facts(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Inspection(
        path, f"CoreML, specification {facts.specification}", size, None, None,
        facts.inputs, facts.outputs, facts.operators, facts.weights, facts.macs,
        ["a CoreML package, and SnapML reads ONNX"],
    )  # fmt: skip


def _weights_of(model: onnx.ModelProto) -> dict[str, int]:
    """Integers of 32 and 64 bits are biases on int8 grids, and sizes: the latter do not count."""
    counted = Counter[str]()
    for tensor in model.graph.initializer:
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        counted[kind] += math.prod(tensor.dims) if kind != "int64" else 0
    return dict(+counted)


def macs_of(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of convolutions and matrix products in one run.

    None when a size they depend on is not known from the graph.
    """
    try:
        shapes = shapes_by_onnx(model)
    except (checker.ValidationError, shape_inference.InferenceError):
        return None
    shapes |= values_of(model)[0]
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    try:
        return sum(_node_macs(node, shapes) for node in model.graph.node)
    except (KeyError, TypeError):  # no shape, or one with a symbol in it
        return None


def _node_macs(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    if node.op_type == "Conv":
        _, *kernel = shapes[node.input[1]]
        return _product(shapes[node.output[0]]) * _product(kernel)
    if node.op_type == "ConvTranspose":
        _, *kernel = shapes[node.input[1]]
        return _product(shapes[node.input[0]]) * _product(kernel)
    if node.op_type in ("MatMul", "Gemm"):
        inner = shapes[node.input[0]][-1]
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        if transposed:
            inner = shapes[node.input[0]][0]
        return _product(shapes[node.output[0]]) * _product([inner])
    return 0


def _product(sizes: Any) -> int:
    if any(not isinstance(size, int) for size in sizes):
        raise TypeError("a symbolic size")
    return math.prod(sizes)


def _snapml_faults(path: Path, model: onnx.ModelProto) -> Iterator[str]:
    """What the file breaks of the rules that hold for all models of a lens."""
    yield from reader_faults(model)
    allowed = RAY_OPERATORS if _is_ray_graph(model) else STUDENT_OPERATORS
    if strange := sorted(operators_of(model).keys() - allowed):
        yield f"{', '.join(strange)} do not run on all of SnapML's backends"
    for shapes in values_of(model):
        for name, shape in shapes.items():
            if any(not isinstance(size, int) for size in shape):
                yield f"{name} {list(shape)} has a dynamic axis"
            elif len(shape) != 4 or shape[0] != 1:
                yield f"{name} {list(shape)} is not [1, channels, height, width]"
    if (size := imported_bytes(path)) > LARGEST_BYTES:
        yield f"about {size / 1e6:.1f} MB after import, over Snap's {LARGEST_BYTES / 1e6:.0f} MB"


def _is_ray_graph(model: onnx.ModelProto) -> bool:
    """Whether it is a Sampler or an Embedder by its inputs, which a lens runs on the CPU."""
    return values_of(model)[0].keys() <= {"c2w33", "c2w13", "rays"}
