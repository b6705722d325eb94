"""Radiance field of the teacher in Triton kernels, evaluated over a buffer of samples.

Letters: M the capacity of the buffer, of which the first `count` samples (an int32 on the device) are
used; L levels; R rays. Points are [3, M] float32 in [0, 1]^3, colors and their gradients [3, M],
features [L, M, 2] float16. No call allocates memory or synchronizes, so CUDA graphs can capture all
calls. Twin: `train.radiance_field`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import triton
from jaxtyping import Float, Float16, Int32
from torch import Tensor, nn

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.kernels.availability import processors
from train.kernels.field import lattice, networks
from train.kernels.field.hash_grid import encode, scatter, words
from train.kernels.field.lattice import DeviceLevels
from train.spherical_harmonics import COUNT

SHADE_BLOCK, SHADE_WARPS, SHADE_PROGRAMS = 64, 4, 4
BACKWARD_BLOCK, BACKWARD_WARPS, BACKWARD_PROGRAMS = 128, 8, 1
DENSITY_BLOCK, DENSITY_WARPS, DENSITY_PROGRAMS = 64, 8, 2
"""Samples and warps of a program, and programs per multiprocessor."""

HIDDEN_WIDTHS = (16, 32, 64, 128)


@runtime_checkable
class Field(Protocol):
    """The parts of `train.radiance_field.RadianceField` that the kernels read."""

    grid: nn.Module
    """Hash grid, with a parameter `table` and a `shape`."""
    density_mlp: nn.Sequential
    color_mlp: nn.Sequential
    initial_density: Tensor


def unsupported(shape: GridShape, hidden_width: int, geometry_features: int) -> str | None:
    """The reason why the kernels cannot compute a field of this size, or None when they can."""
    if (reason := lattice.unsupported(shape)) is not None:
        return reason
    if hidden_width not in HIDDEN_WIDTHS:
        return f"the kernels need a hidden width of {HIDDEN_WIDTHS}, not {hidden_width}"
    if geometry_features != networks.GEOMETRY_FEATURES or COUNT != networks.HARMONICS:
        return f"the kernels need {networks.GEOMETRY_FEATURES} geometry features"
    return None


@dataclass(frozen=True)
class HalfField:
    """Float16 copies of a field's table and weights, with its levels and its initial density."""

    table: Float16[Tensor, "n"]
    weights: Float16[Tensor, "w"]
    initial_density: Float[Tensor, ""]
    levels: DeviceLevels
    hidden_width: int

    @classmethod
    def of(cls, field: Field) -> HalfField:
        """Copy a field's present weights; the initial density is shared with the field.

        Raises:
            ConfigError: when the kernels do not support the field's size.
        """
        layers, shape = linear_layers(field), field.grid.shape
        assert isinstance(shape, GridShape)
        widths = layers[0].out_features, layers[1].out_features
        if (reason := unsupported(shape, *widths)) is not None:
            raise ConfigError(reason, where="GPU kernels", remedy="train without the kernels")
        table = field.grid.get_parameter("table").detach()
        weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
        return cls(
            table.half(),
            weights.half(),
            field.initial_density,
            DeviceLevels.of(shape, table.device),
            widths[0],
        )

    def density(
        self,
        points: Float[Tensor, "3 m"],
        count: Int32[Tensor, "1"],
        density: Float[Tensor, "m"],
        *,
        block: int = DENSITY_BLOCK,
        warps: int = DENSITY_WARPS,
        programs: int = DENSITY_PROGRAMS,
    ) -> None:
        """Write the density at `points` without storing features."""
        capacity = points.shape[1]
        networks.density_kernel[_programs(density, block, programs)](
            points, words(self.table), self.levels.numbers, self.weights, self.initial_density,
            count, density, capacity,
            LEVELS=self.levels.count, HIDDEN=self.hidden_width, BLOCK=block,
            num_warps=warps, num_stages=1,
        )  # fmt: skip


