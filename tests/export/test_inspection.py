from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from test_bundle import needs_coremltools
from tiny_fields import TAILS, WORLD, light_field, poses, random_student

from export import inspection
from export.bundle import write_bundle
from export.inspection import inspect
from lightfield.errors import ExportError
from lightfield.student import folded, mac_count, parameter_count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a student without batch norms, so that its parameters are the graph's."""
    folder = tmp_path_factory.mktemp("inspected")
    write_bundle(light_field(random_student()), poses(WORLD, 1), "Toy", folder, coreml=False)
    return folder


def test_a_lens_student_fits_and_its_arithmetic_is_the_students(folder):
    found = inspect(folder / "Toy_SnapGELU.onnx")
    student = random_student()
    assert found.snapml_faults == []
    assert (found.opset, found.ir_version) == (11, 6)
    assert found.macs == mac_count(student.spec, 4, 5)
    norms = sum(parameter_count(m) for n, m in student.named_modules() if n.endswith("_norm"))
    assert found.parameters == parameter_count(student) - norms
    assert found.inputs == {"input": (1, student.spec.input_channels, 4, 5)}
    assert found.outputs == {"output": (1, 3, 48, 60)}
    assert found.operators["GeluSnap"] > 0
    assert found.size_bytes == (folder / "Toy_SnapGELU.onnx").stat().st_size


@pytest.mark.parametrize("name", ["Sampler.onnx", "Embedder.onnx"])
def test_the_ray_graphs_fit(folder, name):
    assert inspect(folder / name).snapml_faults == []


def test_the_precision_of_the_weights_is_told(folder):
    half, full = inspect(folder / "Toy_fp16.onnx"), inspect(folder / "Toy.onnx")
    assert half.macs == full.macs
    assert half.weights == {"float16": full.weights["float32"]}
    assert half.to_json()["parameters"] == full.parameters
    assert "operator Cast does not run on all of SnapML's backends" in "; ".join(half.snapml_faults)


def test_what_does_not_fit_a_lens_is_said(folder):
    faults = "; ".join(inspect(folder / "Toy.onnx").snapml_faults)
    assert "SnapML reads 11" in faults
    assert "Gelu" in faults
    batched = inspect(folder / "Toy_fused_batch.onnx")
    assert "has a dynamic axis" in "; ".join(batched.snapml_faults)
    assert batched.macs is None
    assert json.loads(json.dumps(batched.to_json()))["macs"] is None


def test_a_model_too_large_for_a_lens_is_said(folder, monkeypatch):
    monkeypatch.setattr(inspection, "LARGEST_BYTES", 1000)
    assert "after import" in "; ".join(inspect(folder / "Toy_SnapGELU.onnx").snapml_faults)


def test_matrix_products_are_counted(tmp_path):
    weight = np.ones((7, 5), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Gemm", ["t", "w"], ["z"], transA=1),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 7]),
            helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [7, 2]),
        ],
        [
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 5]),
            helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2, 5]),
        ],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "products.onnx")
    assert inspect(tmp_path / "products.onnx").macs == 3 * 7 * 5 + 2 * 7 * 5


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        inspect(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match="graph is missing"):
        inspect(tmp_path / "nothing.onnx")


@needs_coremltools
def test_packages_are_inspected_too(tmp_path):
    field = light_field(random_student(TAILS["twice"]))
    write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    found = inspect(tmp_path / "Toy.mlpackage")
    assert found.kind == "CoreML, specification 7"
    assert found.inputs == {"input": (1, field.student.spec.input_channels, 4, 5)}
    assert found.outputs == {"output": (1, 3, 8, 10)}
    assert found.operators["conv_transpose"] == 1
    assert found.snapml_faults == ["a CoreML model, and SnapML reads ONNX"]
    assert found.macs == mac_count(field.student.spec, 4, 5)
    folded_parameters = parameter_count(folded(field.student))
    assert found.weights == {"float16": folded_parameters}
    assert inspect(tmp_path / "Toy_fused.mlpackage").macs > found.macs
    assert set(inspect(tmp_path / "Toy_fused.mlpackage").weights) == {"float16", "float32"}
    (tmp_path / "folder.mlpackage").mkdir()
    with pytest.raises(ExportError, match="not a readable CoreML package"):
        inspect(tmp_path / "folder.mlpackage")
