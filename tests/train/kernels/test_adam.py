from __future__ import annotations

import pytest
import torch

from train.kernels.teacher.adam import FusedAdam

RATE, SCALE = 0.02, 128.0


def numbers(device: torch.device, *values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], device=device) for value in values]


def step(adam: FusedAdam, gradient: torch.Tensor, t: int) -> None:
    rate, scale = numbers(gradient.device, RATE, SCALE)
    count = torch.tensor([t], dtype=torch.int32, device=gradient.device)
    adam.step(gradient, count, rate, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.8, 0.999)])
def test_steps_equal_torch_adam(dtype, betas, device) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2500, generator=generator)
    twin = start.to(device).clone().requires_grad_()
    optimizer = torch.optim.Adam([twin], lr=RATE, betas=betas, eps=1e-15)
    values = start.to(device).clone()
    half = values.half()
    adam = FusedAdam(values, half, betas=betas)
    for t in range(1, 21):
        gradient = torch.randn(2500, generator=generator) * 10 ** -(t % 4)
        gradient[t::7] = 0
        scaled = (gradient * SCALE).to(device, dtype)
        twin.grad = scaled.float() / SCALE
        optimizer.step()
        step(adam, scaled, t)
        assert not scaled.any()
    # Twenty steps of up to 0.02, each exact to a few float32 roundings.
    torch.testing.assert_close(values, twin.detach(), atol=5e-6, rtol=0)
    assert torch.equal(half, values.half())


def test_gradients_that_are_not_finite_count_as_zero(device) -> None:
    values, twin_values = torch.ones(6, device=device), torch.ones(6, device=device)
    adam, twin = FusedAdam(values), FusedAdam(twin_values)
    gradient = torch.tensor([float("nan"), float("inf"), -float("inf"), 1, 0, -1], device=device)
    for t in (1, 2):
        step(adam, gradient.half(), t)
        step(twin, gradient.nan_to_num(0, 0, 0).half(), t)
    assert torch.equal(values, twin_values)
    assert values.isfinite().all()
    assert (values[[3, 5]] != 1).all()


def test_bias_correction_of_the_thousandth_step(device) -> None:
    values = torch.zeros(3, device=device)
    adam = FusedAdam(values)
    adam.first.fill_(0.5)
    adam.second.fill_(0.25)
    step(adam, torch.full((3,), 0.5 * SCALE, device=device), 1000)
    # 1 - 0.99^1000 is 0.99996; the moments stay what they are.
    expected = -RATE * 0.5 / (0.5 / (1 - 0.99**1000) ** 0.5)
    torch.testing.assert_close(values.cpu(), torch.full((3,), expected))
