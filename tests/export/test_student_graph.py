from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_fields import TAILS, random_student

from export.graph import check_file, operators_of, save_model, simplified
from export.parity import OnnxFunction
from export.student_graph import (
    OLDER_RUNTIMES,
    ONNX_RUNTIME,
    Form,
    phase_convolution,
    student_contract,
    student_model,
    write_student_onnx,
)
from lightfield.errors import ExportError
from lightfield.student import Student, TailStage, TransposedUpsample

FORMS = (ONNX_RUNTIME, OLDER_RUNTIMES, Form(20, "trained", "Gelu"), Form(11, "trained", "Erf"))


def encoded_rays(student: Student) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, student.spec.input_channels, 4, 5), generator=generator)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("activation", ["gelu", "sigmoid_gelu", "relu"])
def test_every_form_computes_the_student(activation, tail, form, tmp_path):
    student = random_student(TAILS[tail], activation)
    rays = encoded_rays(student)
    with torch.no_grad():
        expected = student(rays).numpy()
    assert expected.std() > 0.1  # or agreement would say nothing
    model, refusal = simplified(student_model(student, 4, 5, form))
    assert not refusal
    save_model(model, tmp_path / "student.onnx")
    check_file(tmp_path / "student.onnx", student_contract(student, 4, 5, form))
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


def test_gelu_is_one_node_and_nothing_is_left_of_the_batch_norms(tmp_path):
    student = random_student(TAILS["mixed"])
    write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    model = check_file(tmp_path / "student.onnx", student_contract(student, 4, 5, ONNX_RUNTIME))
    operators = operators_of(model)
    assert operators["Gelu"] == 6  # head, 2 blocks of the body, 3 of the tail
    assert "BatchNormalization" not in operators
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


def test_writing_leaves_the_student_as_it_was(tmp_path):
    student = random_student().train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_four_output_channels(tmp_path):
    spec = replace(random_student().spec, output_channels=4)
    student = Student(spec).eval()
    rays = encoded_rays(student)
    path = write_student_onnx(student, 4, 5, tmp_path / "student.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(
            OnnxFunction(path)(input=rays.numpy()), student(rays).numpy(), atol=2e-6
        )


def test_weights_with_nan_are_refused_and_the_last_file_stays(tmp_path):
    path = write_student_onnx(random_student(), 4, 5, tmp_path / "student.onnx")
    before = path.read_bytes()
    student = random_student()
    with torch.no_grad():
        student.body[1].expand.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"body\.1\.expand\.weight: weights hold NaN"):
        write_student_onnx(student, 4, 5, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
