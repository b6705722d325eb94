"""The cube that holds what images of an object show, in the coordinates of the source.

Letters: c the center of the cube, h half its side, d the depth of c along a camera's optical axis. Poses
are camera-to-world, looking along -z, in float64. An image's outline is the rectangle of its pixels that
show something: those with coverage, or those that are not the background, or all.

c is the point nearest to the rays through the middles of the outlines. h is the reach of the outlines at
the depth d, as most cameras see it, so that neither the focal length nor cameras far away matter.
Silhouettes (an alpha channel) then set the cube to their visual hull. In front of a plain backdrop the
cube also holds the visual hull of the outlines. Without silhouettes the cube grows until nearly all rays
that show something pass through it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from lightfield.camera import Intrinsics, nearest_point
from lightfield.errors import SceneError
from lightfield.rays import RaySpace
from lightfield.scenes.scene import Box, Views
from lightfield.scenes.visual_hull import candidate_cells
from lightfield.transform import SceneTransform

REACH_QUANTILE = 0.9
"""Share of the views whose outlines the first box holds; a camera far away sees much further."""
REACH_MARGIN = 1.05
FAR_RATIO = 3.0
"""Cameras farther away than this, in median depths of the center, do not set the box's size."""
HULL_REACHES = (1.0, 1.2)
"""Half sides of the cubes in which the visual hull is looked for, in those of the outlines' reach. The
second one is taken where the hull touches the faces of the first, and most outlines are whole."""
HULL_RESOLUTION = 64
GROWTH, LARGEST_GROWTH = 1.1, 6.0
ACCEPTED_SHARE = 0.01
"""Share of the rays that show something which may miss the box unsaid."""
RAYS_PER_VIEW = 2000
LEAST_DEPTH = 1e-6
"""Median depth of the center, as a share of the cameras' spread, from which they look at it."""
ONE_PLACE = 1e-9
"""Spread of the cameras, as a share of their coordinates, up to which they stand at one place."""


@dataclass(frozen=True)
class Region:
    """A cube in the source's coordinates."""

    center: Float[np.ndarray, "3"]
    half_extent: float


def seen_region(
    poses: Float[np.ndarray, "n 3 4"],
    directions: Float[np.ndarray, "h w 3"],
    shown: Bool[np.ndarray, "n h w"],
    *,
    where: object,
) -> Region:
    """What most outlines reach, around the point that all cameras look at."""
    _check_parallax(poses, where)
    used = shown.any((1, 2))
    outlines = np.array([_outline(mask, directions) for mask in shown[used]])
    pixel_slope = np.abs(np.diff(directions[0, :, 0])).max(initial=0.0)
    outlines += np.array([[-0.5], [0.5]]) * pixel_slope  # from the pixels' middles to their edges
    poses = poses[used]
    middles = np.append(outlines.mean(1), -np.ones((len(poses), 1)), axis=1)
    towards = (poses[:, :, :3] @ middles[:, :, None])[:, :, 0]
    center = nearest_point(poses[:, :, 3], towards, around=np.median(poses[:, :, 3], axis=0))
    depths = depths_of(center, poses)
    _check_common_point(depths, center, poses, where)
    sides = (outlines[:, 1] - outlines[:, 0]).max(1) / 2
    reach = (depths * sides)[_is_near(depths)]
    return Region(center, REACH_MARGIN * float(np.quantile(reach, REACH_QUANTILE)))


