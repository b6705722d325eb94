"""Depth range of a scene: near and far, fitted to the occupied cells of its teacher.

A student's points lie between the ray space's near and far. The range of a loaded scene is wide; a range
that fits the object closely gives denser points.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from lightfield.rays import RaySpace
from train.teacher import Teacher

CELLS_AT_ONCE = 1 << 14
MARGIN = 0.01
"""Margin on both sides as a fraction of the range, because the occupancy grid lags behind the field."""


@torch.no_grad()
def occupied_space(
    teacher: Teacher, space: RaySpace, poses: Float[np.ndarray, "n 3 4"]
) -> RaySpace:
    """`space` with near and far moved to the depth range of the occupied cells over all poses.

    A ray's parameter is its depth along the optical axis, so the range of a pose's depths is valid for
    all rays of its image. NDC spaces are not changed, because they end at infinity.
    """
    grid, box = teacher.occupancy, teacher.box
    cells = grid.occupied.nonzero()
    if space.kind != "world" or not len(cells):
        return space
    side = 2 * box.half_extent
    corner = torch.tensor(box.center, device=cells.device) - box.half_extent
    pose = torch.from_numpy(np.ascontiguousarray(poses)).to(cells.device)
    back = pose[:, :, 2]
    nearest, farthest = torch.inf, -torch.inf
    for some in cells.split(CELLS_AT_ONCE):
        points = corner + (some + 0.5) * (side / grid.resolution)
        depth = (back * pose[:, :, 3]).sum(-1) - points @ back.T
        nearest, farthest = min(nearest, float(depth.min())), max(farthest, float(depth.max()))
    margin = 0.5 * 3**0.5 * side / grid.resolution + MARGIN * (farthest - nearest)
    near, far = max(space.near, nearest - margin), min(space.far, farthest + margin)
    return replace(space, near=near, far=far) if near < far else space
