"""The teacher's field at full size: grid, networks and Adam, in samples per second.

The points decide much: along rays, consecutive samples share lattice cells, and the surfaces of an
object touch a small part of the finer tables. Uniform points are the worst case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from train.benchmarks.figure import Cost, Figure, time_ms
from train.grid_layout import GridShape
from train.kernels.field.radiance_field import FieldKernels
from train.kernels.teacher.adam import FusedAdam
from train.radiance_field import RadianceField

SHAPE = GridShape(16, 2, 19, 16, 1024)
HIDDEN_WIDTH, GEOMETRY_FEATURES = 64, 16
SAMPLES = 1 << 20
SAMPLES_PER_RAY = 12
STEP_LENGTH = 1 / 600
CORNERS = 8


@dataclass(frozen=True)
class Buffers:
    """A full buffer of samples, and all that the kernels read and write for it."""

    points: Float[Tensor, "3 m"]
    ray: Int32[Tensor, "m"]
    harmonics: Float[Tensor, "r 16"]
    count: Int32[Tensor, "1"]
    features: Float[Tensor, "l m 2"]
    feature_gradient: Float[Tensor, "l m 2"]
    density: Float[Tensor, "m"]
    color: Float[Tensor, "3 m"]
    density_gradient: Float[Tensor, "m"]
    color_gradient: Float[Tensor, "3 m"]

    @classmethod
    def full(cls, points: Float[Tensor, "3 m"], levels: int) -> Buffers:
        """Buffers for these points, rays of `SAMPLES_PER_RAY` each, gradients of ordinary size."""
        device, m = points.device, points.shape[1]
        features = torch.zeros((levels, m, 2), dtype=torch.float16, device=device)
        return cls(
            points=points,
            ray=(torch.arange(m, device=device) // SAMPLES_PER_RAY).int(),
            harmonics=torch.randn((m // SAMPLES_PER_RAY + 1, 16), device=device).half(),
            count=torch.full((1,), m, dtype=torch.int32, device=device),
            features=features,
            feature_gradient=torch.randn_like(features),
            density=torch.zeros(m, device=device),
            color=torch.zeros((3, m), device=device),
            density_gradient=torch.randn(m, device=device),
            color_gradient=torch.randn((3, m), device=device),
        )


def uniform_points(count: int, device: torch.device) -> Float[Tensor, "3 m"]:
    """Anywhere in the box."""
    return torch.rand((3, count), device=device)


def surface_points(count: int, device: torch.device) -> Float[Tensor, "3 m"]:
    """Samples of rays that enter bricks: in runs, from the surfaces of boxes, a step apart."""
    rays = -(-count // SAMPLES_PER_RAY)
    bricks = torch.rand((60, 2, 3), device=device) * torch.tensor([[0.5], [0.2]], device=device)
    brick = bricks[torch.randint(len(bricks), (rays,), device=device)]
    inside = torch.rand((rays, 3), device=device)
    axis = torch.randint(3, (rays, 1), device=device)
    inside.scatter_(1, axis, inside.gather(1, axis).round())  # onto one of the six sides
    entry = 0.15 + brick[:, 0] + inside * brick[:, 1]
    direction = torch.nn.functional.normalize(torch.randn((rays, 3), device=device), dim=1)
    along = torch.arange(SAMPLES_PER_RAY, device=device) * STEP_LENGTH
    points = entry[:, None] + along[:, None] * direction[:, None]
    return points.view(-1, 3)[:count].t().clamp(0, 1).contiguous()


def full_field(device: torch.device) -> RadianceField:
    """A field of the paper's size with values of order 0.1."""
    field = RadianceField(
        SHAPE,
        HIDDEN_WIDTH,
        GEOMETRY_FEATURES,
        backend="torch",
        generator=torch.Generator().manual_seed(0),
        device=device,
    )
    table = field.grid.table
    assert isinstance(table, Tensor)
    torch.nn.init.normal_(table, std=0.1)
    return field


