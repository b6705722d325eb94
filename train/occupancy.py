"""The occupancy grid: which cells of the box hold anything, so that rays can skip the others.

Letters: the box is [0, 1]^3, cut into R^3 cells; cell (i, j, k) covers [i, i+1) x [j, j+1) x
[k, k+1) / R and is number (i R + j) R + k. Lengths and densities are per side of the box.

Invariants: an occupied cell is a candidate; a cell that is no candidate never becomes occupied.
Source: Instant-NGP (Mueller et al. 2022), appendix E.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

DECAY = 0.95
OPACITY_OF_A_STEP = 0.01
"""A cell counts as occupied when one marching step through it is about this opaque."""
SEGMENT = 8
"""Marching steps that are skipped at once where no occupied cell is near."""


class OccupancyGrid(nn.Module):
    """Cells with a running maximum of their density; at first every cell is occupied.

    The state dict holds all state; `near` is derived from it: cells within half a segment of
    marching, `step_length` a step, of an occupied one.
    """

    density: Tensor
    candidates: Tensor
    occupied: Tensor
    near: Tensor

    def __init__(self, resolution: int, step_length: float):
        super().__init__()
        self.resolution, self.step_length = resolution, step_length
        shape = (resolution,) * 3
        self.register_buffer("density", torch.zeros(shape))
        self.register_buffer("candidates", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("near", torch.ones(shape, dtype=torch.bool), persistent=False)
        self.register_load_state_dict_post_hook(lambda grid, _: grid.derive_near())

    @torch.no_grad()
    def restrict(self, candidates: Bool[Tensor, "r r r"]) -> None:
        """Exclude all other cells for good."""
        self.candidates &= candidates
        self.occupied &= candidates
        self.density *= candidates
        self.derive_near()

    @torch.no_grad()
    def update(
        self,
        density_at: Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n"]],
        *,
        everywhere: bool,
        generator: torch.Generator,
    ) -> None:
        """Look at the field again, at one random point in each chosen cell.

        Args:
            density_at: the field, on points of the box.
            everywhere: look at all candidates; else at a quarter of their number drawn from them, and
                as many drawn from the occupied cells.
            generator: on the grid's device.
        """
        cells = self._chosen_cells(everywhere, generator)
        corner = torch.stack(torch.unravel_index(cells, self.density.shape), dim=-1)
        jitter = torch.rand(corner.shape, generator=generator, device=corner.device)
        seen = density_at((corner + jitter) / self.resolution)
        density = self.density.mul_(DECAY).view(-1)
        density.scatter_reduce_(0, cells, seen, "amax")
        self.occupied.copy_(self.density > self.threshold())
        self.derive_near()

    def threshold(self) -> Float[Tensor, ""]:
        """The density above which a cell is occupied: at most the mean over cells that hold any."""
        ceiling = torch.full((), self.ceiling(), device=self.density.device)
        positive = self.density[self.density > 0]
        return torch.minimum(positive.mean(), ceiling) if len(positive) else ceiling

    def ceiling(self) -> float:
        """The density at which one marching step is about as opaque as counts."""
        return OPACITY_OF_A_STEP / self.step_length

    def derive_near(self) -> None:
        """Bring `near` up to date with `occupied`."""
        # A sample of a segment is at most this many cells away, on every axis, from its middle.
        reach = math.floor(0.5 * (SEGMENT - 1) * self.step_length * self.resolution) + 1
        grid = self.occupied[None, None].float()
        for axis in range(3):
            window, padding = [1, 1, 1], [0, 0, 0]
            window[axis], padding[axis] = 2 * reach + 1, reach
            grid = F.max_pool3d(grid, window, stride=1, padding=padding)
        self.near.copy_(grid[0, 0] > 0)

    def _chosen_cells(self, everywhere: bool, generator: torch.Generator) -> Int[Tensor, "n"]:
        candidates = self.candidates.view(-1).nonzero()[:, 0]
        if everywhere:
            return candidates
        occupied = self.occupied.view(-1).nonzero()[:, 0]
        count = -(-len(candidates) // 4)
        pools = [pool for pool in (candidates, occupied) if len(pool)]
        drawn = [
            pool[torch.randint(len(pool), (count,), generator=generator, device=pool.device)]
            for pool in pools
        ]
        return torch.cat([candidates[:0], *drawn])
