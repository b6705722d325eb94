"""Marching: where along its rays a field is asked.

Letters: rays are given in the box's own coordinates, where the box is [0, 1]^3. Sample k of a ray
lies at t = t0 + (k + offset) dt, with t0 where the ray enters the box (or its nearest t) and dt such
that a step is `step_length` sides of the box long. Samples outside occupied cells are left out.

Samples of all rays are packed into one array, ray after ray, near to far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightfield.scenes.scene import Box
from train.occupancy import OccupancyGrid

SEGMENT = 8
"""Steps that are skipped at once where no occupied cell is near."""


@dataclass(frozen=True)
class Samples:
    """Packed samples: ray number and ray parameter of each."""

    ray: Int[Tensor, "m"]
    t: Float[Tensor, "m"]

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: Tensor) -> Samples:
        return Samples(self.ray[index], self.t[index])


def rays_in_box(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], box: Box
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Rays in the box's coordinates; the ray parameter t stays the same."""
    side = 2 * box.half_extent
    corner = torch.tensor(box.centre, device=origins.device) - box.half_extent
    return (origins - corner) / side, directions / side


def box_interval(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], near: float, far: float
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Where rays are inside [0, 1]^3 and [near, far]; not before the start where they never are."""
    inverse = 1 / torch.where(directions == 0, 1e-20, directions)
    a, b = -origins * inverse, (1 - origins) * inverse
    start = torch.minimum(a, b).amax(-1).clamp(min=near)
    return start, torch.maximum(a, b).amin(-1).clamp(max=far)


class Marcher:
    """The marching rule for one state of the occupancy grid."""

    def __init__(self, grid: OccupancyGrid, step_length: float):
        self.resolution = grid.resolution
        self.step_length = step_length
        reach = math.floor(0.5 * (SEGMENT - 1) * step_length * grid.resolution) + 1
        self._occupied = grid.occupied.view(-1)
        self._near = grid.near_occupied(reach).view(-1)

    def steps(self, directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """dt of each ray."""
        return self.step_length / directions.norm(dim=-1)

    @torch.no_grad()
    def march(
        self,
        origins: Float[Tensor, "n 3"],
        directions: Float[Tensor, "n 3"],
        near: float,
        far: float,
        offset: Float[Tensor, "n"] | float = 0.5,
    ) -> Samples:
        """The samples of rays in occupied cells between `near` and `far`.

        `offset`, in [0, 1), shifts a ray's samples by that part of a step.
        """
        start, stop = box_interval(origins, directions, near, far)
        dt = self.steps(directions)
        counts = ((stop - start) / dt - offset).ceil().clamp(min=0)
        hit = counts.nonzero()[:, 0]
        if not len(hit):
            return Samples(hit, start[:0])
        counts = counts[hit, None]
        first = (start + offset * dt)[hit, None]
        dt, start_at, along = dt[hit, None], origins[hit], directions[hit]

        segments = math.ceil(float(counts.max()) / SEGMENT)
        k = torch.arange(segments, device=dt.device) * SEGMENT
        middle = k + 0.5 * (SEGMENT - 1)
        near_any = self._lookup(self._near, start_at, along, first + middle * dt)
        row, segment = (near_any & (k < counts)).nonzero(as_tuple=True)

        k = segment[:, None] * SEGMENT + torch.arange(SEGMENT, device=dt.device)
        t = torch.addcmul(first[row], k.to(dt), dt[row])
        keep = self._lookup(self._occupied, start_at[row], along[row], t) & (k < counts[row])
        row_index, column = keep.nonzero(as_tuple=True)
        return Samples(hit[row[row_index]], t[row_index, column])

    def _lookup(
        self,
        cells: Bool[Tensor, "r3"],
        origins: Float[Tensor, "n 3"],
        directions: Float[Tensor, "n 3"],
        t: Float[Tensor, "n k"],
    ) -> Bool[Tensor, "n k"]:
        """The cell at each point; points that rounding put just outside take the nearest cell."""
        r = self.resolution
        number = torch.zeros((), dtype=torch.int32, device=t.device)
        for axis in range(3):
            along = torch.addcmul(r * origins[:, axis, None], r * directions[:, axis, None], t)
            number = number * r + along.to(torch.int32).clamp_(0, r - 1)
        return cells.index_select(0, number.view(-1)).view(t.shape)
