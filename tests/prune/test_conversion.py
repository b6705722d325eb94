from dataclasses import replace

import pytest
import torch
from toy_students import rays, small_spec, trained

from prune.architecture import converted_spec
from prune.surgery import converted


def outputs(student, x):
    with torch.no_grad():
        return student(x)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_shuffled_tail_computes_the_same_for_equal_rays(norm):
    """Both operators compute the same if neighbors are equal, except at the borders."""
    student = trained(small_spec(norm=norm))
    x = rays(student.spec)[:, :, :1, :1].expand(-1, -1, 6, 6)
    shuffled = converted(student, converted_spec(student.spec, None, "pixel_shuffle"))
    inside = (..., slice(6, -6), slice(6, -6))
    assert torch.allclose(outputs(shuffled, x)[inside], outputs(student, x)[inside], atol=1e-5)


def test_converting_twice_changes_the_output_for_unequal_rays():
    student = trained(small_spec())
    shuffled = converted(student, converted_spec(student.spec, None, "pixel_shuffle"))
    x = rays(student.spec)
    assert not torch.allclose(outputs(shuffled, x), outputs(student, x), atol=1e-4)


def test_a_shuffled_tail_converts_exactly_to_transposed_convolutions():
    student = trained(small_spec("pixel_shuffle"))
    with torch.no_grad():  # a transposed convolution has one bias per channel
        _, *stages = student.chains()
        for stage in stages:
            bias = stage.convolution.bias.view(-1, stage.entry.factor**2)
            bias.copy_(bias.mean(1, keepdim=True).expand_as(bias))
    spec = converted_spec(student.spec, None, "conv_transpose")
    x = rays(student.spec)
    assert torch.allclose(outputs(converted(student, spec), x), outputs(student, x), atol=1e-5)


def test_an_activation_changes_the_function_and_no_weight():
    student = trained(small_spec())
    relu = converted(student, converted_spec(student.spec, "relu", None))
    assert relu.spec == replace(student.spec, activation="relu")
    for name, value in relu.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
    assert not torch.equal(outputs(relu, rays(student.spec)), outputs(student, rays(student.spec)))
