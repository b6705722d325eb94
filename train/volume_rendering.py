"""Volume rendering of packed samples, independent of the field.

Letters, for sample i of a ray: x_i = density_i * length_i its optical thickness,
T_i = exp(-sum_{j<i} x_j) the transmittance up to it, w_i = T_i (1 - exp(-x_i)) its weight (Max 1995;
NeRF, equation 3). Samples are packed ray after ray, near to far (`train.marching`); `ray` is the
ray index of each sample, in ascending order. All functions are differentiable.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEGLIGIBLE_WEIGHT = 1e-4
"""The color of a sample is not computed below this transmittance (training) or weight (rendering)."""
FINAL_TRANSMITTANCE = 1e-3
"""Rendering ends a ray below this transmittance: a quarter of a step of an 8-bit image."""


@functools.lru_cache(maxsize=1)
def scatter_library() -> Any:
    """torch_scatter, or None when its import fails for any reason."""
    try:
        return importlib.import_module("torch_scatter")
    except Exception:  # a build for another torch raises OSError or RuntimeError
        return None


def sums_per_ray(
    values: Float[Tensor, "m *c"], ray: Int[Tensor, "m"], rays: int
) -> Float[Tensor, "{rays} *c"]:
    """The sum of the samples of each ray; zero for rays without samples."""
    library = scatter_library()
    if library is not None and len(values):  # torch_scatter crashes without samples
        return library.segment_coo(values, ray, dim_size=rays, reduce="sum")
    return values.new_zeros((rays, *values.shape[1:])).index_add(0, ray, values)


def sums_before(values: Float[Tensor, "m"], ray: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """For each sample the sum over the samples before it on the same ray.

    The result is one running sum over all rays, minus its value at the ray's start. The running sum is
    float64, because it adds up thousands of opaque rays before a ray with small differences.
    """
    if not len(values):
        return values
    before = values.double().cumsum(0) - values
    starts = torch.ones_like(ray, dtype=torch.bool)
    starts[1:] = ray[1:] != ray[:-1]
    first = starts.nonzero()[:, 0]
    of_ray = starts.cumsum(0) - 1
    return (before - before[first].index_select(0, of_ray)).to(values.dtype)


def render_weights(
    thickness: Float[Tensor, "m"], ray: Int[Tensor, "m"]
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Weights w and transmittances T of samples."""
    transmittance = torch.exp(-sums_before(thickness, ray))
    return -torch.expm1(-thickness) * transmittance, transmittance


def distortion(
    weights: Float[Tensor, "m"],
    middle: Float[Tensor, "m"],
    length: Float[Tensor, "m"],
    ray: Int[Tensor, "m"],
    rays: int,
) -> Float[Tensor, "{rays}"]:
    """Distortion loss of each ray, the spread of its weights (Mip-NeRF 360, equation 15).

    sum_ij w_i w_j |s_i - s_j| + 1/3 sum_i w_i^2 length_i, with intervals of `length` around `middle`.
    """
    between = weights * (middle * sums_before(weights, ray) - sums_before(weights * middle, ray))
    return sums_per_ray(2 * between + weights.square() * length / 3, ray, rays)


def opacity_entropy(opacity: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-o log o, which is smallest for rays of opacity 0 or 1."""
    opacity = opacity.clamp(min=1e-5)
    return -opacity * opacity.log()
