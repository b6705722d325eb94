"""The box in which a scene's field lives, near and far along the rays, and normalized coordinates.

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
from lightfield.scenes.region import Region, depths_of, fitted, missing_share, seen_region
from lightfield.scenes.scene import Box, Views
from lightfield.transform import SceneTransform, Vector

OBJECT_RULE = (
    "center: nearest point to the rays through the middles of the images' outlines; half extent: the "
    "outlines' reach at that depth, then the visual hull of the silhouettes or outlines, or until at "
    "most 1 % of the rays that show something miss the box; near and far: the box's depths in the "
    "training views"
)
NDC_BOX_RULE = "1.1 x the farthest corner of the train frusta in NDC"
NDC_MARGIN = 1.1  # pseudo views are drawn from a little more than the train views' range

FARTHEST_RATIO = 1000.0
"""How many times as far away as most a camera may be."""
NEAREST_SHARE = 0.05
"""Nearest t, as a share of the least depth of the center, where cameras stand inside the box."""
STANDARD_HALF_EXTENT = 4 / 3
"""Half side of a normalized box. It is that of the NeRF synthetic scenes' usual box."""
STANDARD_RANGE = (0.8, 2.0)
"""Scenes around the origin whose box is of such a size keep their coordinates: students that were
published for the NeRF synthetic scenes see those scenes' own units."""


@dataclass(frozen=True)
class BoundsChoice:
    """What the user sets by hand, in the source's own coordinates; None is found from the images."""

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
    """Where the field of an object lives, in scene coordinates, and how to get there."""

    transform: SceneTransform
    space: RaySpace
    box: Box
    missing_share: float
    """Share of the training rays that show something and miss the box."""


def object_bounds(
    views: Views,
    poses: Float[np.ndarray, "n 3 4"],
    intrinsics: Intrinsics,
    shown: Bool[np.ndarray, "n h w"],
    choice: BoundsChoice,
    *,
    keep_units: bool,
    where: object,
) -> ObjectBounds:
    """Bounds of something that cameras stand around, from the training views.

    Args:
        views: images and silhouettes; their poses are not used.
        poses: the views' poses in the source's coordinates (float64).
        intrinsics: of the images.
        shown: the pixels that show something (`background.shown_pixels`).
        choice: what the user set.
        keep_units: leave the source's coordinates as they are.
        where: what to name in errors.

    Raises:
        SceneError: when the cameras stand at one place, or do not look at a common point in front of
            them, or nothing is there.
        ConfigError: when the chosen numbers bound nothing.
    """
    directions = camera_directions(intrinsics).numpy().astype(np.float64)
    region = _chosen(seen_region(poses, directions, shown, where=where), choice)
    if choice.box is None:
        placed = replace(views, poses=poses)
        region = _chosen(fitted(region, placed, intrinsics, directions, shown, where), choice)
    transform = SceneTransform() if keep_units else _normalizing(region)
    near, far = _depth_range(region, poses, choice, where=where)
    return ObjectBounds(
        transform,
        RaySpace("world", near / transform.unit, far / transform.unit),
        Box(transform.point_to_scene(_vector(region.center)), region.half_extent / transform.unit),
        missing_share(region, poses, directions, shown),
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
        raise SceneError("no camera looks towards the center of the box", where=str(where))
    least = float(depths[in_front].min())
    near = max(float((depths - support)[in_front].min()), NEAREST_SHARE * least)
    far = float((depths + support)[in_front].max())
    near = near if choice.near is None else choice.near
    far = far if choice.far is None else choice.far
    if not near < far:
        raise ConfigError(
            f"near {near:g} is not less than far {far:g}",
            where="scene.near",
            remedy="give both in the coordinates of the poses",
        )
    return near, far


def _normalizing(region: Region) -> SceneTransform:
    """The identity for a region of standard size around the origin, else what makes it one."""
    low, high = STANDARD_RANGE
    centered = np.abs(region.center).max() <= 0.5 * region.half_extent
    if centered and low <= region.half_extent <= high:
        return SceneTransform()
    return SceneTransform.of(region.center, region.half_extent / STANDARD_HALF_EXTENT)


def forward_bounds(
    poses: Float[np.ndarray, "n 3 4"], intrinsics: Intrinsics, ndc_near: float, *, where: object
) -> tuple[RaySpace, Box]:
    """NDC space of a forward-facing capture, and the box that holds its train frusta.

    Raises:
        SceneError: when a frustum does not lie wholly in front of the near plane z = -ndc_near.
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
            "the views do not all face forward, so they have no NDC space",
            where=str(where),
            remedy="convert the capture to transforms_train.json",
        )
    o, d = rays_in_space(torch.tensor(origins), torch.tensor(directions), space)
    reach = max(float(o.abs().max()), float((o + d).abs().max()))  # a frustum's edges are straight
    return space, Box((0.0, 0.0, 0.0), NDC_MARGIN * reach)
