"""Stored tensors of any ONNX file: weights and constants, also in branches and functions.

The values are not read. The checks compare types, sizes and numbers of bytes, for weights in the
file and for weights in external files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto, helper

from lightfield.errors import ExportError

NARROW_BITS = {
    **dict.fromkeys(("UINT4", "INT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("UINT2", "INT2"), 2),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
}
"""Bits per element of types that pack several elements into a byte."""
TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
)


def nodes_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for each in subgraphs_of(node):
            yield from nodes_of(each)


def subgraphs_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node: the branches of an If, the body of a Loop or a Scan."""
    return [graph for each in node.attribute for graph in (*each.graphs, each.g)
            if each.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)]  # fmt: skip


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a file stores, each once, including constants, branches and functions."""
    for graph in (model.graph, *_inner_graphs(model)):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.SPARSE_TENSOR:
                yield attribute.sparse_tensor.values
            yield from attribute.tensors


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a file, including the graphs inside nodes and the local functions."""
    for graph in (model.graph, *model.functions):
        yield from nodes_of(graph)


def _inner_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    for node in all_nodes(model):
        yield from subgraphs_of(node)


def type_name(data_type: int) -> str:
    """The NumPy name of an element type.

    Raises:
        ValueError: when ONNX does not define the type.
    """
    try:
        name = TensorProto.DataType.Name(data_type)  # pyright: ignore[reportArgumentType]
    except ValueError:
        name = "UNDEFINED"
    if name == "UNDEFINED":
        raise ValueError(f"type {data_type} is not an ONNX type")
    try:
        return "string" if name == "STRING" else helper.tensor_dtype_to_np_dtype(data_type).name
    except KeyError:
        return name.lower()


def element_count(tensor: onnx.TensorProto) -> int:
    """Number of elements according to the sizes of a tensor."""
    return math.prod(tensor.dims)


def size_in_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements by type and sizes; 0 for strings, whose length varies."""
    name = TensorProto.DataType.Name(tensor.data_type)
    if name == "STRING":
        return 0
    bits = NARROW_BITS.get(name)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-element_count(tensor) * bits // 8)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the elements are stored in another file."""
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def require_sound_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Check that types, sizes and bytes of all stored tensors agree.

    Raises:
        ExportError: when a type is unknown, a size is negative, or the number of elements differs
            from the sizes; when an external file is missing, too short, or outside of the folder;
            when two values of the graph have the same name.
    """
    for tensor in stored_tensors(model):
        if fault := _tensor_fault(tensor, path.parent):
            raise ExportError(f"weights {tensor.name!r}: {fault}", where=path)
    for value in (*model.graph.input, *model.graph.output):
        data_type = value.type.tensor_type.elem_type
        if data_type not in TensorProto.DataType.values():
            raise ExportError(f"{value.name!r}: type {data_type} is not an ONNX type", where=path)
    if repeated := _repeated_name(model.graph):
        raise ExportError(f"two values have the name {repeated!r}", where=path)


def _tensor_fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    try:
        type_name(tensor.data_type)
    except ValueError as error:
        return str(error)
    if any(size < 0 for size in tensor.dims):
        return f"sizes {list(tensor.dims[:8])} are impossible"
    if is_external(tensor):
        return _external_fault(tensor, folder)
    if tensor.HasField("raw_data"):
        found, needed, unit = len(tensor.raw_data), size_in_bytes(tensor), "bytes"
    else:
        found = sum(len(getattr(tensor, name)) for name in TYPED_FIELDS)
        needed, unit = _stored_numbers(tensor), "numbers"
    if found == needed:
        return None
    return f"{found} {unit} are stored, the sizes require {_short(needed)}"


def _stored_numbers(tensor: onnx.TensorProto) -> int:
    """Number of entries that the typed fields of a tensor must have."""
    name = TensorProto.DataType.Name(tensor.data_type)
    if name.startswith("COMPLEX"):
        return 2 * element_count(tensor)
    return -(-element_count(tensor) * NARROW_BITS.get(name, 8) // 8)


def _external_fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        file = (folder / location).resolve()
        if not location or not file.is_relative_to(folder.resolve()):
            return f"stored in {location!r}, which is outside of the graph's folder and is not read"
        if not file.is_file():
            return f"stored in {location!r}, which is missing; put this file next to the graph"
    except (OSError, ValueError) as error:
        return f"stored in {location[:80]!r}, which is not a valid file name ({error})"
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", size_in_bytes(tensor)))
    except ValueError:
        return "their position in the external file is not a number"
    if offset < 0 or length != size_in_bytes(tensor):
        return (
            f"{_short(length)} bytes are stored, the sizes require {_short(size_in_bytes(tensor))}"
        )
    if offset + length > (present := file.stat().st_size):
        return (
            f"stored up to byte {_short(offset + length)} of {location!r}, "
            f"which has only {present} bytes"
        )
    return None


def _short(count: int) -> str:
    """A number as text; very long numbers are not printed."""
    return str(count) if count < 2**63 else "more than 2^63"


def _repeated_name(graph: onnx.GraphProto) -> str | None:
    computed = [name for node in graph.node for name in node.output if name]
    stored = [tensor.name for tensor in graph.initializer]
    given = [value.name for value in graph.input if value.name not in stored]
    counted = Counter((*computed, *stored, *given))
    return next((name for name, count in counted.items() if count > 1), None)
