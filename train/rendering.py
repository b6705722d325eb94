"""Rendering of rays through a field: with gradients from all samples, or without gradients in rounds.

Rays are in the box's coordinates (`train.marching`). The letters are those of `train.volume_rendering`.
Both functions use the same samples if the marching offset is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.marching import Samples, march
from train.occupancy import OccupancyGrid
from train.radiance_field import RadianceField
from train.spherical_harmonics import spherical_harmonics
from train.volume_rendering import (
    FINAL_TRANSMITTANCE,
    NEGLIGIBLE_WEIGHT,
    render_weights,
    sums_per_ray,
)

FIRST_ROUND = 8


@dataclass(frozen=True)
class RenderedRays:
    """Color without background, opacity, and mean t of rays; the mean is weighted by opacity."""

    color: Float[Tensor, "n 3"]
    opacity: Float[Tensor, "n"]
    t: Float[Tensor, "n"]

    def over(self, background: Float[Tensor, "3"]) -> Float[Tensor, "n 3"]:
        """The color over a background."""
        return self.color + (1 - self.opacity[:, None]) * background


def render_samples(
    field: RadianceField,
    samples: Samples,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    step_length: float,
) -> tuple[RenderedRays, Float[Tensor, "m"]]:
    """Render rays from all their samples; return the samples' weights too. Differentiable."""
    rays, ray = len(origins), samples.ray
    density, features = field.geometry(_points(origins, directions, ray, samples.t))
    weights, transmittance = render_weights(density * step_length, ray)
    seen = (transmittance > NEGLIGIBLE_WEIGHT).nonzero()[:, 0]
    ray_seen, weights_seen = ray[seen], weights.index_select(0, seen)
    harmonics = spherical_harmonics(F.normalize(directions, dim=-1))[ray_seen]
    emitted = field.color(features.index_select(0, seen), harmonics)
    color = sums_per_ray(weights_seen[:, None] * emitted, ray_seen, rays)
    opacity = sums_per_ray(weights, ray, rays)
    t = sums_per_ray(weights * samples.t, ray, rays) / opacity.clamp(min=NEGLIGIBLE_WEIGHT)
    return RenderedRays(color, opacity, t), weights


@torch.no_grad()
def render_in_rounds(
    field: RadianceField,
    grid: OccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    near: float,
    far: float,
) -> RenderedRays:
    """Render rays near to far in rounds of a few samples; later rounds skip rays that are opaque.

    The error of a color is at most `FINAL_TRANSMITTANCE`, plus `NEGLIGIBLE_WEIGHT` for each sample
    of its ray.
    """
    samples = march(origins, directions, grid, near, far)
    rays = len(origins)
    harmonics = spherical_harmonics(F.normalize(directions, dim=-1))
    count = torch.bincount(samples.ray, minlength=rays)
    first = count.cumsum(0) - count
    color = origins.new_zeros((rays, 3))
    depth, weighted_t = origins.new_zeros(rays), origins.new_zeros(rays)
    alive, done, size = count.nonzero()[:, 0], 0, FIRST_ROUND
    while len(alive):
        column = done + torch.arange(size, device=alive.device)
        row, column = (column < count[alive, None]).nonzero(as_tuple=True)
        ray = alive[row]
        t = samples.t[first[ray] + column + done]
        density, features = field.geometry(_points(origins, directions, ray, t))
        thickness = density * grid.step_length
        weights = render_weights(thickness, row)[0] * torch.exp(-depth[ray])
        seen = (weights > NEGLIGIBLE_WEIGHT).nonzero()[:, 0]
        ray, weights, t = ray[seen], weights[seen], t[seen]
        emitted = field.color(features[seen], harmonics[ray])
        color.index_add_(0, ray, weights[:, None] * emitted)
        weighted_t.index_add_(0, ray, weights * t)
        depth[alive] += sums_per_ray(thickness, row, len(alive))
        done, size = done + size, 2 * size
        alive = alive[(depth[alive] < -math.log(FINAL_TRANSMITTANCE)) & (count[alive] > done)]
    opacity = -torch.expm1(-depth)
    return RenderedRays(color, opacity, weighted_t / opacity.clamp(min=NEGLIGIBLE_WEIGHT))


def _points(origins: Tensor, directions: Tensor, ray: Tensor, t: Tensor) -> Tensor:
    return torch.addcmul(origins[ray], directions[ray], t[:, None])
