"""Occupancy grid: the cells of the box that are not empty; marching skips the empty ones.

Letters: the box is [0, 1]^3 and has R^3 cells; cell (i, j, k) covers [i, i+1) x [j, j+1) x [k, k+1) / R
and has index (i R + j) R + k. Lengths and densities are per side of the box.

Invariant: only candidate cells are or become occupied.
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
STEP_OPACITY = 0.01
"""Opacity of one marching step from which a cell counts as occupied."""
SEGMENT = 8
"""Number of marching steps that are skipped at once if no occupied cell is near."""


class OccupancyGrid(nn.Module):
    """Cells with a decaying maximum of their density. At first every cell is occupied.

    The state dict holds the whole state. `near` is derived from it: the cells within half a segment of
    marching steps, each of `step_length`, from an occupied cell.
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
        """Remove all other cells from the candidates permanently."""
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
        """Evaluate the field at one random point in each of some cells.

        Args:
            density_at: density of the field at points of the box.
            everywhere: evaluate all candidates. Otherwise draw cells at random: a quarter of the number
                of candidates from the candidates, and as many from the occupied cells.
            generator: random generator on the grid's device.
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
        """Density above which a cell is occupied: the mean over positive cells, at most `ceiling`."""
        ceiling = torch.full((), self.ceiling(), device=self.density.device)
        positive = self.density[self.density > 0]
        return torch.minimum(positive.mean(), ceiling) if len(positive) else ceiling

    def ceiling(self) -> float:
        """Density at which the opacity of one marching step is about `STEP_OPACITY`."""
        return STEP_OPACITY / self.step_length

    def derive_near(self) -> None:
        """Compute `near` from `occupied`."""
        # Largest distance in cells, on each axis, of a segment's samples from its middle.
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
