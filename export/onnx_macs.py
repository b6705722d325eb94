"""Multiply-accumulates (MACs) of any ONNX graph, or the reason why they are unknown.

The rules are those of `lightfield.student`: only convolutions and matrix products count, and a
transposed convolution does kernel^2 * in * out MACs per *input* pixel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import onnx
from onnx import defs, shape_inference

from export.graph import SNAP_OPERATORS, TensorShape, inferred_shapes, operator_name, values_of
from export.onnx_tensors import nodes_of, subgraphs_of
from lightfield.errors import ExportError

LARGEST_SIZE = 2**31 - 1
"""Largest size of one axis; shape inference does not report overflows of 64-bit products."""
PRODUCTS = re.compile("Conv|MatMul|Gemm|Attention|LSTM|GRU|RNN|Einsum")
"""Matches the names of all ONNX operators that multiply and accumulate."""
FREE_ELSEWHERE = {f"com.microsoft.{name}" for name in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu")}
"""Operators of other domains that have no MACs."""


class UnknownMacsError(ExportError):
    """The multiply-accumulates of a graph cannot be counted."""


def macs_of(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one run.

    Raises:
        UnknownMacsError: when they depend on a size that the graph does not state, on values
            (branches, loops), or on an operator that is not in `COUNTED`.
    """
    if model.functions:
        raise UnknownMacsError("the graph has local functions")
    for node in model.graph.node:
        inner = [each for graph in subgraphs_of(node) for each in nodes_of(graph)]
        if any(_multiplies(each) for each in inner):
            raise UnknownMacsError(f"values decide which operators {node.op_type} runs")
        if _multiplies(node) and operator_name(node) not in COUNTED:
            raise UnknownMacsError(f"the multiply-accumulates of {operator_name(node)} are unknown")
    counted = [node for node in model.graph.node if operator_name(node) in COUNTED]
    shapes = _shapes(model) if counted else {}
    try:
        total = sum(COUNTED[operator_name(node)](node, shapes) for node in counted)
    except IndexError:
        raise UnknownMacsError("an operator lacks an input or an output") from None
    if total >= 2**63:
        raise UnknownMacsError("a size is impossible")
    return total


def _multiplies(node: onnx.NodeProto) -> bool:
    """Whether an operator has, or may have, multiply-accumulates."""
    name = operator_name(node)
    if name != node.op_type:
        return name not in FREE_ELSEWHERE
    known = defs.has(name) or name in SNAP_OPERATORS
    return not known or PRODUCTS.search(name) is not None


def _shapes(model: onnx.ModelProto) -> dict[str, TensorShape]:
    inputs, _ = values_of(model)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for shape in (*inputs.values(), *stored.values()):
        if any(isinstance(size, int) and not 0 <= size <= LARGEST_SIZE for size in shape):
            raise UnknownMacsError("a size is impossible")
    try:
        return inferred_shapes(model) | inputs | stored
    except shape_inference.InferenceError:
        raise UnknownMacsError("sizes in the graph contradict each other") from None


def _conv(node: onnx.NodeProto, shapes: dict[str, TensorShape]) -> int:
    weight = 3 if node.op_type == "QLinearConv" else 1
    return _product(shapes, node.output[0]) * _product(shapes, node.input[weight], slice(1, None))


def _conv_transpose(node: onnx.NodeProto, shapes: dict[str, TensorShape]) -> int:
    return _product(shapes, node.input[0]) * _product(shapes, node.input[1], slice(1, None))


def _matrix_product(node: onnx.NodeProto, shapes: dict[str, TensorShape]) -> int:
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    inner = slice(0, 1) if transposed else slice(-1, None)
    return _product(shapes, node.output[0]) * _product(shapes, node.input[0], inner)


COUNTED: dict[str, Callable[[onnx.NodeProto, dict[str, TensorShape]], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _conv,
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"), _matrix_product),
}


def _product(shapes: dict[str, TensorShape], name: str, axes: slice = slice(None)) -> int:
    """The product of a tensor's sizes."""
    sizes = [size for size in shapes.get(name, ("?",)) if isinstance(size, int) and size >= 0]
    if len(sizes) < len(shapes.get(name, ("?",))):
        raise UnknownMacsError("the graph does not state a size")
    return math.prod(sizes[axes])
