"""A graph as a device needs it: in one file, with fixed random values for its inputs.

A latency means something only for one shape, so every dimension must be a number in the graph. The
values are the same in every process and on every device: same graph, same inputs.
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
"""Element types that travel to a device, by their ONNX number, under their numpy name."""

_MOST_BYTES = 2**31 - 1
"""Of an ONNX file; protobuf has no larger messages."""


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
    graph = _loaded(model).graph
    if not graph.node:
        raise _no_graph(model, "it has no operators")
    constants = {initializer.name for initializer in graph.initializer}
    return tuple(_spec(value, model) for value in graph.input if value.name not in constants)


def whole_graph(model: Path, folder: Path) -> Path:
    """The graph in one file: itself, or a copy in `folder` with the weights that lie in other files.

    Raises:
        DeviceError: when the file is no ONNX graph, or its weights cannot be read or are too large.
    """
    proto = _loaded(model)
    outside = [tensor for tensor in _tensors(proto) if uses_external_data(tensor)]
    if not outside:
        return model
    path = folder / model.name
    try:
        size_bytes = proto.ByteSize() + sum(_size_bytes(tensor) for tensor in outside)
        if size_bytes > _MOST_BYTES:
            raise DeviceError(
                f"with its external weights it takes {size_bytes / 1e9:.1f} GB",
                where=model,
                remedy="a phone gets a graph in one file, which ONNX limits to 2 GB",
            )
        with warnings.catch_warnings():  # about keys of a tensor's place that ONNX does not know
            warnings.simplefilter("ignore")
            for tensor in outside:
                _bring_in(tensor, model.parent)
        path.write_bytes(proto.SerializeToString())
    except (OSError, KeyError, ValueError, EncodeError, onnx.checker.ValidationError) as reason:
        raise DeviceError(
            f"its external weights cannot be read ({' '.join(str(reason).split())})",
            where=model,
            remedy="keep the files of the weights beside the graph, or save it as one file",
        ) from reason
    return path


def _loaded(model: Path) -> ModelProto:
    """The graph without weights that lie in other files."""
    try:
        return onnx.load(str(model), load_external_data=False)
    except FileNotFoundError:
        raise DeviceError("file is missing", where=model, remedy="export it first") from None
    except (OSError, DecodeError) as reason:
        raise _no_graph(model, str(reason)) from reason


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All constants, those of functions and of graphs inside the graph too."""
    graphs: list[GraphProto | FunctionProto] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        if isinstance(graph, GraphProto):
            yield from graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            graphs += [attribute.g, *attribute.graphs]


def _bring_in(tensor: TensorProto, folder: Path) -> None:
    """Read the elements of a tensor that lie in another file: exactly as many as it has by its sizes,
    for the file may go on with other tensors.

    Raises:
        ValueError: when there are fewer.
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
