"""Times of the radiance field's kernels at full size: hash grid, networks and Adam.

The points matter: along rays, consecutive samples share lattice cells, and an object's surfaces touch a
small part of the finer tables. Uniform points are the worst case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tools.bench_gpu.results import Cost, KernelTime, time_ms
from train.gpu_steps import StepBuffers
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


def lattice_cost(samples: int, levels: int) -> Cost:
    """Cost of reading, or adding to, all corners: 4 bytes each (a cache sector has 32)."""
    corners = samples * levels * CORNERS
    return Cost(4.0 * corners + samples * (12 + 4.0 * levels), 4.0 * corners)


def density_cost(points: int, levels: int, hidden_width: int, geometry_features: int) -> Cost:
    """Cost of the hash grid at points and of the density network, with features in registers."""
    products = hidden_width * (2 * levels + geometry_features)
    networks = Cost(points * 4.0 * (1 - levels), 2.0 * points * products)
    return lattice_cost(points, levels) + networks


def adam_cost(values: int, gradient_bytes: int) -> Cost:
    """Cost of reading and writing gradient, moments, master and float16 copy."""
    return Cost(values * (2.0 * gradient_bytes + 3 * 8 + 2), 12.0 * values)


def uniform_points(count: int, device: torch.device) -> Float[Tensor, "3 m"]:
    """Uniform points in the box."""
    return torch.rand((3, count), device=device)


def surface_points(count: int, device: torch.device) -> Float[Tensor, "3 m"]:
    """Samples of rays behind the surfaces of random boxes, `SAMPLES_PER_RAY` for each ray."""
    rays = -(-count // SAMPLES_PER_RAY)
    boxes = torch.rand((60, 2, 3), device=device) * torch.tensor([[0.5], [0.2]], device=device)
    box = boxes[torch.randint(len(boxes), (rays,), device=device)]
    inside = torch.rand((rays, 3), device=device)
    axis = torch.randint(3, (rays, 1), device=device)
    inside.scatter_(1, axis, inside.gather(1, axis).round())  # onto one of the six faces
    entry = 0.15 + box[:, 0] + inside * box[:, 1]
    direction = torch.nn.functional.normalize(torch.randn((rays, 3), device=device), dim=1)
    along = torch.arange(SAMPLES_PER_RAY, device=device) * STEP_LENGTH
    points = entry[:, None] + along[:, None] * direction[:, None]
    return points.view(-1, 3)[:count].t().clamp(0, 1).contiguous()


def full_field(device: torch.device) -> RadianceField:
    """A field of the paper's size with table values of order 0.1."""
    field = RadianceField(
        SHAPE,
        HIDDEN_WIDTH,
        GEOMETRY_FEATURES,
        backend="torch",
        generator=torch.Generator().manual_seed(0),
        device=device,
    )
    torch.nn.init.normal_(field.grid.get_parameter("table"), std=0.1)
    return field


def measure(device: torch.device) -> list[KernelTime]:
    """Times of all kernels over `SAMPLES` samples."""
    kernels = FieldKernels(full_field(device))
    b = StepBuffers(SAMPLES // SAMPLES_PER_RAY + 1, SAMPLES, SHAPE.levels, device)
    b.samples.count.fill_(SAMPLES)
    b.samples.ray.copy_(torch.arange(SAMPLES, device=device) // SAMPLES_PER_RAY)
    for values in (b.rays.harmonics, b.feature_gradient, b.density_gradient, b.color_gradient):
        values.normal_()
    points, count = b.samples.points, b.samples.count
    lattice = lattice_cost(SAMPLES, SHAPE.levels)
    density = density_cost(SAMPLES, SHAPE.levels, HIDDEN_WIDTH, GEOMETRY_FEATURES)
    times = []
    for name, drawn in (("surfaces", surface_points), ("uniform", uniform_points)):
        points.copy_(drawn(SAMPLES, device))
        times += [
            _time(f"encode, {name}", lambda: kernels.encode(points, count, b.features), lattice),
            _time(
                f"scatter, {name}",
                lambda: kernels.scatter(points, count, b.feature_gradient),
                lattice,
            ),
            _time(f"density, {name}", lambda: kernels.density(points, count, b.density), density),
        ]
    inputs = (b.features, b.rays.harmonics, b.samples.ray, count)
    gradients = (b.density_gradient, b.color_gradient, b.feature_gradient)
    read, products = SHAPE.levels * 4 + 4 + 32 / SAMPLES_PER_RAY, kernels.weights.numel()
    adam = FusedAdam(kernels.table, kernels.half.table)
    step = torch.ones(1, dtype=torch.int32, device=device)
    rate, scale = torch.full((1,), 1e-2, device=device), torch.ones(1, device=device)
    adam_ms = time_ms(lambda: adam.step(kernels.table_gradient, step, rate, scale))
    cost_of_adam = adam_cost(kernels.table.numel(), kernels.table_gradient.itemsize)
    return [
        *times,
        _time(
            "shade",
            lambda: kernels.shade(*inputs, b.density, b.color),
            Cost(SAMPLES * (read + 16), SAMPLES * 2.0 * products),
        ),
        _time(
            "shade backward",
            lambda: kernels.shade_backward(*inputs, *gradients),
            Cost(SAMPLES * (read + 16 + SHAPE.levels * 4), SAMPLES * 6.0 * products),
        ),
        KernelTime("Adam of the table", adam_ms, cost_of_adam),
    ]


def _time(name: str, work: Callable[[], object], cost: Cost) -> KernelTime:
    ms = time_ms(work)
    return KernelTime(name, ms, cost, f"{SAMPLES / ms / 1e3:.0f} M samples/s")
