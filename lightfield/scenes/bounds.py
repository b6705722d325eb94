"""Scene bounds: the box of the field, near and far along the rays, and normalized coordinates.

Poses are camera-to-world, looking along -z, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float

from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError, SceneError
from lightfield.rays import RaySpace, camera_directions, rays_in_space
from lightfield.scenes.region import (
    Region,
    depths_of,
    fitted_region,
    initial_region,
    missed_fraction,
)
from lightfield.scenes.scene import Box, Views
from lightfield.transform import SceneTransform, Vector

OBJECT_RULE = (
    "center: point nearest to the rays through the middles of the foreground rectangles; half "
    "extent: extent of the foreground rectangles at the depth of the center, then the visual hull "
    "of the silhouettes or foreground rectangles, or grown until at most 1 % of the foreground "
    "rays miss the box; near and far: depths of the box in the training views"
)
NDC_BOX_RULE = "1.1 x the farthest corner of the training frusta in NDC"
NDC_MARGIN = 1.1
"""Enlargement of the box in NDC. Poses of pseudo images are drawn from slightly beyond the range of
the training poses."""

FARTHEST_RATIO = 1000.0
"""Largest distance of a camera from the center, in median distances."""
NEAREST_FRACTION = 0.05
"""Least near depth, as a fraction of the center's least depth. It applies to cameras inside the
box."""
STANDARD_HALF_EXTENT = 4 / 3
"""Half extent of a normalized box, which is that of the usual box of the NeRF synthetic scenes."""
STANDARD_RANGE = (0.8, 2.0)
"""Half extents with which a box around the origin keeps its coordinates. Published students of the
NeRF synthetic scenes need the original units of these scenes."""


@dataclass(frozen=True)
class BoundsChoice:
    """Bounds that the user sets, in the source's coordinates.

    A bound that is None is determined from the images.
    """

    box: float | None = None
    """Half of the box's side."""
    center: Vector | None = None
    """Center of the box."""
    near: float | None = None
    """Depth along the optical axis at which rays begin."""
    far: float | None = None
    """Depth along the optical axis at which rays end."""


@dataclass(frozen=True)
class ObjectBounds:
    """Bounds of an object's field in scene coordinates, and the transform to scene coordinates."""

    transform: SceneTransform
    space: RaySpace
    box: Box
    missed_fraction: float
    """Fraction of the foreground rays of the training views that miss the box."""


def object_bounds(
    views: Views,
    poses: Float[np.ndarray, "n 3 4"],
    intrinsics: Intrinsics,
    foreground: Bool[np.ndarray, "n h w"],
    choice: BoundsChoice,
    *,
    keep_units: bool,
    where: object,
) -> ObjectBounds:
    """Bounds of an object that cameras surround, determined from the training views.

    Args:
        views: images and silhouettes; the poses in `views` are not used.
        poses: poses of the views in the source's coordinates (float64).
        intrinsics: the camera of the images.
        foreground: the foreground pixels (`background.foreground_pixels`).
        choice: bounds that the user set.
        keep_units: keep the source's coordinates.
        where: the file that errors name.

    Raises:
        SceneError: when all cameras have the same position or do not look at a common point in
            front of them, or when the silhouettes have no common volume.
        ConfigError: when the chosen near depth is not less than the far depth.
    """
    directions = camera_directions(intrinsics).numpy().astype(np.float64)
    region = _chosen(initial_region(poses, directions, foreground, where=where), choice)
    if choice.box is None:
        placed = replace(views, poses=poses)
        region = _chosen(
            fitted_region(region, placed, intrinsics, directions, foreground, where), choice
        )
    transform = SceneTransform() if keep_units else _normalizing(region)
    near, far = _depth_range(region, poses, choice, where=where)
    return ObjectBounds(
        transform,
        RaySpace("world", near / transform.unit, far / transform.unit),
        Box(transform.point_to_scene(_vector(region.center)), region.half_extent / transform.unit),
        missed_fraction(region, poses, directions, foreground),
    )


def _chosen(region: Region, choice: BoundsChoice) -> Region:
    if choice.center is not None:
        region = replace(region, center=np.array(choice.center))
    return region if choice.box is None else replace(region, half_extent=choice.box)


def _vector(values: Float[np.ndarray, "3"]) -> Vector:
    x, y, z = values.tolist()
    return x, y, z


def _depth_range(
    region: Region, poses: Float[np.ndarray, "n 3 4"], choice: BoundsChoice, *, where: object
) -> tuple[float, float]:
    """Nearest and farthest depth of the box along the optical axes, in the source's units."""
    depths = depths_of(region.center, poses)
    support = region.half_extent * np.abs(poses[:, :, 2]).sum(-1)
    in_front = (depths > 0) & (depths <= FARTHEST_RATIO * np.median(np.abs(depths)))
    if not in_front.any():
        raise SceneError(
            "no camera looks towards the center of the box",
            where=str(where),
            remedy="set --center to a point in front of the cameras, in the units of the poses",
        )
    least = float(depths[in_front].min())
    near = max(float((depths - support)[in_front].min()), NEAREST_FRACTION * least)
    far = float((depths + support)[in_front].max())
    near = near if choice.near is None else choice.near
    far = far if choice.far is None else choice.far
    if not near < far:
        raise ConfigError(
            f"near {near:g} is not less than far {far:g}",
            where="scene.near",
            remedy="give both depths in the units of the poses",
        )
    return near, far


def _normalizing(region: Region) -> SceneTransform:
    """The transform that moves the region to the origin and gives it the standard size.

    A region that already has a standard size around the origin gets the identity.
    """
    low, high = STANDARD_RANGE
    centered = np.abs(region.center).max() <= 0.5 * region.half_extent
    if centered and low <= region.half_extent <= high:
        return SceneTransform()
    return SceneTransform.of(region.center, region.half_extent / STANDARD_HALF_EXTENT)


def forward_bounds(
    poses: Float[np.ndarray, "n 3 4"], intrinsics: Intrinsics, ndc_near: float, *, where: object
) -> tuple[RaySpace, Box]:
    """NDC space of a forward-facing capture, and the box that contains its training frusta.

    Raises:
        SceneError: when a frustum is not completely in front of the near plane z = -ndc_near.
    """
    scale = (2 * intrinsics.fx / intrinsics.width, 2 * intrinsics.fy / intrinsics.height)
    space = RaySpace("ndc", 0.0, 1.0, ndc_scale=scale, ndc_near=ndc_near)
    x = (np.array([0, intrinsics.width]) - intrinsics.cx) / intrinsics.fx
    y = (intrinsics.cy - np.array([0, intrinsics.height])) / intrinsics.fy
    corners = np.array([[u, v, -1.0] for u in x for v in y])
    directions = np.einsum("nij,cj->nci", poses[:, :, :3], corners)
    origins = np.broadcast_to(poses[:, None, :, 3], directions.shape)
    if (directions[..., 2] >= 0).any() or (origins[..., 2] <= -ndc_near).any():
        raise SceneError(
            "the views do not all face forward, so NDC cannot represent their rays",
            where=str(where),
            remedy="remove the views that face elsewhere, or convert the capture to "
            "transforms_train.json",
        )
    o, d = rays_in_space(torch.tensor(origins), torch.tensor(directions), space)
    reach = max(float(o.abs().max()), float((o + d).abs().max()))  # a frustum's edges are straight
    return space, Box((0.0, 0.0, 0.0), NDC_MARGIN * reach)
