from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_fields import TAILS, random_student

from export.graph import check_file, operators_of, save_model, with_inferred_shapes
from export.parity import OnnxFunction
from export.student_graph import (
    OLDER_RUNTIMES,
    ONNX_RUNTIME,
    GraphVariant,
    phase_convolution,
    student_contract,
    student_model,
    write_student_onnx,
)
from lightfield.errors import ExportError
from lightfield.student import Student, TailStage, TransposedUpsample

VARIANTS = (
    ONNX_RUNTIME,
    OLDER_RUNTIMES,
    GraphVariant(20, "trained", "Gelu"),
    GraphVariant(11, "trained", "Erf"),
)


def encoded_rays(student: Student) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, student.spec.input_channels, 4, 5), generator=generator)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("activation", ["gelu", "sigmoid_gelu", "relu"])
def test_every_variant_computes_the_student(activation, tail, variant, tmp_path):
    student = random_student(TAILS[tail], activation)
    rays = encoded_rays(student)
    with torch.no_grad():
        expected = student(rays).numpy()
    assert expected.std() > 0.1  # a constant image would agree with anything
    model = student_model(student, 4, 5, variant)
    save_model(with_inferred_shapes(model), tmp_path / "student.onnx")
    check_file(tmp_path / "student.onnx", student_contract(student, 4, 5, variant))
    found = OnnxFunction(tmp_path / "student.onnx")(input=rays.numpy())
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("factor", [2, 3])
def test_phases_of_a_transposed_convolution_are_its_pixels(factor):
    torch.manual_seed(0)
    upsample = TransposedUpsample(3, TailStage(factor, 2, ()))
    x = torch.randn(1, 3, 4, 5)
    expected = upsample(x).detach()

    phase_weight, phase_bias = phase_convolution(upsample)
    reach = phase_weight.shape[2] - 1
    phases = F.conv2d(x, torch.tensor(phase_weight), torch.tensor(phase_bias), padding=reach)
    by_channel = phases.unflatten(1, (factor**2, 2)).transpose(1, 2).flatten(1, 2)
    pixels = F.pixel_shuffle(by_channel, factor)
    pixels = pixels[:, :, reach : reach + 4 * factor, reach : reach + 5 * factor]
    torch.testing.assert_close(pixels, expected)


def test_gelu_is_one_node_and_batch_norms_are_folded(tmp_path):
    student = random_student(TAILS["mixed"])
    write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    model = check_file(tmp_path / "student.onnx", student_contract(student, 4, 5, ONNX_RUNTIME))
    operators = operators_of(model)
    assert operators["Gelu"] == 6  # head, 2 blocks of the body, 3 of the tail
    assert "BatchNormalization" not in operators
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


def test_writing_does_not_change_the_student(tmp_path):
    student = random_student().train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_student_with_four_output_channels(tmp_path):
    spec = replace(random_student().spec, output_channels=4)
    student = Student(spec).eval()
    rays = encoded_rays(student)
    path = write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(
            OnnxFunction(path)(input=rays.numpy()), student(rays).numpy(), atol=2e-6
        )


def test_nan_weights_are_refused_and_the_earlier_file_is_kept(tmp_path):
    path = write_student_onnx(random_student(), 4, 5, tmp_path / "student.onnx")
    before = path.read_bytes()
    student = random_student()
    with torch.no_grad():
        student.body[1].expand.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"body\.1\.expand\.weight: weights hold NaN"):
        write_student_onnx(student, 4, 5, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
