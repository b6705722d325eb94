"""Training in kernels equals training by autograd, and CUDA graphs equal eager steps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from train import distillation_step
from train.distillation import DistillConfig
from train.distillation_step import DistillationStep
from train.kernels.student.fast_student import FastStudent
from train.moving_average import MovingAverage

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tiny_images import SPEC, fresh_student, ground_sampler

CONFIG = DistillConfig(windows=3, window_rays=4, learning_rate=1e-3, muon_learning_rate=0.01)


def trained(
    device: torch.device, steps: int, **more: object
) -> tuple[list[nn.Module], list[float]]:
    """The student and its average after some steps, and the losses before them."""
    student = fresh_student(replace(SPEC, stream_width=16)).to(device)
    average = MovingAverage(student, 0.9)
    losses = []
    with DistillationStep(
        student,
        average,
        CONFIG.optimizers(student),
        ground_sampler(device=device, count=4),
        windows=CONFIG.windows,
        window_rays=CONFIG.window_rays,
        jitter=True,
        seed=0,
        precision="bfloat16",
        **more,
    ) as step:
        for n in range(steps):
            losses.append(step.take(n, 1.0).item())
    return [student, average.student], losses


def close(a: list[nn.Module], b: list[nn.Module], **tolerance: float) -> None:
    for mine, theirs in zip(a, b, strict=True):
        for (name, x), y in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )


def test_kernels_equal_autograd(device, monkeypatch):
    """In float32 in the interpreter, where a step takes a few seconds."""
    if device.type != "cpu":
        pytest.skip("float32 activations are for the interpreter")
    monkeypatch.setattr(
        distillation_step, "_fast_student", lambda s, _: FastStudent(s, torch.float32)
    )
    mine, losses = trained(device, 2)
    monkeypatch.setattr(distillation_step, "_fast_student", lambda *_: None)
    monkeypatch.setattr(distillation_step, "multiplies_in_bfloat16", lambda *_: False)
    theirs, expected = trained(device, 2)
    assert losses == pytest.approx(expected, rel=1e-4)
    close(mine, theirs, rtol=1e-2, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_graphs_equal_eager_steps(device, fused):
    graphs, losses = trained(device, 8, fused=fused)
    eager, expected = trained(device, 8, fused=fused, graphs=False)
    assert losses == pytest.approx(expected, rel=1e-3)
    close(graphs, eager, **({"rtol": 0, "atol": 0} if fused else {"rtol": 1e-2, "atol": 1e-3}))


@pytest.mark.gpu
def test_images_in_host_memory_give_the_same_student(device, monkeypatch):
    _, expected = trained(device, 6, fused=False)
    monkeypatch.setattr("train.window_sampler.GPU_MEMORY_FRACTION", 0.0)
    _, losses = trained(device, 6, fused=False)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
def test_windows_drawn_ahead_equal_the_windows_of_their_step(device, monkeypatch):
    ahead, losses = trained(device, 6)
    prepare = DistillationStep._prepare

    def draws_again(self: DistillationStep, step: int, share: float) -> None:
        self._ahead = None
        prepare(self, step, share)

    monkeypatch.setattr(DistillationStep, "_prepare", draws_again)
    again, expected = trained(device, 6)
    assert losses == expected
    close(ahead, again, rtol=0, atol=0)
