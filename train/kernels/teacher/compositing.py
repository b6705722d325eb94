"""Compositing of packed samples, with the loss and its gradients, in one kernel.

Letters as in `train.volume_rendering`: x_i = density_i * length is the thickness of sample i, T_i the
transmittance before the sample, w_i = T_i (1 - exp(-x_i)) its weight. With v_i = dL/dw_i,

    dL/dx_i = T_{i+1} v_i - sum_{j>i} w_j v_j - T_end v_end

where v_end is the derivative of the loss by the remaining transmittance T_end, which the background's
color and the entropy of the opacity contribute. A ray ends where its transmittance falls below
`NEGLIGIBLE_WEIGHT`; the samples behind get no gradient.

The loss is `train.teacher_training.training_loss`, times 3 R / 2 for R rays: its gradient by a color is
then the color's error. Twins: `training_loss` and `train.volume_rendering`, by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from train.kernels.teacher.training_rays import RayBuffer, SampleBuffer
from train.volume_rendering import NEGLIGIBLE_WEIGHT

LANES = 32


@dataclass(frozen=True)
class Losses:
    """Background, weights of the losses beside the mean squared error, and factor of all gradients."""

    background: tuple[float, float, float]
    opacity_entropy: float
    distortion: float
    gradient_scale: float


@dataclass(frozen=True)
class StepSums:
    """Sums over all rays since the last reset to zero."""

    squared_error: Float[Tensor, "1"]
    rays: Int32[Tensor, "1"]
    samples_seen: Int32[Tensor, "1"]
    """Samples whose transmittance is not negligible."""

    @classmethod
    def zero(cls, device: torch.device) -> StepSums:
        """Sums of zero."""
        counts = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        return cls(torch.zeros(1, device=device), *counts)


def composite(
    ray_buffer: RayBuffer,
    samples: SampleBuffer,
    rays: Int32[Tensor, "1"],
    density: Float[Tensor, "m"],
    color: Float[Tensor, "3 m"],
    step_length: float,
    losses: Losses,
    density_gradient: Float[Tensor, "m"],
    color_gradient: Float[Tensor, "3 m"],
    sums: StepSums,
) -> None:
    """Write the loss's gradients by density and color of all samples in use, and add to `sums`."""
    capacity = len(ray_buffer.first)
    _composite[(triton.cdiv(capacity, LANES),)](
        ray_buffer.first, ray_buffer.length, ray_buffer.target, ray_buffer.speed, capacity,
        samples.t, samples.t.shape[0], rays, density, color, step_length, *losses.background,
        losses.gradient_scale, losses.opacity_entropy, losses.distortion,
        density_gradient, color_gradient,
        sums.squared_error, sums.rays, sums.samples_seen,
        DISTORTION=losses.distortion > 0, NEGLIGIBLE=NEGLIGIBLE_WEIGHT, LANES=LANES, num_warps=1,
    )  # fmt: skip


@triton.jit
def _sample(at, density, color, samples_capacity, step_length, mask):
    """Thickness and color [LANES] of one sample of each ray."""
    x = tl.load(density + at, mask=mask, other=0.0) * step_length
    red = tl.load(color + at, mask=mask, other=0.0).to(tl.float32)
    green = tl.load(color + samples_capacity + at, mask=mask, other=0.0).to(tl.float32)
    blue = tl.load(color + 2 * samples_capacity + at, mask=mask, other=0.0).to(tl.float32)
    return x, red, green, blue


@triton.jit
def _spread(s, weight, before, before_s, total, total_s, length):
    """Derivative of the distortion loss by one weight; `before` are sums over the earlier samples."""
    behind, behind_s = total - before - weight, total_s - before_s - weight * s
    between = s * before - before_s + behind_s - s * behind
    return 2 * between + 2.0 / 3.0 * weight * length


