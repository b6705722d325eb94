"""Moving average of a student's weights and buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_images import SPEC, fresh_student
from torch import nn

from train.moving_average import MovingAverage


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_average_follows_the_recurrence(norm, kind):
    student = fresh_student(replace(SPEC, norm=norm))
    average = MovingAverage(student, 0.8)
    expected = {name: value.clone().double() for name, value in student.state_dict().items()}
    for step in range(60):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.num_batches_tracked.add_(1)
        average.update(kind(average.weight(step)))
        decay = min(0.8, (1 + step) / (10 + step))
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in average.student.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5)


def test_the_average_is_a_separate_student_in_evaluation_mode():
    student = fresh_student().train()
    average = MovingAverage(student, 0.5)
    assert not average.student.training
    assert student.training
    before = [p.clone() for p in student.parameters()]
    with torch.no_grad():
        for parameter in average.student.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
