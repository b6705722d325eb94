"""Radiance field of the teacher: density and view-dependent color at every point of the box.

Letters: x in [0, 1]^3 a point in the box's coordinates, d a unit direction, h the geometry features.

    h       = density MLP(hash grid(x))        one hidden layer
    density = initial_density * exp(h_0), per side of the box
    color  = sigmoid(color MLP(harmonics(d), h))        two hidden layers

No layer has a bias. Source: Instant-NGP (Mueller et al. 2022), section 5.4.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from train.grid_layout import GridShape
from train.hash_grid.grid import Backend, hash_grid
from train.spherical_harmonics import COUNT

LARGEST_EXPONENT = 15.0
POINTS_AT_ONCE = 1 << 18


class RadianceField(nn.Module):
    """Hash grid and two small networks, initialized from `generator` to a nearly constant density."""

    initial_density: Tensor

    def __init__(
        self,
        shape: GridShape,
        hidden_width: int,
        geometry_features: int,
        *,
        backend: Backend,
        generator: torch.Generator,
        device: torch.device | str,
    ):
        super().__init__()
        # A buffer, because the density depends on it as on the weights.
        self.register_buffer("initial_density", torch.ones(()))
        self.grid = hash_grid(shape, backend, generator, device)
        self.density_mlp = _mlp((shape.width, hidden_width, geometry_features), generator)
        widths = (COUNT + geometry_features, hidden_width, hidden_width, 3)
        self.color_mlp = _mlp(widths, generator)
        self.to(device)

    def geometry(
        self, points: Float[Tensor, "n 3"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n h"]]:
        """Density and geometry features at points."""
        features = self.density_mlp(self.grid(points))
        return self.initial_density * bounded_exp(features[:, 0]), features

    def density(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Density at points without gradients, computed in parts to save memory."""
        with torch.no_grad():
            parts = [self.geometry(part)[0] for part in points.split(POINTS_AT_ONCE)]
        return torch.cat(parts)

    def color(
        self, features: Float[Tensor, "n h"], harmonics: Float[Tensor, "n 16"]
    ) -> Float[Tensor, "n 3"]:
        """Color at points from their geometry features and the harmonics of the view directions."""
        return torch.sigmoid(self.color_mlp(torch.cat([harmonics, features], dim=-1)))


def bounded_exp(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """exp of x clamped to +-15, with a gradient that does not vanish at the bounds."""
    return _BoundedExp.apply(x)  # pyright: ignore[reportReturnType]


class _BoundedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.exp(x.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad * ctx.saved_tensors[0]


def _mlp(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        # torch's initialization would draw from the global generator.
        linear = skip_init(nn.Linear, fan_in, fan_out, bias=False)
        assert isinstance(linear.weight, Tensor)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
