import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tiny_fields import TAILS, random_student

from export.calibration import plan_quantization
from export.graph import check_file, operators_of, save_model
from export.parity import OnnxFunction
from export.quantization import Grid, Quantized, quantized_bias, quantized_weight
from export.student_graph import ONNX_RUNTIME, GraphVariant, student_contract, student_model
from lightfield.student import folded

OLDER = GraphVariant(17, "trained", "Erf")


def test_a_grid_covers_zero_and_its_range_and_rounds_to_the_nearest_value():
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        grid = Grid.between(low, high)
        ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
        torch.testing.assert_close(grid.rounded(ends), ends, atol=grid.step / 2 + 1e-6, rtol=0)
        assert grid.rounded(torch.zeros(1)) == 0
    values = torch.linspace(-1, 3, 1000)
    grid = Grid.between(-1, 3)
    assert (grid.rounded(values) - values).abs().max() <= grid.step / 2 + 1e-6
    assert len(grid.rounded(torch.linspace(-9, 9, 9999)).unique()) == 256


def test_a_grid_rounds_as_onnx_does():
    grid, x = Grid.between(-0.7, 2.1), torch.randn(400) * 2
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["levels"]),
        onnx.helper.make_node("DequantizeLinear", ["levels", "step", "zero"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "grid",
        [onnx.helper.make_tensor_value_info("x", kind, [400])],
        [onnx.helper.make_tensor_value_info("y", kind, [400])],
        [onnx.numpy_helper.from_array(np.float32(grid.step), "step"),
         onnx.numpy_helper.from_array(np.int8(grid.zero_point), "zero")],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    found = OnnxFunction(model)(x=x.numpy())
    np.testing.assert_allclose(found, grid.rounded(x).numpy(), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_output_channel_has_its_own_step(axis):
    weight = np.random.default_rng(0).normal(size=(6, 4, 2, 2)).astype(np.float32)
    weight[(slice(None),) * axis + (1,)] *= 100
    weight[(slice(None),) * axis + (2,)] = 0
    levels, steps = quantized_weight(weight, axis)
    shape = (-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1)
    error = np.abs(levels * steps.reshape(shape) - weight)
    assert (error <= steps.reshape(shape) / 2 + 1e-6).all()
    assert levels.min() >= -127
    assert steps[1] > 10 * steps[0]
    bias, units = quantized_bias(np.float32([0.5, -3.0]), steps[:2], Grid(0.1, 3))
    np.testing.assert_allclose(bias * units, [0.5, -3.0], atol=units.max())
    assert bias.dtype == np.int32


@pytest.mark.parametrize("variant", [ONNX_RUNTIME, OLDER], ids=["phases", "trained"])
@pytest.mark.parametrize("tail", ["mixed", "shuffle", "none"])
def test_a_planned_graph_computes_what_was_planned(tmp_path, variant, tail):
    """Checked on the file, by ONNX Runtime and by the reference evaluator."""
    student, rays, truth = example(tail)
    plan = plan_quantization(folded(student), rays, truth, allowed_loss_db=3.0)
    assert any(q.is_integer for q in plan.quantized.values())
    variant = GraphVariant(
        variant.opset, variant.upsampling, variant.gelu, quantized=plan.quantized
    )
    path = tmp_path / "a.onnx"
    save_model(student_model(student, 4, 5, variant), path)
    model = check_file(path, student_contract(student, 4, 5, variant))
    integer = sum(q.is_integer for q in plan.quantized.values())
    operators = operators_of(model)
    assert operators["QuantizeLinear"] == 2 * integer
    assert operators["DequantizeLinear"] == len(plan.quantized) + 3 * integer
    found = OnnxFunction(path)(input=rays[:1].numpy())
    with torch.no_grad():
        exact = student(rays[:1]).numpy()
    error = np.square(found - exact).mean()
    assert 0 < error < np.square(truth[:1].numpy() - exact).mean()
    if (
        tail == "none" and variant.opset == 20
    ):  # the evaluator does not support older versions of DequantizeLinear
        slow = ReferenceEvaluator(model).run(None, {"input": rays[:1].numpy()})[0]
        # A sum halfway between two levels may be rounded to either level.
        assert np.square(slow - exact).mean() == pytest.approx(error, rel=0.2)


def test_a_smaller_allowed_loss_gives_fewer_int8_convolutions():
    student, rays, truth = example("mixed")
    plans = [
        plan_quantization(folded(student), rays, truth, allowed_loss_db=allowed)
        for allowed in (1e-9, 0.5, 20.0)
    ]
    shares = [(plan.weights_share, plan.macs_share) for plan in plans]
    assert shares[0] == (0, 0)
    assert shares == sorted(shares)
    assert shares[-1][0] == 1
    assert plans[0].quantized == {}
    assert "in float: head, body.0.expand" in plans[0].summary
    assert "in float" not in plans[-1].summary


def test_planning_does_not_change_the_student():
    student, rays, truth = example("mixed")
    flat = folded(student)
    before = {name: value.clone() for name, value in flat.state_dict().items()}
    plan_quantization(flat, rays, truth)
    assert all(torch.equal(value, before[name]) for name, value in flat.state_dict().items())
    assert not any(module._forward_hooks for module in flat.modules())


def test_a_layer_with_an_outlier_channel_keeps_float_arithmetic():
    student, rays, truth = example("none")
    calm = plan_quantization(folded(student), rays, truth)
    with torch.no_grad():  # one hidden channel is a thousand times as large as the others
        student.body[0].expand_norm.weight[0] *= 1000
        student.body[0].contract.weight[:, 0] /= 1000
    wild = plan_quantization(folded(student), rays, truth)
    assert calm.quantized["body.0.contract"].is_integer
    assert not wild.quantized.get("body.0.contract", Quantized()).is_integer


def example(tail: str):
    """A student, encoded rays, and real images on which the student has 20 dB."""
    student = random_student(TAILS[tail])
    rays = torch.rand(3, student.spec.input_channels, 4, 5) * 2 - 1
    with torch.no_grad():
        images = student(rays)
    return student, rays, images + 0.1 * torch.randn(images.shape)
