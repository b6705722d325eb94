"""Fine occupancy grid of a trained field for rendering, baked from the training's occupancy grid.

Letters: R cells of the occupancy grid along a side of the box [0, 1]^3, F fine cells along a side of
each cell. Word (i R + j) R + k holds the fine cells of cell (i, j, k): bit (a F + b) F + c is set if
fine cell (a, b, c) is occupied. `distance` is 0 if the word has any bit, otherwise the Chebyshev
distance, in cells, to the nearest word with a bit: a ray may leave the cube of nearer cells in one jump.

Invariant: a fine cell is occupied only inside an occupied cell, so the samples of a ray in fine cells
are a subset of its samples in the occupancy grid.

The inside of solids stays occupied: rays end before they reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightfield.errors import ConfigError

FINENESSES = (1, 2, 4)
"""Fine cells along a side of a cell; 4^3 fill a word. With 128 cells and a step of sqrt(3)/1024 the
finest cells are 7/6 of a step wide; finer cells would lie between the samples."""
PROBES_PER_SIDE = 2
"""Sample points along each side of a fine cell: as dense as the finest lattice of the hash grid."""
MIN_STEP_OPACITY = 1e-3
"""A fine cell is occupied if a step through it, or through a neighbor, is more opaque than this value:
a tenth of the occupancy grid's threshold, a quarter of a step of an 8-bit image."""
MAX_JUMP = 31
CELLS_AT_ONCE = 1 << 13


@dataclass(frozen=True)
class FineOccupancy:
    """Fine cells packed into words, and the distance to the nearest word that is not empty."""

    words: Int[Tensor, "r r r"]
    distance: UInt8[Tensor, "r r r"]
    fineness: int

    @property
    def resolution(self) -> int:
        """Words along a side of the box."""
        return len(self.words)


@torch.no_grad()
def bake(
    density_at: Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n"]],
    occupied: Bool[Tensor, "r r r"],
    step_length: float,
    *,
    fineness: int = 4,
    opacity: float = MIN_STEP_OPACITY,
) -> FineOccupancy:
    """Evaluate a field's density inside the occupied cells and find the occupied fine cells.

    A fine cell is empty if the optical thickness of a step through it and through each of its 26
    neighbors is at most `opacity`; a negative `opacity` keeps all fine cells.

    Raises:
        ConfigError: unless `fineness` is 1, 2 or 4.
    """
    if fineness not in FINENESSES:
        raise ConfigError(f"fineness must be 1, 2 or 4, not {fineness}", where="fine occupancy")
    resolution = len(occupied)
    cells = occupied.reshape(-1).nonzero()[:, 0]
    blocks = torch.zeros((resolution**3, fineness**3), dtype=torch.bool, device=occupied.device)
    inside = _lattice_in_a_cell(fineness, occupied.device)
    for start in range(0, len(cells), CELLS_AT_ONCE):
        some = cells[start : start + CELLS_AT_ONCE]
        corner = torch.stack(torch.unravel_index(some, occupied.shape), dim=-1)
        points = (corner[:, None] + inside) / resolution
        density = density_at(points.view(-1, 3)).view(len(some), fineness**3, -1)
        blocks[some] = density.amax(-1) * step_length > opacity
    blocks = _dilated(blocks, resolution, fineness)[cells]
    shifts = torch.arange(fineness**3, device=occupied.device)
    words = torch.zeros(resolution**3, dtype=torch.int64, device=occupied.device)
    # The 64th shift reaches the sign bit, which is used like the other bits.
    words[cells] = (blocks.long() << shifts).sum(-1)
    words = words.view(occupied.shape)
    return FineOccupancy(words, _distance_to(words != 0), fineness)


def fine_cells(fine: FineOccupancy) -> Bool[Tensor, "rf rf rf"]:
    """The fine cells unpacked to a boolean grid."""
    shifts = torch.arange(fine.fineness**3, device=fine.words.device)
    blocks = (fine.words.view(-1, 1) >> shifts & 1).bool()
    return _unfolded(blocks, fine.resolution, fine.fineness)


def _lattice_in_a_cell(fineness: int, device: torch.device) -> Float[Tensor, "p 3"]:
    """Sample points in a cell of side 1, grouped by fine cell in the order of the bits."""
    q = PROBES_PER_SIDE
    along = ((torch.arange(fineness * q, device=device) + 0.5) / (fineness * q)).view(fineness, q)
    grid = torch.stack(
        torch.broadcast_tensors(
            along[:, None, None, :, None, None],
            along[None, :, None, None, :, None],
            along[None, None, :, None, None, :],
        ),
        dim=-1,
    )
    return grid.reshape(-1, 3)


def _unfolded(blocks: Tensor, resolution: int, fineness: int) -> Tensor:
    r, f = resolution, fineness
    return blocks.view(r, r, r, f, f, f).permute(0, 3, 1, 4, 2, 5).reshape(r * f, r * f, r * f)


def _dilated(blocks: Tensor, resolution: int, fineness: int) -> Tensor:
    """Blocks in which the 26 neighbors of each set fine cell are set too."""
    r, f = resolution, fineness
    cells = _unfolded(blocks, r, f)
    for axis in range(3):
        before = cells.clone()
        size = r * f - 1
        cells.narrow(axis, 1, size).logical_or_(before.narrow(axis, 0, size))
        cells.narrow(axis, 0, size).logical_or_(before.narrow(axis, 1, size))
    return cells.view(r, f, r, f, r, f).permute(0, 2, 4, 1, 3, 5).reshape(r**3, f**3)


def _distance_to(full: Bool[Tensor, "r r r"]) -> UInt8[Tensor, "r r r"]:
    """Chebyshev distance to the nearest cell that is `full`, at most `MAX_JUMP`."""
    distance = torch.full_like(full, MAX_JUMP, dtype=torch.uint8)
    distance[full] = 0
    reached = full[None, None].float()
    for step in range(1, MAX_JUMP):
        for axis in range(3):
            window, padding = [1, 1, 1], [0, 0, 0]
            window[axis], padding[axis] = 3, 1
            reached = F.max_pool3d(reached, window, stride=1, padding=padding)
        distance.masked_fill_((reached[0, 0] > 0) & (distance == MAX_JUMP), step)
    return distance
