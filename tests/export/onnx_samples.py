"""Small ONNX graphs from other sources: unusual, damaged, or of another type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHT = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
IMAGE = (1, 3, 4, 5)


def tensor(name="x", shape=IMAGE, kind: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def conv(**settings):
    return helper.make_node("Conv", ["x", "w"], ["y"], **settings)


def model(*nodes, inputs=None, outputs=None, weights=(WEIGHT,), opset=11, **rest):
    """A graph from x to y, by default one convolution of three channels."""
    graph = helper.make_graph(
        list(nodes) or [conv()],
        "sample",
        inputs or [tensor("x")],
        outputs or [tensor("y")],
        list(weights),
    )
    rest.setdefault("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, ir_version=6, **rest)


def saved(path: Path, made: onnx.ModelProto) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def stored_elsewhere(location="w.bin", shape=(3, 3, 1, 1), **entries):
    """A weight that is stored in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    return weight


def branches(node):
    """An If that runs a node in one branch and returns x in the other."""
    given = [tensor("y")]
    return helper.make_node(
        "If",
        ["choice"],
        ["y"],
        then_branch=helper.make_graph([node], "then", [], given),
        else_branch=helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])], "else", [], given
        ),
    )


def stored(values, name="w"):
    return numpy_helper.from_array(np.asarray(values), name)
