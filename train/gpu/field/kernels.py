"""The radiance field as kernels over a buffer of samples.

Letters: M the capacity of the buffer, whose first `count` samples (an int32 on the device) are
used; L levels; R rays. Points are [3, M] float32 in [0, 1]^3, gradients and colors [3, M], features
[L, M, 2] float16. Nothing here allocates, or waits for the device: a CUDA graph can hold every call.
The twin is `train.radiance_field`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float, Float16, Int32
from torch import Tensor, nn

from lightfield.errors import ConfigError
from train.gpu.availability import processors
from train.gpu.field import lattice, networks
from train.gpu.field.lattice import DeviceLevels
from train.hash_grid.layout import GridShape
from train.hash_grid.triton import encode, scatter, words
from train.radiance_field import RadianceField
from train.spherical_harmonics import COUNT

SHADE_BLOCK, SHADE_WARPS, SHADE_PROGRAMS = 64, 4, 4
BACKWARD_BLOCK, BACKWARD_WARPS, BACKWARD_PROGRAMS = 128, 8, 1
DENSITY_BLOCK, DENSITY_WARPS, DENSITY_PROGRAMS = 64, 8, 2
"""Samples and warps of a program, and programs on each multiprocessor."""

HIDDEN_WIDTHS = (16, 32, 64, 128)


def unsupported(shape: GridShape, hidden_width: int, geometry_features: int) -> str | None:
    """Why the kernels cannot compute a field of this shape, or None where they can."""
    if (reason := lattice.unsupported(shape)) is not None:
        return reason
    if hidden_width not in HIDDEN_WIDTHS:
        return f"the kernels need a hidden width of {HIDDEN_WIDTHS}, not {hidden_width}"
    if geometry_features != networks.GEOMETRY_FEATURES or COUNT != networks.HARMONICS:
        return f"the kernels need {networks.GEOMETRY_FEATURES} geometry features"
    return None


@dataclass(frozen=True)
class HalfField:
    """What kernels read of a field: its table and weights as float16, its levels, its first density."""

    table: Float16[Tensor, "n"]
    weights: Float16[Tensor, "w"]
    initial_density: Float[Tensor, ""]
    levels: DeviceLevels
    hidden_width: int

    @classmethod
    def of(cls, field: RadianceField) -> HalfField:
        """Copies of a field's weights as they are now; the first density is the field's own.

        Raises:
            ConfigError: when the kernels do not support the field's shape.
        """
        layers, shape = linear_layers(field), field.grid.shape
        assert isinstance(shape, GridShape)
        widths = layers[0].out_features, layers[1].out_features
        if (reason := unsupported(shape, *widths)) is not None:
            raise ConfigError(reason, where="GPU kernels", remedy="train without them")
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
        """Write the density at points, with nothing in between kept."""
        capacity = points.shape[1]
        networks.density_kernel[_programs(density, block, programs)](
            points, words(self.table), self.levels.numbers, self.weights, self.initial_density,
            count, density, capacity,
            LEVELS=self.levels.count, HIDDEN=self.hidden_width, BLOCK=block,
            num_warps=warps, num_stages=1,
        )  # fmt: skip


class FieldKernels:
    """A field's float16 copies and gradients, and the kernels that use them.

    `table` and `weights` are the float32 masters, flat; the field's parameters are views of them.
    Gradients are added up: whoever takes a step by them sets them to zero.

    Raises:
        ConfigError: when the kernels do not support the field's shape.
    """

    def __init__(self, field: RadianceField, *, gradient_dtype: torch.dtype = torch.float16):
        self.half = HalfField.of(field)
        self.density = self.half.density
        self.table = field.grid.get_parameter("table").data
        self.weights = _gathered([layer.weight for layer in linear_layers(field)])
        self.table_gradient = torch.zeros_like(self.table, dtype=gradient_dtype)
        self.weights_gradient = torch.zeros_like(self.weights)

    def refresh(self) -> None:
        """Copy the masters into the float16 copies, after they were changed other than by Adam."""
        self.half.table.copy_(self.table)
        self.half.weights.copy_(self.weights)

    def is_finite(self) -> bool:
        """Whether every weight is a number that float16 can hold; waits for the device."""
        return bool(self.half.table.isfinite().all() & self.half.weights.isfinite().all())

    def encode(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], features: Tensor
    ) -> None:
        """Write the features of points."""
        encode(points, self.half.table, self.half.levels, count, features)

    def scatter(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], feature_gradient: Tensor
    ) -> None:
        """Add the features' gradient into the table's."""
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
        """Write density and color of samples; `harmonics` (float16) are those of their rays."""
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
        """Write the features' gradient, and add that of the weights.

        A gradient that is not finite counts as zero; one beyond float16 is held at its bound.
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
        """What forward and backward begin with."""
        half = self.half
        return words(features), harmonics, ray, half.weights, half.initial_density, count


def linear_layers(field: RadianceField) -> list[nn.Linear]:
    """The layers of both networks, in the order in which kernels find their weights."""
    return [m for m in (*field.density_mlp, *field.color_mlp) if isinstance(m, nn.Linear)]


def _programs(of_samples: Tensor, block: int, per_processor: int) -> tuple[int]:
    """The launch grid of programs that share the samples' blocks."""
    blocks = triton.cdiv(len(of_samples), block)
    return (min(blocks, processors(of_samples.device) * per_processor),)


def _gathered(parameters: list[Tensor]) -> Float[Tensor, "n"]:
    """One flat vector of all parameters, which become views of it."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat[start:stop].view(parameter.shape)
        start = stop
    return flat
