"""The fine occupancy grid, against its unpacked form and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightfield.errors import ConfigError
from train.kernels.rendering.fine_occupancy import MAX_JUMP, bake, fine_cells

STEP = 0.02


def ball(points: Tensor) -> Tensor:
    """Dense within 0.2 of a point."""
    return 1000.0 * ((points - torch.tensor([0.4, 0.5, 0.6])).norm(dim=-1) < 0.2)


def everything(resolution: int) -> Tensor:
    return torch.ones((resolution,) * 3, dtype=torch.bool)


def blown_up(cells: Tensor, factor: int) -> Tensor:
    for axis in range(3):
        cells = cells.repeat_interleave(factor, dim=axis)
    return cells


@pytest.mark.parametrize("fineness", [1, 2, 4])
def test_every_point_of_the_field_lies_in_a_fine_cell(fineness):
    fine = fine_cells(bake(ball, everything(8), STEP, fineness=fineness))
    points = torch.rand((20_000, 3), generator=torch.Generator().manual_seed(0))
    inside = points[ball(points) > 0]
    i, j, k = (inside * 8 * fineness).long().unbind(-1)
    assert len(inside) > 300
    assert fine[i, j, k].all()


@pytest.mark.parametrize("fineness", [1, 2, 4])
def test_cells_two_away_from_the_field_are_left_out(fineness):
    resolution = 8 * fineness
    fine = fine_cells(bake(ball, everything(8), STEP, fineness=fineness))
    grid = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 3, indexing="ij"), dim=-1)
    middles = (grid + 0.5) / resolution
    far = (middles - torch.tensor([0.4, 0.5, 0.6])).norm(dim=-1) > 0.2 + 2 * 3**0.5 / resolution
    assert far.any()
    assert not fine[far].any()


def test_bits_follow_the_layout():
    fine = bake(lambda p: 1e3 * (p[:, 0] < 0), everything(4), STEP)
    assert not fine.words.any()
    corner = bake(
        lambda p: 1e3 * ((p * 16).floor() == torch.tensor([5, 6, 11])).all(-1), everything(4), STEP
    )
    expected = torch.zeros((16, 16, 16), dtype=torch.bool)
    expected[4:7, 5:8, 10:13] = True
    assert torch.equal(fine_cells(corner), expected)
    # Fine cell (5, 6, 11) is cell (1, 1, 2)'s fine cell (1, 2, 3).
    assert corner.words[1, 1, 2] >> (1 * 16 + 2 * 4 + 3) & 1


def test_all_64_bits_of_a_word_survive():
    fine = bake(lambda p: torch.full((len(p),), 1e3), everything(2), STEP)
    assert (fine.words == -1).all()
    assert fine_cells(fine).all()


def test_empty_cells_are_neither_evaluated_nor_set():
    occupied = torch.rand((6, 6, 6), generator=torch.Generator().manual_seed(1)) < 0.2
    asked = []

    def density(points: Tensor) -> Tensor:
        asked.append(points)
        return torch.full((len(points),), 1e3)

    fine = bake(density, occupied, STEP, fineness=2)
    i, j, k = (torch.cat(asked) * 6).long().unbind(-1)
    assert occupied[i, j, k].all()
    assert torch.equal(fine_cells(fine), blown_up(occupied, 2))


def test_a_negative_opacity_keeps_all_fine_cells():
    occupied = torch.rand((6, 6, 6), generator=torch.Generator().manual_seed(1)) < 0.2
    fine = bake(lambda p: torch.zeros(len(p)), occupied, STEP, opacity=-1.0)
    assert torch.equal(fine_cells(fine), blown_up(occupied, 4))


def test_the_threshold_is_the_opacity_of_a_step():
    for opacity, kept in ((0.019, True), (0.021, False)):
        fine = bake(lambda p: torch.ones(len(p)), everything(4), STEP, opacity=opacity)
        assert bool(fine.words.any()) is kept


def test_distances_are_chebyshev_distances():
    occupied = torch.rand((7, 7, 7), generator=torch.Generator().manual_seed(2)) < 0.01
    fine = bake(lambda p: torch.full((len(p),), 1e3), occupied, STEP)
    grid = torch.stack(torch.meshgrid(*[torch.arange(7)] * 3, indexing="ij"), dim=-1).view(-1, 3)
    full = grid[(fine.words != 0).view(-1)]
    expected = (grid[:, None] - full).abs().amax(-1).amin(-1).clamp(max=MAX_JUMP)
    assert 0 < len(full) < 20
    assert torch.equal(fine.distance.view(-1).long(), expected)


def test_an_empty_field_has_maximum_distance():
    fine = bake(ball, torch.zeros((4, 4, 4), dtype=torch.bool), STEP)
    assert (fine.distance == MAX_JUMP).all()


def test_other_finenesses_are_refused():
    with pytest.raises(ConfigError, match="fineness must be 1, 2 or 4, not 3"):
        bake(ball, everything(4), STEP, fineness=3)
