"""The occupancy grid: which cells of the box hold anything, so that rays can skip the others.

Letters: the box is [0, 1]^3, cut into R^3 cells; cell (i, j, k) covers [i, i+1) x [j, j+1) x
[k, k+1) / R and is number (i R + j) R + k. Densities are per side of the box.

Invariants: an occupied cell is a candidate; a cell that is no candidate never becomes occupied.
Source: Instant-NGP (Mueller et al. 2022), appendix E.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightfield.errors import ConfigError

DECAY = 0.95
OPACITY_OF_A_STEP = 0.01
"""A cell counts as occupied when one marching step through it is about this opaque."""


class OccupancyGrid(nn.Module):
    """Cells with a running maximum of their density; at first every cell is occupied.

    All state is in buffers, so a state dict restores it.
    """

    density: Tensor
    candidates: Tensor
    occupied: Tensor

    def __init__(self, resolution: int):
        super().__init__()
        if not 4 <= resolution <= 512:
            raise ConfigError("occupancy resolution must be 4 to 512", where="teacher")
        self.resolution = resolution
        shape = (resolution,) * 3
        self.register_buffer("density", torch.zeros(shape))
        self.register_buffer("candidates", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))

    @torch.no_grad()
    def restrict(self, candidates: Bool[Tensor, "r r r"]) -> None:
        """Exclude all other cells for good."""
        self.candidates &= candidates.to(self.candidates.device)
        self.occupied &= self.candidates
        self.density *= self.candidates

    @torch.no_grad()
    def update(
        self,
        density_at: Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n"]],
        *,
        everywhere: bool,
        step_length: float,
        generator: torch.Generator,
    ) -> None:
        """Look at the field again, at one random point in each chosen cell.

        Args:
            density_at: the field, on points of the box.
            everywhere: look at all candidates; else at a quarter of their number drawn from them and
                as many drawn from the occupied cells.
            step_length: of the marcher, in sides of the box; sets the threshold of occupancy.
            generator: on the grid's device.
        """
        cells = self._chosen_cells(everywhere, generator)
        corner = torch.stack(torch.unravel_index(cells, self.density.shape), dim=-1)
        jitter = torch.rand(corner.shape, generator=generator, device=corner.device)
        seen = density_at((corner + jitter) / self.resolution).to(self.density.dtype)
        density = self.density.mul_(DECAY).view(-1)
        density.scatter_reduce_(0, cells, seen, "amax")
        self.occupied.copy_(self.density > self.threshold(step_length))

    def threshold(self, step_length: float) -> Tensor:
        """The density above which a cell is occupied: at most the mean over cells that hold any."""
        positive = self.density[self.density > 0]
        ceiling = torch.full((), OPACITY_OF_A_STEP / step_length, device=positive.device)
        return torch.minimum(positive.mean(), ceiling) if len(positive) else ceiling

    def _chosen_cells(self, everywhere: bool, generator: torch.Generator) -> Int[Tensor, "n"]:
        candidates = self.candidates.view(-1).nonzero()[:, 0]
        if everywhere:
            return candidates
        occupied = self.occupied.view(-1).nonzero()[:, 0]
        count = max(1, len(candidates) // 4)
        chosen = [
            pool[torch.randint(len(pool), (count,), generator=generator, device=pool.device)]
            for pool in (candidates, occupied)
            if len(pool)
        ]
        return torch.cat(chosen) if chosen else candidates

    def near_occupied(self, cells: int) -> Bool[Tensor, "r r r"]:
        """Cells at most `cells` away, along every axis, from an occupied one."""
        grid = self.occupied[None, None].float()
        for axis in range(3):
            window, padding = [1, 1, 1], [0, 0, 0]
            window[axis], padding[axis] = 2 * cells + 1, cells
            grid = F.max_pool3d(grid, window, stride=1, padding=padding)
        return grid[0, 0] > 0
