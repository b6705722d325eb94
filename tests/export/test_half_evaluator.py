from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from tiny_fields import SPACES, TAILS, light_field, poses, random_student

from export.fused import fused_contract, fused_model
from export.graph import check_file, operators_of, save_model, with_inferred_shapes
from export.half_evaluator import evaluate_in_half
from export.parity import FP16_FLOOR_DB, OnnxFunction, Parity, Reference, require
from export.student_graph import (
    OLDER_RUNTIMES_HALF,
    ONNX_RUNTIME,
    ONNX_RUNTIME_HALF,
    student_contract,
    student_model,
)
from lightfield.errors import ExportError, ParityError

HALVES = [ONNX_RUNTIME_HALF, OLDER_RUNTIMES_HALF]


@pytest.mark.parametrize("variant", HALVES, ids=["opset20", "opset17"])
@pytest.mark.parametrize("tail", ["mixed", "shuffle", "none"])
@pytest.mark.parametrize("activation", ["gelu", "sigmoid_gelu", "relu"])
def test_an_fp16_graph_rounds_and_is_accurate(tmp_path, variant, tail, activation):
    student = random_student(TAILS[tail], activation)
    rays = torch.rand(1, student.spec.input_channels, 4, 5) * 2 - 1
    model = with_inferred_shapes(student_model(student, 4, 5, variant))
    save_model(model, tmp_path / "a.onnx")
    model = check_file(tmp_path / "a.onnx", student_contract(student, 4, 5, variant))
    with torch.no_grad():
        expected = student(rays).numpy()
    runtime = Parity.between(OnnxFunction(model)(input=rays.numpy()), expected)
    rounded = Parity.between(evaluate_in_half(model, input=rays.numpy()), expected)
    assert FP16_FLOOR_DB < rounded.psnr_db < 90
    assert FP16_FLOOR_DB < runtime.psnr_db < 95


def test_all_weights_between_the_casts_are_fp16(tmp_path):
    student = random_student()
    model = student_model(student, 4, 5, HALVES[0])
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {TensorProto.FLOAT16, TensorProto.INT64}  # int64 for Slice
    assert operators_of(model)["Cast"] == 2
    ends = (*model.graph.input, *model.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    full = student_model(student, 4, 5, ONNX_RUNTIME)
    assert len(model.SerializeToString()) < 0.7 * len(full.SerializeToString())


@pytest.mark.parametrize("kind", ["world", "ndc"])
def test_a_fused_fp16_graph_keeps_its_rays_in_fp32(tmp_path, kind):
    field = light_field(space=SPACES[kind])
    path = tmp_path / "a.onnx"
    save_model(fused_model(field, variant=HALVES[0]), path)
    model = check_file(path, fused_contract(field, variant=HALVES[0]))
    names = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert names["directions"] == names["frequencies"] == TensorProto.FLOAT
    reference = Reference.of(field, poses(field.space, 2))
    for run in (OnnxFunction(model), lambda pose: evaluate_in_half(model, pose=pose)):
        assert reference.pose_parity(lambda pose, run=run: run(pose=pose)).psnr_db > FP16_FLOOR_DB


def test_weights_beyond_the_range_of_fp16_are_refused():
    student = random_student(TAILS["none"])
    with torch.no_grad():
        student.color.weight[0] = 1e5
    with pytest.raises(ExportError, match=r"color\.weight: weights exceed the range of fp16"):
        student_model(student, 4, 5, HALVES[0])


def test_the_evaluator_detects_results_beyond_the_range_of_fp16():
    """A stream beyond 65,504 works in ONNX Runtime, which computes in fp32, but not on a phone."""
    student = random_student(TAILS["none"])
    with torch.no_grad():
        student.head.weight *= 3000
        student.head.bias *= 3000
        for block in student.body:
            block.contract_norm.weight.zero_()
        student.color.weight /= 3000
    model = student_model(student, 4, 5, HALVES[0])
    rays = np.full((1, student.spec.input_channels, 4, 5), 40.0, np.float32)
    with torch.no_grad():
        expected = student(torch.from_numpy(rays)).numpy()
    assert Parity.between(OnnxFunction(model)(input=rays), expected).psnr_db > FP16_FLOOR_DB
    found = Parity.between(evaluate_in_half(model, input=rays), expected)
    assert np.isnan(found.psnr_db)
    with pytest.raises(ParityError, match="NaN or infinity"):
        require(found, FP16_FLOOR_DB, where=Path("a.onnx"))
