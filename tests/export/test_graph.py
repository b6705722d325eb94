from dataclasses import replace

import numpy as np
import onnx
import onnxsim
import pytest
from onnx import numpy_helper

from export.graph import Contract, GraphBuilder, check_file, load_model, save_model, simplified
from lightfield.errors import ExportError

CONTRACT = Contract({"x": (1, 2)}, {"y": (1, 2)}, 17, frozenset({"Add", "GeluSnap"}))


def graph(operator: str = "Add") -> onnx.ModelProto:
    builder = GraphBuilder(17)
    inputs = ("x", builder.constant("one", 1.0)) if operator == "Add" else ("x",)
    builder.add(operator, *inputs, name="y")
    return builder.model(CONTRACT, title="test")


def test_a_graph_that_keeps_its_contract_is_accepted(tmp_path):
    save_model(graph(), tmp_path / "a.onnx")
    assert check_file(tmp_path / "a.onnx", CONTRACT).ir_version == 8


def test_an_operator_of_snapml_is_accepted(tmp_path):
    save_model(graph("GeluSnap"), tmp_path / "a.onnx")
    check_file(tmp_path / "a.onnx", CONTRACT)


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        (replace(CONTRACT, opset=11), "opsets {'': 17} at IR 8 instead of 11 at IR 6"),
        (replace(CONTRACT, operators=frozenset({"Mul"})), "unexpected operators Add"),
        (replace(CONTRACT, inputs={"x": (2, 1)}), "inputs .* instead of"),
        (replace(CONTRACT, outputs={"z": (1, 2)}), "outputs .* instead of"),
    ],
)
def test_a_broken_contract_is_refused(tmp_path, contract, message):
    save_model(graph(), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=message):
        check_file(tmp_path / "a.onnx", contract)


def test_a_wrong_ir_version_is_refused(tmp_path):
    model = graph()
    model.ir_version = 13
    save_model(model, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="at IR 13"):
        check_file(tmp_path / "a.onnx", CONTRACT)


def test_denormal_weights_become_zero():
    builder = GraphBuilder(17)
    values = np.array([1e-39, -1e-40, 2e-38, -3.0, 0.0], np.float32)
    written = numpy_helper.to_array(builder.weights[builder.constant("w", values)])
    assert written.dtype == np.float32
    assert np.array_equal(written, np.array([0, 0, 2e-38, -3.0, 0], np.float32))


def test_shapes_that_contradict_the_nodes_are_refused(tmp_path):
    builder = GraphBuilder(17)
    builder.add("Add", "x", builder.constant("wide", [[1.0] * 5] * 3), name="y")
    save_model(builder.model(CONTRACT, title="test"), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="checker refuses"):
        check_file(tmp_path / "a.onnx", CONTRACT)


def test_inner_shapes_that_depend_on_data_are_refused(tmp_path):
    builder = GraphBuilder(17)
    builder.add("NonZero", "x", name="where")
    builder.add("Add", "x", builder.constant("one", 1.0), name="y")
    contract = replace(CONTRACT, operators=frozenset({"Add", "NonZero"}))
    save_model(builder.model(contract, title="test"), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="the shape of where is not static"):
        check_file(tmp_path / "a.onnx", contract)


@pytest.mark.parametrize("content", [None, b"", b"no graph at all"])
def test_a_missing_file_or_another_format_is_refused(tmp_path, content):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"a\.onnx"):
        check_file(path, CONTRACT)


def test_a_truncated_file_is_refused(tmp_path):
    save_model(graph(), tmp_path / "a.onnx")
    path = tmp_path / "a.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        load_model(path)


def test_an_error_of_onnxsim_is_recorded(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(onnxsim, "simplify", refuse)
    model = graph()
    assert simplified(model) == (model, "onnxsim refused it (no such luck)")
