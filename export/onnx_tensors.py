"""The stored tensors of any ONNX file, wherever they are: weights, constants, parts of branches.

Nothing of their values is read. Their types, sizes and bytes are held against each other, and so are
the files beside the graph that hold weights outside of it.
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
"""Types of which several elements share a byte."""
TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
)


def nodes_of(
    graph: onnx.GraphProto | onnx.FunctionProto, *, inner: bool = True
) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, and those of the graphs within them."""
    for node in graph.node:
        yield node
        for each in subgraphs_of(node) if inner else ():
            yield from nodes_of(each)


def subgraphs_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of an If, the body of a Loop or a Scan."""
    return [graph for each in node.attribute for graph in (*each.graphs, each.g)
            if each.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)]  # fmt: skip


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a file stores: once each, also those of constants, branches and functions."""
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
    """Every node of a file: of the graph, of the graphs within its nodes, of its local functions."""
    for graph in (model.graph, *model.functions):
        yield from nodes_of(graph)


def _inner_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    for node in all_nodes(model):
        yield from subgraphs_of(node)


def type_name(data_type: int) -> str:
    """The name of an element type, as NumPy has it.

    Raises:
        ValueError: when ONNX has no such type.
    """
    try:
        name = TensorProto.DataType.Name(data_type)  # pyright: ignore[reportArgumentType]
    except ValueError:
        name = "UNDEFINED"
    if name == "UNDEFINED":
        raise ValueError(f"type {data_type} is none of ONNX's")
    try:
        return "string" if name == "STRING" else helper.tensor_dtype_to_np_dtype(data_type).name
    except KeyError:
        return name.lower()


def element_count(tensor: onnx.TensorProto) -> int:
    """How many elements a tensor has by its sizes."""
    return math.prod(tensor.dims)


def size_in_bytes(tensor: onnx.TensorProto) -> int:
    """Of a tensor's elements, by its type and sizes; 0 for strings, whose length is their own."""
    name = TensorProto.DataType.Name(tensor.data_type)
    if name == "STRING":
        return 0
    bits = NARROW_BITS.get(name)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-element_count(tensor) * bits // 8)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the elements lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def require_sound_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Hold types, sizes and bytes of all stored tensors against each other.

    Raises:
        ExportError: when a type is unknown, a size negative, or the elements are not as many as the
            sizes say; when they lie in a file that is missing, too short, or outside the folder; when
            two values of the graph have one name.
    """
    for tensor in stored_tensors(model):
        if fault := _tensor_fault(tensor, path.parent):
            raise ExportError(f"weights {tensor.name!r}: {fault}", where=path)
    for value in (*model.graph.input, *model.graph.output):
        data_type = value.type.tensor_type.elem_type
        if data_type not in TensorProto.DataType.values():
            raise ExportError(f"{value.name!r}: type {data_type} is none of ONNX's", where=path)
    if repeated := _repeated_name(model.graph):
        raise ExportError(f"two values are called {repeated!r}", where=path)


def _tensor_fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    try:
        type_name(tensor.data_type)
    except ValueError as error:
        return str(error)
    if any(size < 0 for size in tensor.dims):
        return f"sizes {list(tensor.dims[:8])} are not possible"
    if is_external(tensor):
        return _external_fault(tensor, folder)
    if tensor.HasField("raw_data"):
        found, needed, unit = len(tensor.raw_data), size_in_bytes(tensor), "bytes"
    else:
        found = sum(len(getattr(tensor, name)) for name in TYPED_FIELDS)
        needed, unit = _stored_numbers(tensor), "numbers"
    return None if found == needed else f"{found} {unit}, and their sizes ask for {_short(needed)}"


def _stored_numbers(tensor: onnx.TensorProto) -> int:
    """How many entries the typed fields of a tensor have."""
    name = TensorProto.DataType.Name(tensor.data_type)
    if name.startswith("COMPLEX"):
        return 2 * element_count(tensor)
    return -(-element_count(tensor) * NARROW_BITS.get(name, 8) // 8)


def _external_fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        place = (folder / location).resolve()
        if not location or not place.is_relative_to(folder.resolve()):
            return f"they lie in {location!r}, which is outside of the graph's folder, and not read"
        if not place.is_file():
            return f"they lie in {location!r}, which is missing; put that file beside the graph"
    except (OSError, ValueError) as error:
        return f"they lie in {location[:80]!r}, which no file can be called ({error})"
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", size_in_bytes(tensor)))
    except ValueError:
        return "where they lie in their file is not a number"
    if offset < 0 or length != size_in_bytes(tensor):
        return f"{_short(length)} bytes, and their sizes ask for {_short(size_in_bytes(tensor))}"
    if offset + length > (present := place.stat().st_size):
        return (
            f"they end at byte {_short(offset + length)} of {location!r}, "
            f"which has only {present} bytes"
        )
    return None


def _short(count: int) -> str:
    """A number for people; Python refuses to write very long ones."""
    return str(count) if count < 2**63 else "more than can be stored"


def _repeated_name(graph: onnx.GraphProto) -> str | None:
    made = [name for node in graph.node for name in node.output if name]
    stored = [tensor.name for tensor in graph.initializer]
    given = [value.name for value in graph.input if value.name not in stored]
    counted = Counter((*made, *stored, *given))
    return next((name for name, count in counted.items() if count > 1), None)
