"""Ray marching: samples of rays in the occupied cells of the box.

Letters: rays are in the box's coordinates, in which the box is [0, 1]^3; lengths are in sides of the
box. Sample k of a ray lies at t = t0 + (k + offset) dt. The ray enters the box at t0, or starts there at
the near bound, and dt is one step length of the grid. Samples outside occupied cells are skipped.

The samples of all rays are packed into one array, ray after ray, near to far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightfield.scenes.scene import Box
from train.occupancy import SEGMENT, OccupancyGrid


@dataclass(frozen=True)
class Samples:
    """Packed samples: the ray index of each sample, in ascending order, and its ray parameter."""

    ray: Int[Tensor, "m"]
    t: Float[Tensor, "m"]

    def __len__(self) -> int:
        return len(self.t)


def rays_in_box(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], box: Box
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Rays in the box's coordinates; ray parameters do not change."""
    side = 2 * box.half_extent
    corner = torch.tensor(box.center, device=origins.device) - box.half_extent
    return (origins - corner) / side, directions / side


def box_interval(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], near: float, far: float
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Interval of t in which rays are inside [0, 1]^3 and [near, far]; start >= stop if it is empty."""
    inverse = 1 / torch.where(directions == 0, 1e-20, directions)
    a, b = -origins * inverse, (1 - origins) * inverse
    start = torch.minimum(a, b).amax(-1).clamp(min=near)
    return start, torch.maximum(a, b).amin(-1).clamp(max=far)


@torch.no_grad()
def march(
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    grid: OccupancyGrid,
    near: float,
    far: float,
    offset: Float[Tensor, "n"] | float = 0.5,
) -> Samples:
    """The samples of rays in occupied cells between `near` and `far`.

    `offset`, in [0, 1), shifts all samples of a ray by a fraction of a step. Whole segments of steps are
    skipped first if their middle is too far from any occupied cell; no sample is lost.
    """
    start, stop = box_interval(origins, directions, near, far)
    dt = grid.step_length / directions.norm(dim=-1)
    counts = ((stop - start) / dt - offset).ceil()
    hit = (counts > 0).nonzero()[:, 0]
    if not len(hit):
        return Samples(hit, start[:0])
    first = (start + offset * dt)[hit, None]
    counts, dt = counts[hit, None], dt[hit, None]
    origins, directions = origins[hit], directions[hit]

    segments = math.ceil(float(counts.max()) / SEGMENT)
    k = torch.arange(segments, device=dt.device) * SEGMENT
    middle = first + (k + 0.5 * (SEGMENT - 1)) * dt
    promising = cells_at(grid.near, origins, directions, middle) & (k < counts)
    row, segment = promising.nonzero(as_tuple=True)

    k = segment[:, None] * SEGMENT + torch.arange(SEGMENT, device=dt.device)
    t = first[row] + k * dt[row]
    keep = cells_at(grid.occupied, origins[row], directions[row], t) & (k < counts[row])
    kept, column = keep.nonzero(as_tuple=True)
    return Samples(hit[row[kept]], t[kept, column])


def cells_at(
    cells: Bool[Tensor, "r r r"],
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    t: Float[Tensor, "n k"],
) -> Bool[Tensor, "n k"]:
    """Values of the cells at points of rays; points outside the box take the nearest cell."""
    r = len(cells)
    number = torch.zeros((), dtype=torch.int32, device=t.device)
    for axis in range(3):
        along = torch.addcmul(r * origins[:, axis, None], r * directions[:, axis, None], t)
        number = number * r + along.clamp_(0, r - 1).to(torch.int32)
    return cells.view(-1).index_select(0, number.view(-1)).view(t.shape)
