"""Fixed reference model, interleaved with every benchmark to normalize for the speed of the device.

The latency of the reference model shows how fast a phone was at that time, so ratios of a graph to the
reference model are comparable between temperatures, days and phones. The weights are sines of their
index, so the file is the same everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightfield.files import atomic_path

CHANNELS, PIXELS, LAYERS = 32, 64, 3
"""Three 3x3 convolutions of 32 channels on 64 x 64 pixels: 113 million multiply-accumulates, which take
a few milliseconds on a fast core of a phone."""


def write_reference_model(path: Path) -> Path:
    """Write the reference model as an ONNX file."""
    shape, size = [1, CHANNELS, PIXELS, PIXELS], CHANNELS * CHANNELS * 9
    nodes, weights, value = [], [], "input"
    for layer in range(LAYERS):
        angles = np.arange(1, size + 1, dtype=np.float64) * (layer + 1)
        kernel = (np.sin(angles) / np.sqrt(9 * CHANNELS)).astype(np.float32)
        kernel = kernel.reshape(CHANNELS, CHANNELS, 3, 3)
        weights.append(numpy_helper.from_array(kernel, f"kernel{layer}"))
        output = "output" if layer == LAYERS - 1 else f"value{layer}"
        nodes.append(
            helper.make_node("Conv", [value, f"kernel{layer}"], [output], pads=[1, 1, 1, 1])
        )
        value = output
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "reference_model", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    with atomic_path(path) as temporary:
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(temporary))
    return path
