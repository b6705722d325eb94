from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightfield.scenes.scene import Box
from train.marching import Samples, box_interval, march, rays_in_box
from train.occupancy import OccupancyGrid

NEAR, FAR = 0.2, 30.0


def random_rays(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rays from around the box and from inside it, most of which pass through it."""
    generator = torch.Generator().manual_seed(seed)
    origins = 0.5 + 1.5 * torch.randn(count, 3, generator=generator)
    targets = torch.rand(count, 3, generator=generator) * 1.4 - 0.2
    lengths = 0.3 + torch.rand(count, 1, generator=generator)
    directions = lengths * torch.nn.functional.normalize(targets - origins, dim=-1)
    directions[0] = torch.tensor([0.0, 0.0, 0.7])  # along an axis
    origins[0] = torch.tensor([0.4, 0.6, -1.0])
    return origins, directions


def spotted_grid(resolution: int, step_length: float, seed: int = 0) -> OccupancyGrid:
    grid = OccupancyGrid(resolution, step_length)
    spots = torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(seed)) < 0.01
    grid.restrict(spots)
    return grid


def points_of(samples: Samples, origins: Tensor, directions: Tensor) -> Tensor:
    return origins[samples.ray] + samples.t[:, None] * directions[samples.ray]


@pytest.mark.parametrize(("resolution", "steps"), [(16, 64), (32, 300), (24, 20)])
def test_skipping_changes_nothing(resolution: int, steps: int) -> None:
    """Marching everywhere and dropping samples in empty cells gives the same samples bit for bit."""
    step_length = math.sqrt(3) / steps
    grid = spotted_grid(resolution, step_length)
    everywhere = OccupancyGrid(resolution, step_length)
    rays = random_rays(400, seed=1)
    offset = torch.rand(400, generator=torch.Generator().manual_seed(2))

    dense = march(*rays, everywhere, NEAR, FAR, offset)
    cells = (points_of(dense, *rays) * resolution).long().clamp(0, resolution - 1)
    expected = grid.occupied[tuple(cells.T)]
    got = march(*rays, grid, NEAR, FAR, offset)

    assert 0 < len(got) < 0.1 * len(dense)
    # A sample within rounding of a cell's wall may fall on either side of it.
    wanted = {
        (int(r), float(t)) for r, t in zip(dense.ray[expected], dense.t[expected], strict=True)
    }
    found = {(int(r), float(t)) for r, t in zip(got.ray, got.t, strict=True)}
    inside_wall = 1e-5 * resolution
    for ray, t in wanted ^ found:
        place = (rays[0][ray] + t * rays[1][ray]) * resolution
        assert float((place - place.round()).abs().min()) < inside_wall
    assert len(wanted ^ found) < 0.01 * len(wanted)


def test_samples_are_packed_inside_the_box_in_equal_steps() -> None:
    step_length = 0.02
    origins, directions = random_rays(300, seed=3)
    offset = torch.rand(300, generator=torch.Generator().manual_seed(4))
    samples = march(origins, directions, OccupancyGrid(16, step_length), NEAR, FAR, offset)
    points = points_of(samples, origins, directions)
    assert float(points.min()) > -1e-5
    assert float(points.max()) < 1 + 1e-5
    assert float(samples.t.min()) >= NEAR
    assert bool((samples.ray.diff() >= 0).all())
    same = samples.ray.diff() == 0
    lengths = (samples.t.diff() * directions[samples.ray[1:]].norm(dim=-1))[same]
    torch.testing.assert_close(lengths, torch.full_like(lengths, step_length), atol=1e-4, rtol=0)

    start, stop = box_interval(origins, directions, NEAR, FAR)
    expected = ((stop - start).clamp(min=0) * directions.norm(dim=-1) / step_length - offset).ceil()
    counts = torch.bincount(samples.ray, minlength=300)
    assert int((counts - expected.clamp(min=0)).abs().max()) <= 1
    first = samples.t[torch.cat([torch.ones(1, dtype=torch.bool), ~same])]
    ray = samples.ray.unique()
    dt = step_length / directions[ray].norm(dim=-1)
    torch.testing.assert_close(first, start[ray] + offset[ray] * dt)


def test_near_and_far_bound_the_samples() -> None:
    origins = torch.tensor([[0.5, 0.5, 2.0]])
    directions = torch.tensor([[0.0, 0.0, -1.0]])
    samples = march(origins, directions, OccupancyGrid(8, 0.01), 1.3, 1.6)
    assert len(samples) == 30
    assert 1.3 < float(samples.t[0]) < float(samples.t[-1]) < 1.6


def test_rays_that_miss_have_no_samples() -> None:
    origins = torch.tensor([[2.0, 2.0, 2.0], [0.5, 0.5, 3.0], [0.5, 0.5, -1.0]])
    directions = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert len(march(origins, directions, OccupancyGrid(8, 0.01), NEAR, FAR)) == 0


def test_an_empty_grid_has_no_samples() -> None:
    grid = OccupancyGrid(8, 0.01)
    grid.restrict(torch.zeros(8, 8, 8, dtype=torch.bool))
    assert len(march(*random_rays(50, seed=5), grid, NEAR, FAR)) == 0


def test_box_coordinates() -> None:
    box = Box((1.0, -2.0, 0.5), 2.0)
    origins = torch.tensor([[-1.0, -4.0, -1.5], [3.0, 0.0, 2.5]])
    directions = torch.tensor([[4.0, 4.0, 4.0], [0.0, -2.0, 0.0]])
    o, d = rays_in_box(origins, directions, box)
    torch.testing.assert_close(o, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(d, torch.tensor([[1.0, 1.0, 1.0], [0.0, -0.5, 0.0]]))
