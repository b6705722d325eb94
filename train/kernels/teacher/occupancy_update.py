"""Update of the occupancy grid on the GPU, without synchronization.

The update does what its twin, `train.occupancy.OccupancyGrid.update`, does, on the same grid and with
the same number of points: all candidate cells, or a quarter of their number drawn from the candidates
and as many drawn from the occupied cells. The candidates must be final.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from train.kernels.teacher.philox import UPPER_HALF, stream_of, unit
from train.kernels.teacher.training_rays import MarchingGrid
from train.occupancy import DECAY, OccupancyGrid

BLOCK = 256


class OccupancyUpdate:
    """Update of an occupancy grid and its bits from the present density of the field.

    `density_at(points [3, n], out [n])` writes the field's density at points.
    """

    def __init__(
        self,
        grid: OccupancyGrid,
        bits: MarchingGrid,
        density_at: Callable[[Float[Tensor, "3 n"], Float[Tensor, "n"]], None],
        seed: int,
    ):
        self.grid, self.bits, self.density_at, self.seed = grid, bits, density_at, seed
        self.candidates = grid.candidates.view(-1).nonzero()[:, 0]
        count, device = len(self.candidates), grid.density.device
        self._random = torch.empty((4, max(count, 1)), device=device)
        self._points = torch.empty((3, max(count, 1)), device=device)
        self._seen = torch.empty(max(count, 1), device=device)
        bits.fill(grid.occupied)

    def __call__(self, step: Int32[Tensor, "1"], *, everywhere: bool) -> None:
        """Update the grid before step number `step`, which determines all draws."""
        if not len(self.candidates):
            return
        uniform(self._random, self.seed, step)
        cells = self.candidates if everywhere else self._drawn()
        self._evaluate(cells)
        grid = self.grid
        density = grid.density.mul_(DECAY).view(-1)
        density.scatter_reduce_(0, cells, self._seen[: len(cells)], "amax")
        grid.occupied.copy_(grid.density > self._threshold())
        self.bits.fill(grid.occupied)

    def _drawn(self) -> Int64[Tensor, "n"]:
        """Random cells: a quarter of the candidates' number from all, and as many from the occupied."""
        count = len(self.candidates)
        quarter = -(-count // 4)
        choice = self._random[3]
        anywhere = (choice[:quarter] * count).long().clamp_(max=count - 1)
        occupied = self.grid.occupied.view(-1)[self.candidates].cumsum(0)
        # In an empty grid this always draws the last candidate, which is harmless.
        rank = (choice[count - quarter :] * occupied[-1]).long() + 1
        among = torch.searchsorted(occupied, rank).clamp_(max=count - 1)
        return self.candidates[torch.cat([anywhere, among])]

    def _evaluate(self, cells: Int64[Tensor, "n"]) -> None:
        """Evaluate the field at a random point of each cell."""
        r, n = self.grid.resolution, len(cells)
        for axis, along in enumerate((cells // (r * r), cells // r % r, cells % r)):
            torch.add(along, self._random[axis, :n], out=self._points[axis, :n]).div_(r)
        points = self._points[:, :n]
        self.density_at(points if points.is_contiguous() else points.contiguous(), self._seen[:n])

    def _threshold(self) -> Float[Tensor, ""]:
        """Same as `OccupancyGrid.threshold`, without synchronization."""
        density = self.grid.density
        mean = density.sum() / density.count_nonzero()  # NaN when all are zero
        return torch.where(mean < self.grid.ceiling(), mean, self.grid.ceiling())


def uniform(out: Float[Tensor, "4 n"], seed: int, step: Int32[Tensor, "1"]) -> None:
    """Random numbers in [0, 1), a function of the seed, the step and their index."""
    n = out.shape[1]
    _uniform[(triton.cdiv(n, BLOCK),)](out, n, seed, step, BLOCK=BLOCK)


@triton.jit
def _uniform(out, n, seed, step, BLOCK: tl.constexpr):
    """Uniform random numbers out [4, n]; a program writes BLOCK columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    a, b, c, d = tl.randint4x(stream_of(seed, step) + UPPER_HALF, index)
    tl.store(out + index, unit(a), mask=mask)
    tl.store(out + n + index, unit(b), mask=mask)
    tl.store(out + 2 * n + index, unit(c), mask=mask)
    tl.store(out + 3 * n + index, unit(d), mask=mask)
