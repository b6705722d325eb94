"""Visual hull on a grid: the cells of a box that the training images do not rule out.

Letters as in `train.occupancy`. A cell is tested in an image by the bounding rectangle of its eight
projected corners. This rectangle contains the projection of the cell and the rectangles of its
sub-cells. Therefore the test never rules out a visible cell, and the sub-cells of a coarse cell
that is ruled out need no test.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace
from lightfield.scenes.scene import Box, Views

NEAREST_TO_CAMERA = 0.01
"""Least distance of an occupied cell's center from a camera, in sides of the box."""
COARSE = 32
"""Largest resolution of the first grid, whose cells are all tested."""


@torch.no_grad()
def candidate_cells(
    views: Views,
    intrinsics: Intrinsics,
    space: RaySpace,
    box: Box,
    resolution: int,
    *,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, "r r r"]:
    """The cells that can be occupied.

    A candidate cell is visible to a camera, contains no camera, and is empty according to no
    silhouette (`views.alpha`).
    """
    r = resolution
    while r > COARSE and r % 2 == 0:
        r //= 2
    octants = torch.cartesian_prod(*[torch.arange(2, device=device)] * 3)
    cells = torch.cartesian_prod(*[torch.arange(r, device=device)] * 3)
    cells = _kept(cells, r, views, intrinsics, space, box)
    while r < resolution:
        r *= 2
        cells = (2 * cells[:, None] + octants).view(-1, 3)
        cells = _kept(cells, r, views, intrinsics, space, box)
    if space.kind == "world":
        cells = cells[~_contains_camera(cells, r, views, box)]
    candidates = torch.zeros((r, r, r), dtype=torch.bool, device=device)
    candidates[cells.unbind(-1)] = True
    return candidates


def _kept(
    cells: Int[Tensor, "n 3"],
    resolution: int,
    views: Views,
    intrinsics: Intrinsics,
    space: RaySpace,
    box: Box,
) -> Int[Tensor, "k 3"]:
    """The cells that are visible in an image and ruled out by no silhouette."""
    points, corners = _corners(cells, resolution, space, box)
    seen = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
    size = torch.tensor([intrinsics.width, intrinsics.height], device=cells.device)
    for index, pose in enumerate(torch.from_numpy(np.array(views.poses)).to(cells.device)):
        low, high = _bounding_rectangles(points, corners, pose, intrinsics)
        seen |= ((high > 0) & (low < size)).all(-1)
        if views.alpha is not None:
            alpha = torch.from_numpy(np.array(views.alpha[index])).to(cells.device)
            inside = ((low >= 0) & (high <= size)).all(-1)
            kept = ~inside | _any_coverage(alpha, low, high)
            cells, corners, seen = cells[kept], corners[kept], seen[kept]
    return cells[seen]


def _corners(
    cells: Int[Tensor, "n 3"], resolution: int, space: RaySpace, box: Box
) -> tuple[Float[Tensor, "p 4"], Int[Tensor, "n 8"]]:
    """The distinct corners of the cells in the world, and the indices of each cell's eight corners.

    Points are homogeneous, with a weight of 0 or more.
    """
    octants = torch.cartesian_prod(*[torch.arange(2, device=cells.device)] * 3)
    side = resolution + 1
    i, j, k = (cells[:, None] + octants).unbind(-1)
    numbers, corners = torch.unique((i * side + j) * side + k, return_inverse=True)
    lattice = torch.stack(torch.unravel_index(numbers, (side, side, side)), -1) / resolution
    center = torch.tensor(box.center, device=cells.device)
    x, y, z = (center + (2 * lattice - 1) * box.half_extent).unbind(-1)
    if space.kind == "world":
        return torch.stack([x, y, z, torch.ones_like(x)], -1), corners
    # The inverse of rays_in_space: z_world = 2 n / (z - 1), infinite (weight 0) on the far plane.
    sx, sy = space.ndc_scale
    weight = (1 - z).clamp(min=0) / (2 * space.ndc_near)
    return torch.stack([x / sx, y / sy, -torch.ones_like(x), weight], -1), corners


def _bounding_rectangles(
    points: Float[Tensor, "p 4"],
    corners: Int[Tensor, "n 8"],
    pose: Float[Tensor, "3 4"],
    intrinsics: Intrinsics,
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"]]:
    """The lowest and highest (u, v) of each cell's bounding rectangle in an image.

    The rectangle is unbounded when a part of the cell is behind the camera, and empty when the
    whole cell is behind the camera.
    """
    local = (points[:, :3] - points[:, 3:] * pose[:, 3]) @ pose[:, :3]
    depth = -local[:, 2]
    behind = depth <= 1e-6
    x, y = (local[:, :2] / depth.clamp(min=1e-6)[:, None]).unbind(-1)
    lows, highs = [], []
    for pixel in _pixels(x, -y, intrinsics):
        # aminmax propagates NaN, so a cell with a corner behind the camera has no bounds.
        low, high = torch.where(behind, torch.nan, pixel)[corners].aminmax(dim=-1)
        lows.append(low.nan_to_num(nan=-torch.inf))
        highs.append(high.nan_to_num(nan=torch.inf))
    lost = behind[corners].all(-1)[:, None]
    return torch.stack(lows, -1), torch.stack(highs, -1).masked_fill(lost, -torch.inf)


def _pixels(x: Tensor, y: Tensor, intrinsics: Intrinsics) -> tuple[Tensor, Tensor]:
    """Pixel coordinates of image-plane points (y down), with OpenCV's distortion model."""
    if any(intrinsics.distortion):
        k1, k2, p1, p2 = intrinsics.distortion
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + k2 * r2)
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        )
    return intrinsics.cx + intrinsics.fx * x, intrinsics.cy + intrinsics.fy * y


def _any_coverage(
    alpha: UInt8[Tensor, "h w"], low: Float[Tensor, "n 2"], high: Float[Tensor, "n 2"]
) -> Bool[Tensor, "n"]:
    """Whether any pixel in each rectangle has coverage, computed with a summed-area table."""
    height, width = alpha.shape
    table = torch.zeros((height + 1, width + 1), dtype=torch.int32, device=alpha.device)
    table[1:, 1:] = (alpha > 0).to(torch.int32).cumsum(0).cumsum(1)
    size = torch.tensor([width, height], device=alpha.device)
    u0, v0 = low.clamp(min=0).minimum(size).long().unbind(-1)
    u1, v1 = high.clamp(min=0).minimum(size).ceil().long().unbind(-1)
    return table[v1, u1] - table[v0, u1] - table[v1, u0] + table[v0, u0] > 0


def _contains_camera(
    cells: Int[Tensor, "n 3"], resolution: int, views: Views, box: Box
) -> Bool[Tensor, "n"]:
    center = torch.tensor(box.center, device=cells.device)
    cameras = torch.from_numpy(np.array(views.poses[:, :, 3])).to(cells.device)
    cameras = (cameras - center) / (2 * box.half_extent) + 0.5
    middle = (cells + 0.5) / resolution
    inside = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
    for camera in cameras:
        inside |= (middle - camera).square().sum(-1) < NEAREST_TO_CAMERA**2
    return inside
