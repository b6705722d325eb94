"""Small graphs that run in microseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_graph(
    path: Path, width: int = 8, layers: int = 2, pixels: int = 8, *, outside: str | None = None
) -> Path:
    """Write a stack of 1x1 convolutions whose output depends on its input by O(1).

    If `outside` names a file, the weights are stored in that file next to the graph.
    """
    random = np.random.default_rng(0)
    nodes, weights, name = [], [], "input"
    for layer in range(layers):
        matrix = random.normal(0, 1 / np.sqrt(width), (width, width, 1, 1)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        last = "output" if layer == layers - 1 else f"x{layer}"
        nodes.append(helper.make_node("Conv", [name, f"w{layer}"], [last]))
        name = last
    shape = [1, width, pixels, pixels]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    where = {"save_as_external_data": outside is not None, "location": outside}
    onnx.save(model, str(path), **where, size_threshold=0)
    return path


def reference_output(width: int, layers: int, value: np.ndarray) -> np.ndarray:
    """The output of the graph of `write_graph`, computed with numpy."""
    random = np.random.default_rng(0)
    for _ in range(layers):
        matrix = random.normal(0, 1 / np.sqrt(width), (width, width, 1, 1)).astype(np.float32)
        value = np.einsum("oi,nihw->nohw", matrix[:, :, 0, 0], value)
    return value