def measure(device: torch.device) -> list[Figure]:
    """Times of every kernel over a full buffer of samples."""
    kernels = FieldKernels(full_field(device))
    figures = []
    for name, points in (
        ("surfaces", surface_points(SAMPLES, device)),
        ("uniform", uniform_points(SAMPLES, device)),
    ):
        b = Buffers.full(points, SHAPE.levels)
        figures += grid_figures(kernels, b, name)
    figures += network_figures(kernels, b)
    figures.append(adam_figure(kernels, device))
    return figures


def lattice_cost(samples: int, levels: int) -> Cost:
    """Reading or adding to each corner the four bytes asked for; a sector of the cache is 32."""
    corners = samples * levels * CORNERS
    return Cost(4.0 * corners + samples * (12 + 4.0 * levels), 4.0 * corners)


def density_cost(points: int, levels: int, hidden_width: int, geometry_features: int) -> Cost:
    """The features of points, used at once, and the network of the density."""
    lattice, products = (
        lattice_cost(points, levels),
        hidden_width * (2 * levels + geometry_features),
    )
    return lattice + Cost(points * 4.0 * (1 - levels), 2.0 * points * products)


def adam_cost(values: int, gradient_bytes: int) -> Cost:
    """Gradient, moments, master and copy, read and written."""
    return Cost(values * (2.0 * gradient_bytes + 3 * 8 + 2), 12.0 * values)


def grid_figures(kernels: FieldKernels, b: Buffers, name: str) -> list[Figure]:
    """The kernels that go to the grid's corners."""
    lattice = lattice_cost(SAMPLES, SHAPE.levels)
    density = density_cost(SAMPLES, SHAPE.levels, HIDDEN_WIDTH, GEOMETRY_FEATURES)
    works: list[tuple[str, Callable[[], object], Cost]] = [
        ("encode", lambda: kernels.encode(b.points, b.count, b.features), lattice),
        ("scatter", lambda: kernels.scatter(b.points, b.count, b.feature_gradient), lattice),
        ("density", lambda: kernels.density(b.points, b.count, b.density), density),
    ]
    return [_figure(f"{key}, {name}", work, cost) for key, work, cost in works]


def network_figures(kernels: FieldKernels, b: Buffers) -> list[Figure]:
    """Networks over features that lie in memory."""
    products = kernels.weights.numel()
    inputs = (b.features, b.harmonics, b.ray, b.count)
    read = SHAPE.levels * 4 + 4 + 32 / SAMPLES_PER_RAY
    gradients = (b.density_gradient, b.color_gradient, b.feature_gradient)
    return [
        _figure(
            "shade",
            lambda: kernels.shade(*inputs, b.density, b.color),
            Cost(SAMPLES * (read + 16), SAMPLES * 2.0 * products),
        ),
        _figure(
            "shade backward",
            lambda: kernels.shade_backward(*inputs, *gradients),
            Cost(SAMPLES * (read + 16 + SHAPE.levels * 4), SAMPLES * 6.0 * products),
        ),
    ]


def adam_figure(kernels: FieldKernels, device: torch.device) -> Figure:
    """A step for the table."""
    adam = FusedAdam(kernels.table, kernels.half.table)
    count = torch.ones(1, dtype=torch.int32, device=device)
    rate, scale = torch.full((1,), 1e-2, device=device), torch.ones(1, device=device)
    cost = adam_cost(kernels.table.numel(), kernels.table_gradient.itemsize)
    ms = time_ms(lambda: adam.step(kernels.table_gradient, count, rate, scale))
    return Figure("Adam of the table", ms, cost.size_bytes, cost.operations)


def _figure(name: str, work: Callable[[], object], cost: Cost) -> Figure:
    figure = Figure(name, time_ms(work), cost.size_bytes, cost.operations)
    return replace(figure, note=f"{SAMPLES / figure.ms / 1e3:.0f} M samples/s")
