import math
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from tiny_fields import WORLD, light_field, poses

from export.exported_graph import write_onnx
from export.parity import FP32_FLOOR_DB, OnnxFunction, Parity, Reference, require, student_parity
from export.student_graph import ONNX_RUNTIME, student_contract, student_model, write_student_onnx
from lightfield.errors import ExportError, ParityError


def test_parity_is_the_psnr_and_the_largest_error():
    parity = Parity.between(np.array([0.1, 0.0]), np.array([0.0, 0.0]))
    assert parity.max_error == pytest.approx(0.1)
    assert parity.psnr_db == pytest.approx(-10 * math.log10(0.005))
    assert Parity.between(np.ones(2), np.zeros(2), peak=10).psnr_db == pytest.approx(20)
    assert Parity.between(np.ones(2), np.ones(2)).psnr_db == math.inf


def test_parity_is_that_of_the_worst_pose():
    parts = [Parity(90, 0.1), Parity(60, 0.01), Parity(math.inf, 0)]
    assert Parity.worst(parts) == Parity(60, 0.1)


@pytest.mark.parametrize(
    ("psnr_db", "why"), [(79.9, "below the floor of 80 dB"), (math.nan, "gives NaN or infinity")]
)
def test_below_the_floor_is_refused(psnr_db, why):
    with pytest.raises(ParityError, match=why):
        require(Parity(psnr_db, 0.1), FP32_FLOOR_DB, where=Path("a.onnx"))


def test_nan_in_an_image_gives_nan_parity():
    assert math.isnan(Parity.between(np.array([math.nan, 0]), np.zeros(2)).psnr_db)
    assert math.isnan(Parity.worst([Parity(90, 0), Parity(math.nan, 0)]).psnr_db)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_perturbed_graph_is_refused_and_leaves_no_file(tmp_path, there_before):
    field, path = light_field(), tmp_path / "Toy.onnx"
    if there_before:
        path.write_bytes(b"the last good one")
    model = student_model(field.student, 4, 5, ONNX_RUNTIME)
    contract = student_contract(field.student, 4, 5, ONNX_RUNTIME)
    reference = Reference.of(field, poses(WORLD))

    def measure(written: Path) -> Parity:
        graph = OnnxFunction(written)
        return reference.student_parity(lambda rays: graph(input=rays))

    weight = next(w for w in model.graph.initializer if w.name == "body.0.contract.weight")
    values = numpy_helper.to_array(weight).copy()
    values[3, 2] += 0.1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ParityError, match=r"Toy\.onnx"):
        write_onnx(path, model, contract, measure, purpose="")
    assert [p.name for p in tmp_path.iterdir()] == (["Toy.onnx"] if there_before else [])
    if there_before:
        assert path.read_bytes() == b"the last good one"

    model = student_model(field.student, 4, 5, ONNX_RUNTIME)
    assert write_onnx(path, model, contract, measure, purpose="").psnr_db > 100


def test_a_student_in_training_mode_is_compared_in_evaluation_mode(tmp_path):
    field = light_field()
    path = write_student_onnx(field.student, 4, 5, tmp_path / "student.onnx")
    field.student.train()
    assert student_parity(path, field, torch.from_numpy(poses(WORLD))).psnr_db > 100
    assert field.student.training


def test_the_file_of_another_student_fails(tmp_path):
    other = light_field()
    path = write_student_onnx(other.student, 4, 5, tmp_path / "student.onnx")
    field = light_field()
    with torch.no_grad():
        field.student.head.weight.add_(0.01)
    assert student_parity(path, field, poses(WORLD)).psnr_db < FP32_FLOOR_DB


def test_missing_poses_and_graphs_give_one_line_errors(tmp_path):
    path = write_student_onnx(light_field().student, 4, 5, tmp_path / "student.onnx")
    with pytest.raises(ExportError, match="no poses"):
        student_parity(path, light_field(), poses(WORLD)[:0])
    with pytest.raises(ExportError, match=r"gone\.onnx: the graph is missing"):
        student_parity(tmp_path / "gone.onnx", light_field(), poses(WORLD))
    path.write_bytes(b"")
    with pytest.raises(ExportError):
        student_parity(path, light_field(), poses(WORLD))
