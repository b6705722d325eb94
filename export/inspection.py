"""Inspection of ONNX files and CoreML models: tensors, operators, MACs, SnapML compatibility.

Works on any ONNX file and any CoreML model. A figure that does not follow from the file is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import checker, shape_inference

from export.coreml import CoremlFacts, coreml_facts, is_coreml_file
from export.graph import TensorShape, load_model, operators_of, shapes_by_onnx, values_of
from export.lens_models import (
    LARGEST_BYTES,
    RAY_OPERATORS,
    STUDENT_OPERATORS,
    graph_faults,
    imported_bytes,
    shape_fault,
)
from export.onnx_macs import UnknownMacsError, macs_of
from export.onnx_tensors import (
    element_count,
    is_external,
    require_sound_tensors,
    stored_tensors,
    type_name,
)
from lightfield.errors import ExportError, first_line


@dataclass(frozen=True)
class Inspection:
    """Contents of an inspected file; None where the file does not state a figure."""

    path: Path
    kind: str
    size_bytes: int
    opset: int | None
    ir_version: int | None
    inputs: dict[str, TensorShape]
    outputs: dict[str, TensorShape]
    operators: dict[str, int] | None
    """How often each operator occurs."""
    weights: dict[str, int] | None
    """Number of stored weights by element type, without sizes and indices."""
    macs: int | None
    macs_unknown: str
    """Why the multiply-accumulates are unknown; empty when they are known."""
    snapml_faults: list[str]
    """Why SnapML cannot run the file; empty when SnapML can."""

    @property
    def parameters(self) -> int | None:
        """Number of all weights."""
        return None if self.weights is None else sum(self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain data."""
        return {**asdict(self), "path": str(self.path), "parameters": self.parameters}


def inspect(path: Path) -> Inspection:
    """Inspect an ONNX file or a CoreML model.

    Raises:
        ExportError: when the file is missing, damaged, or of another type, which the error names.
    """
    if path.is_dir():
        return _inspect_coreml(path, coreml_facts(path))
    try:
        model = load_model(path)
    except ExportError:
        if not is_coreml_file(path):
            raise
        return _inspect_coreml(path, coreml_facts(path))
    require_sound_tensors(model, path)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    inputs, outputs = values_of(model)
    try:
        macs, unknown = macs_of(model), ""
    except UnknownMacsError as reason:
        macs, unknown = None, reason.what
    return Inspection(
        path,
        "ONNX",
        path.stat().st_size,
        opsets.get("", opsets.get("ai.onnx")),
        model.ir_version,
        inputs,
        outputs,
        operators_of(model),
        _weights_of(model),
        macs,
        unknown,
        list(_snapml_faults(path, model)),
    )


def _inspect_coreml(path: Path, facts: CoremlFacts) -> Inspection:
    files = (file for file in (path, *path.rglob("*")) if file.is_file())
    return Inspection(
        path, facts.kind, sum(file.stat().st_size for file in files), None, None,
        facts.inputs, facts.outputs, facts.operators, facts.weights, facts.macs,
        "" if facts.macs is not None else "the model lacks a size, or an operator is unknown",
        ["a CoreML model; SnapML reads ONNX only"],
    )  # fmt: skip


def _weights_of(model: onnx.ModelProto) -> dict[str, int]:
    """Number of weights by element type, without int64, which holds sizes and indices."""
    counted = Counter[str]()
    for tensor in stored_tensors(model):
        kind = type_name(tensor.data_type)
        counted[kind] += element_count(tensor) if kind != "int64" else 0
    return dict(+counted)


def _snapml_faults(path: Path, model: onnx.ModelProto) -> Iterator[str]:
    """Rules for all models of a lens that the file breaks."""
    inputs, outputs = values_of(model)
    yield from graph_faults(model, RAY_OPERATORS if _is_ray_graph(inputs) else STUDENT_OPERATORS)
    if not (inputs and outputs and model.graph.node):
        yield "the graph has no inputs, no outputs or no operators"
    for value in (*model.graph.input, *model.graph.output):
        is_float = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if value.name in inputs | outputs and not is_float:
            yield f"{value.name} does not hold float32"
    for name, shape in (inputs | outputs).items():
        if fault := shape_fault(name, shape):
            yield fault
        elif len(shape) != 4 or shape[0] != 1:
            yield f"{name} {list(shape)} is not [1, channels, height, width]"
    if (size := imported_bytes(path)) > LARGEST_BYTES:
        yield (
            f"about {size / 1e6:.1f} MB after import, more than Snap's limit of "
            f"{LARGEST_BYTES / 1e6:.0f} MB"
        )
    yield from _inner_faults(model)


def _inner_faults(model: onnx.ModelProto) -> Iterator[str]:
    """The first error of ONNX's checker, or inner values with impossible sizes.

    Graphs with local functions or external weights cannot be checked and yield nothing.
    """
    if model.functions or any(is_external(tensor) for tensor in stored_tensors(model)):
        return
    try:
        shapes = shapes_by_onnx(model)
    except (checker.ValidationError, shape_inference.InferenceError, ValueError) as error:
        yield f"ONNX's checker refuses it ({first_line(error)})"
        return
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name, shape in shapes.items():
        if name not in ends and any(isinstance(size, int) and size < 1 for size in shape):
            yield f"{name} {list(shape)} has an impossible size"


def _is_ray_graph(inputs: dict[str, TensorShape]) -> bool:
    """Whether the inputs are those of a Sampler or an Embedder, which a lens runs on the CPU."""
    return bool(inputs) and inputs.keys() <= {"c2w33", "c2w13", "rays"}
