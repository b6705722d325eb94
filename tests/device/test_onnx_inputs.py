from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import write_graph

from device.onnx_inputs import (
    TensorSpec,
    checked_inputs,
    fixed_inputs,
    input_specs,
    whole_graph,
)
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


def test_initializers_are_not_inputs(tmp_path):
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


def test_text_inputs_are_refused(tmp_path):
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


def test_inputs_must_fit_the_graph(graph):
    good = fixed_inputs(graph)["input"]
    assert checked_inputs(graph, {"input": good[:, ::-1]})[0].flags.c_contiguous
    with pytest.raises(DeviceError, match="no value for input input"):
        checked_inputs(graph, {})
    with pytest.raises(DeviceError, match="no input rays"):
        checked_inputs(graph, {"input": good, "rays": good})
    for wrong in (good[:, :4], good.astype(np.float64)):
        with pytest.raises(DeviceError, match=r"the graph needs float32\[1, 8, 8, 8\]"):
            checked_inputs(graph, {"input": wrong})


def test_a_graph_in_one_file_is_not_copied(graph, tmp_path):
    assert whole_graph(graph, tmp_path / "nowhere") == graph


def test_weights_of_nested_graphs_and_attributes_are_included(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/all.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())

    def outside(name: str, offset: int) -> TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
        place = {"location": "weights/all.bin", "offset": str(8 * offset), "length": "8"}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = TensorProto.EXTERNAL
        return tensor

    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    constant = helper.make_node("Constant", [], ["c"], value=outside("c", 0))
    add = helper.make_node("Add", ["c", "d"], ["y"])
    branch = helper.make_graph([constant, add], "branch", [], [value], [outside("d", 1)])
    either = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    flag = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    onnx.save(
        helper.make_model(helper.make_graph([either], "g", [flag], [value])), tmp_path / "g.onnx"
    )

    (tmp_path / "spare").mkdir()
    whole = onnx.load(
        whole_graph(tmp_path / "g.onnx", tmp_path / "spare"), load_external_data=False
    )
    inner = whole.graph.node[0].attribute[0].g
    tensors = inner.node[0].attribute[0].t, inner.initializer[0]
    assert [onnx.numpy_helper.to_array(tensor).tolist() for tensor in tensors] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"location": "none.bin"}, "external weights cannot be read"),
        ({"location": "../../etc/passwd"}, "external weights cannot be read"),
        ({"location": "few.bin", "length": "4096"}, "external weights cannot be read"),
        (
            {"location": "few.bin", "length": "4"},
            "external weights cannot be read .*4 bytes instead",
        ),
        ({"location": "few.bin", "offset": "4096"}, "external weights cannot be read"),
    ],
)
def test_missing_external_weights_are_refused(tmp_path, place, message):
    path = write_graph(tmp_path / "g.onnx", outside="few.bin")
    graph = onnx.load(path, load_external_data=False)
    del graph.graph.initializer[0].external_data[:]
    for key, value in place.items():
        graph.graph.initializer[0].external_data.add(key=key, value=value)
    onnx.save(graph, path)
    with pytest.raises(DeviceError, match=rf"g\.onnx: the {message}"):
        whole_graph(path, tmp_path)


@pytest.mark.parametrize(("kind", "shape"), [(TensorProto.FLOAT, [3]), (TensorProto.INT4, [24])])
def test_a_weight_reads_only_its_part_of_a_shared_file(tmp_path, kind, shape):
    (tmp_path / "all.bin").write_bytes(bytes(range(100)))
    weight = TensorProto(name="w", data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "all.bin"), ("offset", "16")):
        weight.external_data.add(key=key, value=value)
    out = helper.make_tensor_value_info("y", kind, shape)
    node = helper.make_node("Identity", ["w"], ["y"])
    made = helper.make_model(helper.make_graph([node], "g", [], [out], [weight]))
    onnx.save(made, tmp_path / "g.onnx")
    (tmp_path / "spare").mkdir()
    whole = onnx.load(whole_graph(tmp_path / "g.onnx", tmp_path / "spare"))
    assert whole.graph.initializer[0].raw_data == bytes(range(16, 28))


def test_weights_over_2_gb_are_refused(tmp_path):
    path = write_graph(tmp_path / "g.onnx", outside="few.bin")
    graph = onnx.load(path, load_external_data=False)
    graph.graph.initializer[0].dims[:] = [1 << 15, 1 << 15]
    onnx.save(graph, path)
    with pytest.raises(DeviceError, match=r"external weights takes 4\.3 GB; .*2 GB"):
        whole_graph(path, tmp_path)
