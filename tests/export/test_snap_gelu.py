import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tiny_fields import TAILS, random_student

from export.graph import check_file, operators_of, save_model, with_inferred_shapes
from export.lens_models import STUDENT_OPERATORS
from export.parity import OnnxFunction
from export.snap_gelu import (
    FILE_SUFFIXES,
    GeluSnap,
    evaluate_by_reference,
    with_relu,
    with_runtime_gelu,
)
from export.student_graph import SNAP_ML, student_contract, student_model

TAIL = TAILS["mixed"]


@pytest.fixture(params=["mixed", "short"])
def shipped(tmp_path, request):
    """A SnapML file, its input, and PyTorch's image."""
    student = random_student(TAILS[request.param])
    rays = torch.randn(1, student.spec.input_channels, 4, 5)
    model = student_model(student, 4, 5, SNAP_ML)
    save_model(with_inferred_shapes(model), tmp_path / "a.onnx")
    model = check_file(tmp_path / "a.onnx", student_contract(student, 4, 5, SNAP_ML))
    with torch.no_grad():
        return model, rays.numpy(), student(rays).numpy()


def test_a_gelu_student_has_gelusnap_in_the_default_domain(shipped):
    model, *_ = shipped
    operators = operators_of(model)
    # One GELU for the head and one per block; one transposed convolution per stage.
    assert (operators["GeluSnap"], operators["ConvTranspose"]) in {(6, 3), (4, 2)}
    assert operators.keys() <= STUDENT_OPERATORS
    assert all(node.domain == "" for node in model.graph.node)
    assert (model.ir_version, model.opset_import[0].version) == (6, 11)


def test_the_shipped_file_is_exact_by_the_reference_evaluator(shipped):
    model, rays, expected = shipped
    np.testing.assert_allclose(evaluate_by_reference(model, rays), expected, atol=2e-6)
    slow = ReferenceEvaluator(model, new_ops=[GeluSnap]).run(None, {"input": rays})[0]
    np.testing.assert_allclose(slow, expected, atol=2e-6)


def test_the_renamed_operator_is_exact_in_onnx_runtime(shipped):
    model, rays, expected = shipped
    found = OnnxFunction(with_runtime_gelu(model))(input=rays)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_relu_in_place_of_gelusnap_fails_the_comparison(shipped):
    model, rays, expected = shipped
    found = OnnxFunction(with_relu(model))(input=rays)
    assert np.abs(found - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("activation", "suffix"),
    [("gelu", "SnapGELU"), ("sigmoid_gelu", "SnapSigmoidGELU"), ("relu", "SnapReLU")],
)
def test_file_names_state_the_activation_and_only_gelu_needs_an_operator_of_snapml(
    activation, suffix
):
    assert FILE_SUFFIXES[activation] == suffix
    model = student_model(random_student(TAIL, activation), 4, 5, SNAP_ML)
    assert ("GeluSnap" in operators_of(model)) == (activation == "gelu")
    if activation != "gelu":
        onnx.checker.check_model(model, full_check=True)
