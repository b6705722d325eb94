from __future__ import annotations

import pytest
import torch

from train.kernels.teacher.compositing import Losses, StepSums, composite
from train.kernels.teacher.training_rays import RayBuffer, SampleBuffer
from train.volume_rendering import (
    NEGLIGIBLE_WEIGHT,
    distortion,
    opacity_entropy,
    render_weights,
    sums_per_ray,
)

STEP_LENGTH = 0.01
BACKGROUND = (1.0, 0.7, 0.2)
RAYS, RAY_CAPACITY, SAMPLE_CAPACITY = 40, 64, 600


def buffers(device: torch.device, *, density: float):
    """Rays of 0 to 20 samples, whose order in the buffer differs from the rays' order."""
    generator = torch.Generator().manual_seed(2)
    rays, samples = (
        RayBuffer.empty(RAY_CAPACITY, device),
        SampleBuffer.empty(SAMPLE_CAPACITY, device),
    )
    lengths = torch.randint(0, 21, (RAYS,), generator=generator)
    order = torch.randperm(RAYS, generator=generator)
    at = 0
    for ray in order.tolist():
        n = int(lengths[ray])
        rays.first[ray], rays.length[ray] = at, n
        samples.ray[at : at + n] = ray
        samples.t[at : at + n] = torch.rand(n, generator=generator).sort().values + 2
        at += n
    samples.count.fill_(at)
    rays.target.copy_(torch.rand(rays.target.shape, generator=generator))
    rays.speed.copy_(torch.rand(rays.speed.shape, generator=generator) + 0.5)
    densities = torch.rand(SAMPLE_CAPACITY, generator=generator).exp() * density
    colors = torch.rand((3, SAMPLE_CAPACITY), generator=generator)
    return rays, samples, densities.to(device), colors.to(device)


def twin_gradients(rays, samples, densities, colors, losses):
    """Gradients by autograd through the functions of the plain training."""
    n = int(samples.count)
    order = samples.ray[:n].long().argsort(stable=True)
    ray = samples.ray[:n].long()[order]
    density = densities[:n][order].double().requires_grad_()
    color = colors[:, :n].t()[order].double().requires_grad_()
    weights, before = render_weights(density * STEP_LENGTH, ray)
    live = before > NEGLIGIBLE_WEIGHT
    weights = weights * live
    seen = sums_per_ray(weights[:, None] * color, ray, RAYS)
    opacity = sums_per_ray(weights, ray, RAYS)
    behind = torch.tensor(losses.background, dtype=torch.float64, device=ray.device)
    error = seen + (1 - opacity[:, None]) * behind - rays.target[:, :RAYS].t()
    loss = error.square().mean() + losses.opacity_entropy * opacity_entropy(opacity).mean()
    if losses.distortion:
        s = (samples.t[:n] * rays.speed[samples.ray[:n].long()])[order].double()
        lengths = torch.full_like(s, STEP_LENGTH)
        loss = loss + losses.distortion * distortion(weights, s, lengths, ray, RAYS).mean()
    (loss * 1.5 * RAYS * losses.gradient_scale).backward()
    by_density, by_color = torch.zeros(n).double(), torch.zeros(n, 3).double()
    by_density[order], by_color[order] = density.grad.cpu(), color.grad.cpu()
    return by_density, by_color.t(), float(error.detach().square().sum()), int(live.sum())


def composited(rays, samples, densities, colors, losses):
    """Gradients by density and color (NaN where the kernel writes nothing), and the sums."""
    device, sums = densities.device, StepSums.zero(densities.device)
    by_density = torch.full((SAMPLE_CAPACITY,), torch.nan, device=device)
    by_color = torch.full((3, SAMPLE_CAPACITY), torch.nan, device=device)
    drawn = torch.tensor([RAYS], dtype=torch.int32, device=device)
    composite(
        rays,
        samples,
        drawn,
        densities,
        colors,
        STEP_LENGTH,
        losses,
        by_density,
        by_color,
        sums,
    )
    return by_density, by_color, sums


@pytest.mark.parametrize("density", [5.0, 60.0, 400.0], ids=["faint", "dense", "opaque"])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.3)])
def test_gradients_equal_the_plain_losses(
    device: torch.device, density: float, weights: tuple[float, float]
):
    rays, samples, densities, colors = buffers(device, density=density)
    losses = Losses(BACKGROUND, *weights, gradient_scale=8.0)
    by_density, by_color, sums = composited(rays, samples, densities, colors, losses)
    expected_density, expected_color, squares, live = twin_gradients(
        rays, samples, densities, colors, losses
    )
    n = int(samples.count)
    # float32 sums of up to 20 terms, near 1, some of which cancel.
    scale = float(expected_density.abs().max())
    assert float((by_density[:n].cpu() - expected_density).abs().max()) < 2e-5 * scale
    torch.testing.assert_close(by_color[:, :n].cpu().double(), expected_color, rtol=1e-4, atol=1e-5)
    assert by_density[n:].isnan().all()  # nothing is written beyond
    assert float(sums.squared_error) == pytest.approx(squares, rel=1e-4)
    assert int(sums.samples_seen) == live
    assert int(sums.rays) == RAYS
    if density == 400:
        assert live < n


def test_rays_beyond_the_sample_buffer_have_no_gradient(device: torch.device):
    rays, samples, densities, colors = buffers(device, density=60.0)
    ray = int(rays.length[:RAYS].argmax())
    first, n = int(rays.first[ray]), int(rays.length[ray])
    rays.length[ray] = -1 - n
    losses = Losses(BACKGROUND, 0.1, 0.0, 1.0)
    by_density, by_color, sums = composited(rays, samples, densities, colors, losses)
    assert (by_density[first : first + n] == 0).all()
    assert (by_color[:, first : first + n] == 0).all()
    assert not by_density[: int(samples.count)].isnan().any()
    assert int(sums.rays) == RAYS - 1
