from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import write_graph

from device.onnx_inputs import TensorSpec, checked_inputs, fixed_inputs, input_specs
from lightfield.errors import DeviceError


def identity_graph(path: Path, shape: list[int | str] | None, element: int) -> Path:
    value = helper.make_tensor_value_info("x", element, shape)
    out = helper.make_tensor_value_info("y", element, shape)
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [out])), str(path))
    return path


def test_fixed_inputs_are_fixed_and_spread(graph):
    first, second = fixed_inputs(graph)["input"], fixed_inputs(graph)["input"]
    assert np.array_equal(first, second)
    assert first.dtype == np.float32
    assert first.shape == (1, 8, 8, 8)
    assert first.min() < -0.9
    assert first.max() > 0.9
    assert not np.array_equal(first, fixed_inputs(graph, seed=1)["input"])


def test_initialisers_are_no_inputs(tmp_path):
    path = write_graph(tmp_path / "old_style.onnx")
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [8, 8, 1, 1]))
    onnx.save(model, str(path))
    assert input_specs(path) == (TensorSpec("input", "float32", (1, 8, 8, 8)),)


@pytest.mark.parametrize("element", [TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT16])
def test_other_element_types(tmp_path, element):
    path = identity_graph(tmp_path / "g.onnx", [2, 3], element)
    (spec,) = input_specs(path)
    assert fixed_inputs(path)["x"].dtype == np.dtype(spec.element)


@pytest.mark.parametrize("shape", [["n", 3], None, [0, 3]])
def test_a_free_dimension_is_refused(tmp_path, shape):
    with pytest.raises(DeviceError, match="no fixed shape"):
        input_specs(identity_graph(tmp_path / "g.onnx", shape, TensorProto.FLOAT))


def test_text_cannot_be_fed(tmp_path):
    with pytest.raises(DeviceError, match="STRING"):
        input_specs(identity_graph(tmp_path / "g.onnx", [2], TensorProto.STRING))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08garbage" * 10])
def test_a_corrupted_graph_is_refused(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(DeviceError, match=r"broken\.onnx: not an ONNX graph"):
        input_specs(path)


def test_a_missing_graph_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="file is missing"):
        fixed_inputs(tmp_path / "none.onnx")


def test_given_inputs_must_be_the_graphs(graph):
    good = fixed_inputs(graph)["input"]
    assert checked_inputs(graph, {"input": good[:, ::-1]})[0].flags.c_contiguous
    with pytest.raises(DeviceError, match="no value for input input"):
        checked_inputs(graph, {})
    with pytest.raises(DeviceError, match="no input rays"):
        checked_inputs(graph, {"input": good, "rays": good})
    for wrong in (good[:, :4], good.astype(np.float64)):
        with pytest.raises(DeviceError, match=r"the graph wants float32\[1, 8, 8, 8\]"):
            checked_inputs(graph, {"input": wrong})
