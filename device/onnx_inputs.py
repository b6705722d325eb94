"""What a graph wants as input, and fixed random values for it.

A latency means something only for one shape, so every dimension must be a number in the graph. The
values are the same in every process and on every device: same graph, same inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from lightfield.errors import DeviceError

ELEMENT_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
"""Element types that travel to a device, by their ONNX number, under their numpy name."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy element type and shape of a graph's input or output."""

    name: str
    element: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the raw, row-major array."""
        return math.prod(self.shape) * np.dtype(self.element).itemsize


def input_specs(model: Path) -> tuple[TensorSpec, ...]:
    """The inputs that a caller must feed, in the graph's order.

    Raises:
        DeviceError: when the file is no ONNX graph, or an input has no fixed shape and type.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except FileNotFoundError:
        raise DeviceError("file is missing", where=model, remedy="export it first") from None
    except (OSError, DecodeError) as reason:
        raise _no_graph(model, str(reason)) from reason
    if not graph.node:
        raise _no_graph(model, "it has no operators")
    constants = {initializer.name for initializer in graph.initializer}
    return tuple(_spec(value, model) for value in graph.input if value.name not in constants)


def _no_graph(model: Path, reason: str) -> DeviceError:
    return DeviceError(
        f"not an ONNX graph ({reason})", where=model, remedy="export it again with `nelf export`"
    )


def _spec(value: onnx.ValueInfoProto, model: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)
    if not tensor.HasField("shape") or min(shape, default=1) < 1:
        raise DeviceError(
            f"input '{value.name}' has no fixed shape",
            where=model,
            remedy="export with every dimension a number: a latency belongs to one shape",
        )
    element = ELEMENT_TYPES.get(tensor.elem_type)
    if element is None:
        name = TensorProto.DataType.Name(tensor.elem_type)
        raise DeviceError(f"input '{value.name}' is {name}, which cannot be fed", where=model)
    return TensorSpec(value.name, element, shape)


def fixed_inputs(model: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """One array per input, in the graph's order: floats uniform in [-1, 1), integers 0 or 1."""
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for spec in input_specs(model):
        if np.issubdtype(np.dtype(spec.element), np.floating):
            values = random.uniform(-1, 1, spec.shape)
        else:
            values = random.integers(0, 2, spec.shape)
        arrays[spec.name] = values.astype(spec.element)
    return arrays


def checked_inputs(model: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The given arrays in the graph's order, row-major.

    Raises:
        DeviceError: when a name, a shape or an element type is not the graph's.
    """
    specs = input_specs(model)
    if missing := [spec.name for spec in specs if spec.name not in inputs]:
        raise DeviceError(f"no value for input {', '.join(missing)}", where=model)
    if unknown := set(inputs) - {spec.name for spec in specs}:
        raise DeviceError(f"the graph has no input {', '.join(sorted(unknown))}", where=model)
    for spec in specs:
        given = inputs[spec.name]
        if given.shape != spec.shape or given.dtype != np.dtype(spec.element):
            raise DeviceError(
                f"input '{spec.name}' is {given.dtype}{list(given.shape)}, "
                f"the graph wants {spec.element}{list(spec.shape)}",
                where=model,
            )
    return [np.ascontiguousarray(inputs[spec.name]) for spec in specs]
