"""The radiance field as kernels over a buffer of samples.

Letters: M the capacity of the buffer, whose first `count` samples (an int32 on the device) are
used; L levels; R rays. Points are [3, M] float32 in [0, 1]^3, gradients and colours [3, M], features
[L, M, 2] float16. Nothing here allocates, or waits for the device: a CUDA graph can hold every call.
The twin is `train.radiance_field`.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float, Int32
from torch import Tensor, nn

from lightfield.errors import ConfigError
from train.gpu import networks
from train.gpu.lattice import DeviceLevels
from train.hash_grid.layout import GridShape
from train.hash_grid.triton import encode, scatter, words
from train.radiance_field import RadianceField
from train.spherical_harmonics import COUNT

SHADE_BLOCK, SHADE_WARPS, SHADE_PROGRAMS = 64, 4, 4
BACKWARD_BLOCK, BACKWARD_WARPS, BACKWARD_PROGRAMS = 128, 8, 1
DENSITY_BLOCK, DENSITY_WARPS, DENSITY_PROGRAMS = 64, 8, 2
"""Samples and warps of a program, and programs on each multiprocessor."""

HIDDEN_WIDTHS = (16, 32, 64, 128)


class FieldKernels:
    """A field's float16 copies and gradients, and the kernels that use them.

    `table` and `weights` are the float32 masters, flat; the field's parameters are views of them.
    Gradients are added up: whoever takes a step by them sets them to zero.

    Raises:
        ConfigError: when the kernels do not support the field's shape.
    """

    def __init__(self, field: RadianceField, *, gradient_dtype: torch.dtype = torch.float16):
        layers = [m for m in (*field.density_mlp, *field.colour_mlp) if isinstance(m, nn.Linear)]
        shape, table = field.grid.shape, field.grid.table
        assert isinstance(shape, GridShape)
        assert isinstance(table, nn.Parameter)
        self.hidden_width = layers[0].out_features
        if (reason := unsupported(self.hidden_width, layers[1].out_features)) is not None:
            raise ConfigError(reason, where="GPU kernels", remedy="train without them")
        self.device = field.initial_density.device
        self.levels = DeviceLevels.of(shape, self.device)
        self.initial_density = field.initial_density
        self.table = table.data
        self.weights = _gathered([layer.weight for layer in layers])
        self.table_half: Tensor = self.table.half()
        self.weights_half: Tensor = self.weights.half()
        self.table_gradient = torch.zeros_like(self.table, dtype=gradient_dtype)
        self.weights_gradient = torch.zeros_like(self.weights)
        self.processors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else 1
        )

    def refresh(self) -> None:
        """Copy the masters into the float16 copies, after they were changed other than by Adam."""
        self.table_half.copy_(self.table)
        self.weights_half.copy_(self.weights)

    def encode(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], features: Tensor
    ) -> None:
        """Write the features of points."""
        encode(points, self.table_half, self.levels, count, features)

    def scatter(
        self, points: Float[Tensor, "3 m"], count: Int32[Tensor, "1"], feature_gradient: Tensor
    ) -> None:
        """Add the features' gradient into the table's."""
        scatter(points, feature_gradient, self.levels, count, self.table_gradient)

    def shade(
        self,
        features: Float[Tensor, "l m 2"],
        harmonics: Float[Tensor, "r 16"],
        ray: Int32[Tensor, "m"],
        count: Int32[Tensor, "1"],
        density: Float[Tensor, "m"],
        colour: Float[Tensor, "3 m"],
        *,
        block: int = SHADE_BLOCK,
        warps: int = SHADE_WARPS,
        programs: int = SHADE_PROGRAMS,
    ) -> None:
        """Write density and colour of samples; `harmonics` (float16) are those of their rays."""
        capacity = ray.shape[0]
        networks.shade_kernel[(self._programs(capacity, block, programs),)](
            words(features),
            harmonics,
            ray,
            self.weights_half,
            self.initial_density,
            count,
            density,
            colour,
            capacity,
            LEVELS=self.levels.count,
            HIDDEN=self.hidden_width,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
        )

    def shade_backward(
        self,
        features: Float[Tensor, "l m 2"],
        harmonics: Float[Tensor, "r 16"],
        ray: Int32[Tensor, "m"],
        count: Int32[Tensor, "1"],
        density_gradient: Float[Tensor, "m"],
        colour_gradient: Float[Tensor, "3 m"],
        feature_gradient: Float[Tensor, "l m 2"],
        *,
        block: int = BACKWARD_BLOCK,
        warps: int = BACKWARD_WARPS,
        programs: int = BACKWARD_PROGRAMS,
    ) -> None:
        """Write the features' gradient, and add that of the weights.

        A gradient that is not finite counts as zero; one beyond float16 is held at its bound.
        """
        capacity = ray.shape[0]
        networks.shade_backward_kernel[(self._programs(capacity, block, programs),)](
            words(features),
            harmonics,
            ray,
            self.weights_half,
            self.initial_density,
            count,
            density_gradient,
            colour_gradient,
            words(feature_gradient),
            self.weights_gradient,
            capacity,
            LEVELS=self.levels.count,
            HIDDEN=self.hidden_width,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
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
        networks.density_kernel[(self._programs(capacity, block, programs),)](
            points,
            words(self.table_half),
            self.levels.numbers,
            self.weights_half,
            self.initial_density,
            count,
            density,
            capacity,
            LEVELS=self.levels.count,
            HIDDEN=self.hidden_width,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
        )

    def _programs(self, capacity: int, block: int, per_processor: int) -> int:
        return min(triton.cdiv(capacity, block), self.processors * per_processor)


def unsupported(hidden_width: int, geometry_features: int) -> str | None:
    """Why the kernels cannot compute networks of these widths, or None where they can."""
    if hidden_width not in HIDDEN_WIDTHS:
        return f"the kernels need a hidden width of {HIDDEN_WIDTHS}, not {hidden_width}"
    if geometry_features != networks.GEOMETRY_FEATURES or COUNT != networks.HARMONICS:
        return f"the kernels need {networks.GEOMETRY_FEATURES} geometry features"
    return None


def _gathered(parameters: list[Tensor]) -> Float[Tensor, "n"]:
    """One flat vector of all parameters, which become views of it."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat[start:stop].view(parameter.shape)
        start = stop
    return flat
