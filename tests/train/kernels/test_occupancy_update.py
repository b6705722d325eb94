from __future__ import annotations

import torch
from torch import Tensor

from train.kernels.teacher.occupancy_update import OccupancyUpdate, uniform
from train.kernels.teacher.training_rays import MarchingGrid
from train.occupancy import OccupancyGrid

RESOLUTION, STEP_LENGTH = 16, 0.02


def density_of_cells(points: Tensor) -> Tensor:
    """A density that is constant within each cell, so the random point does not matter."""
    i, j, k = (points * RESOLUTION).long()
    number = (i * RESOLUTION + j) * RESOLUTION + k
    return torch.where(number % 5 == 0, 2.0 + number % 7, 0.0)


def twins(device: torch.device) -> tuple[OccupancyGrid, OccupancyGrid]:
    grids = OccupancyGrid(RESOLUTION, STEP_LENGTH), OccupancyGrid(RESOLUTION, STEP_LENGTH)
    candidates = torch.rand((RESOLUTION,) * 3, generator=torch.Generator().manual_seed(3)) < 0.4
    for grid in grids:
        grid.to(device)
        grid.restrict(candidates.to(device))
    return grids


def step(number: int, device: torch.device) -> Tensor:
    return torch.tensor([number], dtype=torch.int32, device=device)


def bits_of(marching: MarchingGrid) -> Tensor:
    shifts = torch.arange(32, device=marching.bits.device)
    return (((marching.bits[:, None] >> shifts) & 1) != 0).view((RESOLUTION,) * 3)


def test_an_update_of_all_cells_equals_the_plain_update(device: torch.device):
    mine, plain = twins(device)
    bits = MarchingGrid.empty(RESOLUTION, device)

    def ask(points: Tensor, out: Tensor) -> None:
        out.copy_(density_of_cells(points))

    update = OccupancyUpdate(mine, bits, ask, seed=1)
    assert torch.equal(bits_of(bits), plain.occupied)
    generator = torch.Generator(device).manual_seed(0)
    for number in (0, 16):
        update(step(number, device), everywhere=True)
        plain.update(
            lambda points: density_of_cells(points.t()), everywhere=True, generator=generator
        )
        torch.testing.assert_close(mine.density, plain.density)
        assert torch.equal(mine.occupied, plain.occupied)
        assert torch.equal(bits_of(bits), plain.occupied)
    blocks = plain.occupied.view(2, 8, 2, 8, 2, 8).amax(dim=(1, 3, 5))
    assert torch.equal(bits.blocks, blocks.to(torch.uint8))
    assert 0 < int(plain.occupied.sum()) < int(plain.candidates.sum())


def test_later_updates_draw_candidates_and_occupied_cells(device: torch.device):
    grid, _ = twins(device)
    asked = []

    def ask(points: Tensor, out: Tensor) -> None:
        asked.append((points * RESOLUTION).floor().long())
        out.copy_(density_of_cells(points))

    update = OccupancyUpdate(grid, MarchingGrid.empty(RESOLUTION, device), ask, seed=1)
    update(step(0, device), everywhere=True)
    before = grid.occupied.clone()
    update(step(16, device), everywhere=False)
    candidates = int(grid.candidates.sum())
    assert len(asked[0][0]) == candidates
    quarter = -(-candidates // 4)
    i, j, k = asked[1]
    assert len(i) == 2 * quarter
    assert grid.candidates[i, j, k].all()
    assert before[i, j, k][quarter:].all()
    assert not before[i, j, k][:quarter].all()
    assert len(torch.stack([i, j, k])[:, quarter:].unique(dim=1).t()) > 0.4 * int(before.sum())


def test_an_empty_grid_stays_empty(device: torch.device):
    grid, _ = twins(device)
    bits = MarchingGrid.empty(RESOLUTION, device)
    update = OccupancyUpdate(grid, bits, lambda _, out: out.zero_(), seed=1)
    for number, everywhere in ((0, True), (16, False)):
        update(step(number, device), everywhere=everywhere)
    assert not grid.occupied.any()
    assert not bits.bits.any()


def test_random_numbers_are_uniform_and_depend_on_the_step(device: torch.device):
    first, again, other = (torch.empty((4, 3000), device=device) for _ in range(3))
    uniform(first, 7, step(1, device))
    uniform(again, 7, step(1, device))
    uniform(other, 7, step(2, device))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.99
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    assert (first.mean(1) - 0.5).abs().max() < 0.03
    assert (first.histc(10, 0, 1) / first.numel() - 0.1).abs().max() < 0.02