class FieldKernels:
    """Kernels of a field, with its float16 copies and gradients.

    `table` and `weights` are the flat float32 masters; the field's parameters become views of them.
    Gradients accumulate until the optimizer zeroes them.

    Raises:
        ConfigError: when the kernels do not support the field's size.
    """

    def __init__(self, field: Field, *, gradient_dtype: torch.dtype = torch.float16):
        self.half = HalfField.of(field)
        self.density = self.half.density
        self.table = field.grid.get_parameter("table").data
        self.weights = _gathered([layer.weight for layer in linear_layers(field)])
        self.table_gradient = torch.zeros_like(self.table, dtype=gradient_dtype)
        self.weights_gradient = torch.zeros_like(self.weights)

    def refresh(self) -> None:
        """Copy the masters into the float16 copies, after any change that `FusedAdam` did not make."""
        self.half.table.copy_(self.table)
        self.half.weights.copy_(self.weights)

    def is_finite(self) -> bool:
        """Whether every weight is finite in float16; synchronizes."""
        return bool(self.half.table.isfinite().all() & self.half.weights.isfinite().all())

    def encode(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], features: Tensor
    ) -> None:
        """Write the hash grid's features at points."""
        encode(points, self.half.table, self.half.levels, count, features)

    def scatter(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], feature_gradient: Tensor
    ) -> None:
        """Add the gradient of the features to the gradient of the table."""
        scatter(points, feature_gradient, self.half.levels, count, self.table_gradient)

    def shade(
        self,
        features: Float[Tensor, "l m 2"],
        harmonics: Float[Tensor, "r 16"],
        ray: Int32[Tensor, "m"],
        count: Int32[Tensor, "1"],
        density: Float[Tensor, "m"],
        color: Float[Tensor, "3 m"],
        *,
        block: int = SHADE_BLOCK,
        warps: int = SHADE_WARPS,
        programs: int = SHADE_PROGRAMS,
    ) -> None:
        """Write density and color of samples; `harmonics` (float16) belong to the samples' rays."""
        networks.shade_kernel[_programs(ray, block, programs)](
            *self._shading(features, harmonics, ray, count), density, color, len(ray),
            LEVELS=self.half.levels.count, HIDDEN=self.half.hidden_width, BLOCK=block,
            num_warps=warps, num_stages=1,
        )  # fmt: skip

    def shade_backward(
        self,
        features: Float[Tensor, "l m 2"],
        harmonics: Float[Tensor, "r 16"],
        ray: Int32[Tensor, "m"],
        count: Int32[Tensor, "1"],
        density_gradient: Float[Tensor, "m"],
        color_gradient: Float[Tensor, "3 m"],
        feature_gradient: Float[Tensor, "l m 2"],
        *,
        block: int = BACKWARD_BLOCK,
        warps: int = BACKWARD_WARPS,
        programs: int = BACKWARD_PROGRAMS,
    ) -> None:
        """Write the gradient of the features and add the gradient of the weights.

        A gradient that is not finite counts as zero; a gradient beyond float16 is clamped.
        """
        networks.shade_backward_kernel[_programs(ray, block, programs)](
            *self._shading(features, harmonics, ray, count), density_gradient, color_gradient,
            words(feature_gradient), self.weights_gradient, len(ray),
            LEVELS=self.half.levels.count, HIDDEN=self.half.hidden_width, BLOCK=block,
            num_warps=warps, num_stages=1,
        )  # fmt: skip

    def _shading(
        self, features: Tensor, harmonics: Tensor, ray: Tensor, count: Tensor
    ) -> tuple[Tensor, ...]:
        """Common first arguments of the forward and the backward kernel."""
        half = self.half
        return words(features), harmonics, ray, half.weights, half.initial_density, count


def linear_layers(field: Field) -> list[nn.Linear]:
    """The layers of both networks, in the order of the flat weights."""
    return [m for m in (*field.density_mlp, *field.color_mlp) if isinstance(m, nn.Linear)]


def _programs(of_samples: Tensor, block: int, per_processor: int) -> tuple[int]:
    """Launch grid: programs that loop over the blocks of samples."""
    blocks = triton.cdiv(len(of_samples), block)
    return (min(blocks, processors(of_samples.device) * per_processor),)


def _gathered(parameters: list[Tensor]) -> Float[Tensor, "n"]:
    """Concatenate parameters to one flat vector; the parameters become views of it."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat[start:stop].view(parameter.shape)
        start = stop
    return flat
