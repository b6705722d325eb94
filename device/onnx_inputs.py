"""Inputs of ONNX graphs for a device: shapes, fixed random values, and graphs in a single file.

A latency belongs to one shape, so every dimension of an input must be fixed. The random values depend
only on the graph and are the same in every process and on every device.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

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
"""Supported element types: ONNX number -> numpy name."""

_MAX_FILE_BYTES = 2**31 - 1
"""Maximum size of an ONNX file, because protobuf messages cannot be larger."""


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
    """The inputs that a caller must provide, in the graph's order.

    Raises:
        DeviceError: when the file is not an ONNX graph, or an input has no fixed shape and type.
    """
    graph = _loaded(model).graph
    if not graph.node:
        raise _no_graph(model, "it has no operators")
    constants = {initializer.name for initializer in graph.initializer}
    return tuple(_spec(value, model) for value in graph.input if value.name not in constants)


def whole_graph(model: Path, folder: Path) -> Path:
    """The graph in a single file: the file itself, or, if its weights are in other files, a copy in
    `folder` that includes the weights.

    Raises:
        DeviceError: when the file is not an ONNX graph, or its weights cannot be read or are too large.
    """
    proto = _loaded(model)
    outside = [tensor for tensor in _tensors(proto) if uses_external_data(tensor)]
    if not outside:
        return model
    path = folder / model.name
    try:
        size_bytes = proto.ByteSize() + sum(_size_bytes(tensor) for tensor in outside)
        if size_bytes > _MAX_FILE_BYTES:
            raise DeviceError(
                f"the graph with its external weights takes {size_bytes / 1e9:.1f} GB",
                where=model,
                remedy="a phone needs the graph in a single file, which ONNX limits to 2 GB",
            )
        with warnings.catch_warnings():  # ONNX warns about unknown keys of external data
            warnings.simplefilter("ignore")
            for tensor in outside:
                _load_external_data(tensor, model.parent)
        path.write_bytes(proto.SerializeToString())
    except (OSError, KeyError, ValueError, EncodeError, onnx.checker.ValidationError) as reason:
        raise DeviceError(
            f"the external weights cannot be read ({' '.join(str(reason).split())})",
            where=model,
            remedy="keep the weight files next to the graph, or save the graph as a single file",
        ) from reason
    return path


def _loaded(model: Path) -> ModelProto:
    """The graph, without weights that are stored in other files."""
    try:
        return onnx.load(str(model), load_external_data=False)
    except FileNotFoundError:
        raise DeviceError(
            "file is missing", where=model, remedy="export the graph first with `nelf export`"
        ) from None
    except (OSError, DecodeError) as reason:
        raise _no_graph(model, str(reason)) from reason


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All constants, including constants of functions and of nested graphs."""
    graphs: list[GraphProto | FunctionProto] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        if isinstance(graph, GraphProto):
            yield from graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            graphs += [attribute.g, *attribute.graphs]


def _load_external_data(tensor: TensorProto, folder: Path) -> None:
    """Load a tensor's elements from another file: as many as its shape says, because other tensors may
    follow in the file.

    Raises:
        ValueError: when the file has fewer elements.
    """
    size_bytes = _size_bytes(tensor)
    if all(entry.key != "length" for entry in tensor.external_data):
        tensor.external_data.add(key="length", value=str(size_bytes))
    load_external_data_for_tensor(tensor, str(folder))
    if (found := len(tensor.raw_data)) != size_bytes:
        raise ValueError(f"{tensor.name}: {found} bytes instead of {size_bytes}")


def _size_bytes(tensor: TensorProto) -> int:
    narrow = re.fullmatch(
        r"U?INT([24])|FLOAT([46])E\dM\d", TensorProto.DataType.Name(tensor.data_type)
    )
    if narrow:
        bits = int(narrow[1] or narrow[2])
    else:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _no_graph(model: Path, reason: str) -> DeviceError:
    return DeviceError(
        f"not an ONNX graph ({reason})",
        where=model,
        remedy="export the graph again with `nelf export`",
    )


def _spec(value: onnx.ValueInfoProto, model: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)
    if not tensor.HasField("shape") or min(shape, default=1) < 1:
        raise DeviceError(
            f"input '{value.name}' has no fixed shape",
            where=model,
            remedy="export the graph with fixed dimensions, because a latency belongs to one shape",
        )
    element = ELEMENT_TYPES.get(tensor.elem_type)
    if element is None:
        name = TensorProto.DataType.Name(tensor.elem_type)
        raise DeviceError(
            f"input '{value.name}' has the unsupported element type {name}", where=model
        )
    return TensorSpec(value.name, element, shape)


def fixed_inputs(model: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for each input, in the graph's order: floats uniform in [-1, 1), integers 0 or 1."""
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
    """Check the arrays; return them in the graph's order, row-major.

    Raises:
        DeviceError: when a name, a shape or an element type does not fit the graph.
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
                f"the graph needs {spec.element}{list(spec.shape)}",
                where=model,
            )
    return [np.ascontiguousarray(inputs[spec.name]) for spec in specs]