def _outline(
    mask: Bool[np.ndarray, "h w"], directions: Float[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "2 2"]:
    """Low and high (x, y) of the directions through the pixels that show something."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    corners = directions[np.ix_(rows[[0, -1]], columns[[0, -1]])][..., :2].reshape(4, 2)
    return np.stack([corners.min(0), corners.max(0)])


def depths_of(
    point: Float[np.ndarray, "3"], poses: Float[np.ndarray, "n 3 4"]
) -> Float[np.ndarray, "n"]:
    """Depths of a point along the optical axes; negative behind a camera."""
    return ((poses[:, :, 3] - point) * poses[:, :, 2]).sum(-1)


def _is_near(depths: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which cameras have the center in front of them, and are not much farther away than most."""
    return (depths > 0) & (depths <= FAR_RATIO * np.median(np.abs(depths)))


def _check_parallax(poses: Float[np.ndarray, "n 3 4"], where: object) -> None:
    positions = poses[:, :, 3]
    if len(poses) > 1 and np.ptp(positions, axis=0).max() <= ONE_PLACE * np.abs(positions).max():
        raise SceneError(
            "all cameras stand at one place, so the images show no depth",
            where=str(where),
            remedy="are the matrices world-to-camera ones? Give camera-to-world matrices",
        )


def _check_common_point(
    depths: Float[np.ndarray, "n"],
    center: Float[np.ndarray, "3"],
    poses: Float[np.ndarray, "n 3 4"],
    where: object,
) -> None:
    distances = np.linalg.norm(poses[:, :, 3] - center, axis=-1)
    spread = np.median(np.abs(poses[:, :, 3] - np.median(poses[:, :, 3], axis=0)))
    if np.median(depths) > LEAST_DEPTH * spread and distances.min() > 0:
        return
    if np.median(depths) < 0:
        raise SceneError(
            "the cameras look away from their common point: the poses are probably in OpenCV's axes, "
            "which look along +z",
            where=str(where),
            remedy="negate the second and third column of every matrix, for OpenGL's axes look along -z",
        )
    raise SceneError(
        "the cameras do not look at a common point in front of them",
        where=str(where),
        remedy="this form is for an object seen from around it",
    )


def fitted(
    seen: Region,
    views: Views,
    intrinsics: Intrinsics,
    directions: Float[np.ndarray, "h w 3"],
    shown: Bool[np.ndarray, "n h w"],
    where: object,
) -> Region:
    """The region that holds what the images show, found from the one that most outlines reach."""
    if views.alpha is not None:
        if shown.all():
            return seen
        hull = _hull(seen, shown, views, intrinsics)
        if hull is None:
            raise SceneError(
                "the silhouettes have no volume in common, so there is no object to learn",
                where=str(where),
                remedy="check the alpha channels or masks, and that every image has its own pose",
            )
        return hull
    if not shown.all():
        hull = _hull(seen, np.stack([_filled(mask) for mask in shown]), views, intrinsics)
        seen = seen if hull is None else _around(seen, hull)
    near = _is_near(depths_of(seen.center, views.poses))
    return _grown(seen, views.poses[near], directions, shown[near])


def _filled(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The rectangle around the pixels that show something; all pixels where none does."""
    if not mask.any():
        return ~mask
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    filled = np.zeros_like(mask)
    filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled


def _are_whole(silhouettes: Bool[np.ndarray, "n h w"]) -> bool:
    """Whether most silhouettes end within their images."""
    sides = (silhouettes[:, 0], silhouettes[:, -1], silhouettes[..., 0], silhouettes[..., -1])
    return bool(np.mean([np.any(side, axis=1) for side in sides], axis=1).max() < 0.5)


def _around(one: Region, other: Region) -> Region:
    """The smallest cube around two."""
    low = np.minimum(one.center - one.half_extent, other.center - other.half_extent)
    high = np.maximum(one.center + one.half_extent, other.center + other.half_extent)
    return Region((low + high) / 2, float((high - low).max()) / 2)


def _hull(
    seen: Region, silhouettes: Bool[np.ndarray, "n h w"], views: Views, intrinsics: Intrinsics
) -> Region | None:
    """The cube around the part of space that no silhouette rules out, or None where all is ruled out."""
    views = replace(views, alpha=255 * silhouettes.astype(np.uint8))
    space, unit = RaySpace("world", 0.0, 1.0), Box((0.0, 0.0, 0.0), 1.0)
    region, inside = seen, np.empty((0, 3))
    for reach in HULL_REACHES if _are_whole(silhouettes) else HULL_REACHES[:1]:
        region = replace(seen, half_extent=reach * seen.half_extent)
        local = SceneTransform.of(region.center, region.half_extent)
        placed = replace(views, poses=local.to_scene(views.poses).astype(np.float32))
        cells = candidate_cells(placed, intrinsics, space, unit, HULL_RESOLUTION)
        inside = cells.nonzero().numpy()
        if not len(inside):
            return None
        if inside.min() > 0 and inside.max() < HULL_RESOLUTION - 1:
            break
    depth = float(np.median(depths_of(region.center, views.poses)))
    margin = max(2 / HULL_RESOLUTION, depth / intrinsics.fx / region.half_extent)  # or a pixel
    low = inside.min(0) / HULL_RESOLUTION * 2 - 1 - margin
    high = (inside.max(0) + 1) / HULL_RESOLUTION * 2 - 1 + margin
    half = float((high - low).max()) / 2
    return Region(
        region.center + region.half_extent * (low + high) / 2, region.half_extent * min(half, 1.0)
    )


def _grown(
    region: Region,
    poses: Float[np.ndarray, "n 3 4"],
    directions: Float[np.ndarray, "h w 3"],
    shown: Bool[np.ndarray, "n h w"],
) -> Region:
    """The region, made larger until nearly all rays of nearly all views that show something hit it."""
    largest = LARGEST_GROWTH * region.half_extent
    while (
        region.half_extent < largest
        and missing_share(region, poses, directions, shown) > ACCEPTED_SHARE
    ):
        region = replace(region, half_extent=GROWTH * region.half_extent)
    return region


def missing_share(
    region: Region,
    poses: Float[np.ndarray, "n 3 4"],
    directions: Float[np.ndarray, "h w 3"],
    shown: Bool[np.ndarray, "n h w"],
) -> float:
    """Share of the rays that show something which never enter the region."""
    missing, asked = 0, 0
    for pose, mask in zip(poses, shown, strict=True):
        rays = directions[mask]
        rays = rays[:: max(1, len(rays) // RAYS_PER_VIEW)] @ pose[:, :3].T
        inverse = 1 / np.where(rays == 0, 1e-30, rays)
        offset = region.center - pose[:, 3]
        a, b = (offset - region.half_extent) * inverse, (offset + region.half_extent) * inverse
        enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
        missing += int((np.maximum(enter, 0) >= leave).sum())
        asked += len(rays)
    return missing / max(asked, 1)
