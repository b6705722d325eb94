"""A small graph that never changes, measured in turns with every other: a yardstick.

Its latency says how fast a phone was that day, so the ratio of a graph to it can be compared with one
measured warmer, later, or on another phone. The weights come from the sine of their place, so the file
is the same everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightfield.files import atomic_path

CHANNELS, PIXELS, LAYERS = 32, 64, 3
"""Of 3x3 convolutions: 113 million multiply-accumulates, a few milliseconds on a phone's fast core."""


def write_yardstick(path: Path) -> Path:
    """Write the graph; its name tells the version of what it holds."""
    shape, size = [1, CHANNELS, PIXELS, PIXELS], CHANNELS * CHANNELS * 9
    nodes, weights, value = [], [], "input"
    for layer in range(LAYERS):
        places = np.arange(1, size + 1, dtype=np.float64) * (layer + 1)
        kernel = (np.sin(places) / np.sqrt(9 * CHANNELS)).astype(np.float32)
        kernel = kernel.reshape(CHANNELS, CHANNELS, 3, 3)
        weights.append(numpy_helper.from_array(kernel, f"kernel{layer}"))
        output = "output" if layer == LAYERS - 1 else f"value{layer}"
        nodes.append(
            helper.make_node("Conv", [value, f"kernel{layer}"], [output], pads=[1, 1, 1, 1])
        )
        value = output
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "yardstick", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    with atomic_path(path) as temporary:
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(temporary))
    return path