@triton.jit
def _composite(
    first_in, length_in, target, speed_in, capacity,
    t_in, samples_capacity, rays, density, color, step_length, behind_r, behind_g, behind_b,
    gradient_scale, entropy_weight, distortion_weight,
    density_gradient, color_gradient, squared_error, rays_seen, samples_seen,
    DISTORTION: tl.constexpr, NEGLIGIBLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients density_gradient [M] and color_gradient [3, M], and three sums over rays.

    A lane composites one ray: forward, for the distortion loss a second time, then the gradients.
    first_in, length_in, speed_in [R], target [3, R]; t_in, density [M], color [3, M]. Twin:
    `train.volume_rendering` by autograd.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    drawn = tl.load(rays)
    if tl.program_id(0) * LANES >= drawn:
        return
    in_use = lane < drawn
    first = tl.load(first_in + lane, mask=in_use, other=0)
    length = tl.load(length_in + lane, mask=in_use, other=0)
    counts = in_use & (length >= 0)
    speed = tl.load(speed_in + lane, mask=in_use, other=0.0)

    depth = tl.zeros([LANES], tl.float32)
    red, green, blue, opacity = depth, depth, depth, depth
    total_s, passed = depth, depth + 1
    seen = tl.zeros([LANES], tl.int32)
    active = counts & (length > 0)
    i = 0
    while tl.max(active.to(tl.int32), 0) > 0:
        x, r, g, b = _sample(first + i, density, color, samples_capacity, step_length, active)
        after = tl.exp(-(depth + x))
        weight = tl.where(active, passed - after, 0.0)
        red += weight * r
        green += weight * g
        blue += weight * b
        opacity += weight
        if DISTORTION:
            total_s += weight * speed * tl.load(t_in + first + i, mask=active, other=0.0)
        depth = tl.where(active, depth + x, depth)
        passed = tl.where(active, after, passed)
        seen += active.to(tl.int32)
        i += 1
        active = active & (i < length) & (passed > NEGLIGIBLE)

    error_r = red + passed * behind_r - tl.load(target + lane, mask=counts, other=0.0)
    error_g = green + passed * behind_g - tl.load(target + capacity + lane, mask=counts, other=0.0)
    error_b = (
        blue + passed * behind_b - tl.load(target + 2 * capacity + lane, mask=counts, other=0.0)
    )
    squares = error_r * error_r + error_g * error_g + error_b * error_b
    tl.atomic_add(squared_error, tl.sum(tl.where(counts, squares, 0.0), 0))
    tl.atomic_add(rays_seen, tl.sum(counts.to(tl.int32), 0))
    tl.atomic_add(samples_seen, tl.sum(seen, 0))

    # v_end: the background's color, and -d/do of the entropy -o log o.
    entropy = tl.where(opacity > 1e-5, tl.log(tl.maximum(opacity, 1e-5)) + 1, 0.0)
    at_end = error_r * behind_r + error_g * behind_g + error_b * behind_b
    at_end += 1.5 * entropy_weight * entropy
    spread_factor = 1.5 * distortion_weight

    # Sum of w_j v_j over all samples; the last loop reduces it to the samples behind sample i.
    to_come = error_r * red + error_g * green + error_b * blue
    if DISTORTION:
        passed_again, before, before_s = 0 * depth + 1, 0 * depth, 0 * depth
        depth_again, i = 0 * depth, 0
        while i < tl.max(seen, 0):
            mask = i < seen
            x = tl.load(density + first + i, mask=mask, other=0.0) * step_length
            s = speed * tl.load(t_in + first + i, mask=mask, other=0.0)
            depth_again += x
            after = tl.exp(-depth_again)
            weight = tl.where(mask, passed_again - after, 0.0)
            spread = _spread(s, weight, before, before_s, opacity, total_s, step_length)
            to_come += spread_factor * weight * spread
            before += weight
            before_s += weight * s
            passed_again = tl.where(mask, after, passed_again)
            i += 1

    depth, before, before_s, ahead = 0 * depth, 0 * depth, 0 * depth, 0 * depth + 1
    space_left = tl.maximum(tl.minimum(-1 - length, samples_capacity - first), 0)
    written = tl.where(length < 0, space_left, length)
    written = tl.where(in_use, written, 0)
    i = 0
    while i < tl.max(written, 0):
        mask, live = i < written, i < seen
        x, r, g, b = _sample(first + i, density, color, samples_capacity, step_length, live)
        depth += x
        after = tl.exp(-depth)
        weight = tl.where(live, ahead - after, 0.0)
        value = error_r * r + error_g * g + error_b * b
        if DISTORTION:
            s = speed * tl.load(t_in + first + i, mask=live, other=0.0)
            value += spread_factor * _spread(
                s, weight, before, before_s, opacity, total_s, step_length
            )
            before += weight
            before_s += weight * s
        to_come -= weight * value
        by_thickness = after * value - to_come - passed * at_end
        scale = tl.where(live, gradient_scale, 0.0)
        index = first + i
        tl.store(density_gradient + index, scale * step_length * by_thickness, mask=mask)
        tl.store(color_gradient + index, scale * weight * error_r, mask=mask)
        tl.store(color_gradient + samples_capacity + index, scale * weight * error_g, mask=mask)
        tl.store(color_gradient + 2 * samples_capacity + index, scale * weight * error_b, mask=mask)
        ahead = tl.where(live, after, ahead)
        i += 1
