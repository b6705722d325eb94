"""What the training pictures rule out before training: cells unseen, or seen to be empty.

Letters as in `train.occupancy`; a cell's outline in a picture is the bounding rectangle of its eight
projected corners, which contains the cell's true outline, so nothing visible is ever ruled out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace
from lightfield.scenes.scene import Box, Views

NEAREST_TO_CAMERA = 0.01
"""Cells whose centre is nearer to a camera than this, in sides of the box, cannot be occupied."""


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
    """Cells that some camera sees, none is in, and no silhouette (`views.alpha`) shows as empty."""
    corners = _lattice(box, space, resolution, device)
    seen = torch.zeros((resolution,) * 3, dtype=torch.bool, device=device)
    empty = torch.zeros_like(seen)
    for index, pose in enumerate(torch.from_numpy(views.poses).to(device)):
        low, high = _outlines(corners, pose, intrinsics)
        size = torch.tensor([intrinsics.width, intrinsics.height], device=device)
        seen |= ((high > 0) & (low < size)).all(-1)
        if views.alpha is not None:
            inside = ((low >= 0) & (high <= size)).all(-1)
            covered = _any_coverage(torch.from_numpy(np.array(views.alpha[index])), low, high)
            empty |= inside & ~covered
        if space.kind == "world":
            empty |= _near(pose[:, 3], box, resolution)
    return seen & ~empty


def _lattice(
    box: Box, space: RaySpace, resolution: int, device: torch.device | str
) -> Float[Tensor, "s s s 4"]:
    """The cells' corners in the world, as homogeneous coordinates with a weight of 0 or more."""
    axis = torch.linspace(-1, 1, resolution + 1, device=device) * box.half_extent
    x, y, z = torch.meshgrid(*(axis + centre for centre in box.centre), indexing="ij")
    if space.kind == "world":
        return torch.stack([x, y, z, torch.ones_like(x)], -1)
    # The inverse of rays_in_space: z_world = 2 n / (z - 1), infinite (weight 0) on the far plane.
    sx, sy = space.ndc_scale
    weight = (1 - z).clamp(min=0) / (2 * space.ndc_near)
    return torch.stack([x / sx, y / sy, -torch.ones_like(x), weight], -1)


def _outlines(
    corners: Float[Tensor, "s s s 4"], pose: Float[Tensor, "3 4"], intrinsics: Intrinsics
) -> tuple[Float[Tensor, "r r r 2"], Float[Tensor, "r r r 2"]]:
    """Low and high (u, v) of each cell's outline; unbounded for cells that reach behind the camera,
    empty for those that lie behind it altogether."""
    rotation, centre = pose[:, :3], pose[:, 3]
    local = (corners[..., :3] - corners[..., 3:] * centre) @ rotation
    depth = -local[..., 2]
    behind = depth <= 1e-6
    safe = depth.clamp(min=1e-6)
    u, v = _pixels(local[..., 0] / safe, -local[..., 1] / safe, intrinsics)
    uv = torch.stack([u, v])
    high = _largest_of_corners(torch.where(behind, torch.inf, uv))
    low = -_largest_of_corners(torch.where(behind, torch.inf, -uv))
    lost = -_largest_of_corners(-behind.float()[None])[0] > 0
    high = torch.where(lost, -torch.inf, high)
    return low.movedim(0, -1), high.movedim(0, -1)


def _largest_of_corners(lattice: Float[Tensor, "c s s s"]) -> Float[Tensor, "c r r r"]:
    return F.max_pool3d(lattice[None], 2, stride=1)[0]


def _pixels(x: Tensor, y: Tensor, intrinsics: Intrinsics) -> tuple[Tensor, Tensor]:
    """Pixel coordinates of image-plane points (y down), through OpenCV's lens model."""
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
    alpha: UInt8[Tensor, "h w"], low: Float[Tensor, "*cells 2"], high: Float[Tensor, "*cells 2"]
) -> Bool[Tensor, "*cells"]:
    """Whether any pixel that a rectangle touches has coverage, from a summed-area table."""
    height, width = alpha.shape
    table = torch.zeros((height + 1, width + 1), dtype=torch.int32, device=low.device)
    table[1:, 1:] = (alpha > 0).to(table).cumsum(0).cumsum(1)
    u0, v0 = low[..., 0].clamp(0, width).long(), low[..., 1].clamp(0, height).long()
    u1 = high[..., 0].clamp(0, width).ceil().long()
    v1 = high[..., 1].clamp(0, height).ceil().long()

    def at(v: Tensor, u: Tensor) -> Tensor:
        return table.view(-1)[v * (width + 1) + u]

    return at(v1, u1) - at(v0, u1) - at(v1, u0) + at(v0, u0) > 0


def _near(centre: Float[Tensor, "3"], box: Box, resolution: int) -> Bool[Tensor, "r r r"]:
    side = 2 * box.half_extent
    axis = (torch.arange(resolution, device=centre.device) + 0.5) / resolution - 0.5
    offset = [
        (axis + (box.centre[i] - float(centre[i])) / side).square().view(shape)
        for i, shape in enumerate(((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    ]
    return offset[0] + offset[1] + offset[2] < NEAREST_TO_CAMERA**2
