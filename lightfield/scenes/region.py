"""Determination of an object's bounding cube from its images, in the coordinates of the source.

Letters: c is the center of the cube, h half of its side, d the depth of c along a camera's optical
axis. Poses are camera-to-world, looking along -z, in float64. The foreground rectangle of an image
is the bounding rectangle of its foreground pixels (`background.foreground_pixels`).

1. c is the point nearest to the rays through the middles of the foreground rectangles.
2. h is the 90th percentile of the extents of the foreground rectangles at the depth d, times a
   margin. Cameras far away do not count. h does not depend on the focal length.
3. With silhouettes (an alpha channel) the cube becomes the bounding cube of their visual hull.
4. With a plain backdrop the cube is enlarged to contain the visual hull of the foreground
   rectangles.
5. Without silhouettes the cube grows until nearly all foreground rays pass through it.
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

EXTENT_QUANTILE = 0.9
"""Quantile of the views' extents that sets the initial half side. The maximum would follow a camera
far away, which sees much more."""
EXTENT_MARGIN = 1.05
FAR_RATIO = 3.0
"""Depth of the center, in median depths, beyond which a camera does not set the size of the
cube."""
HULL_EXTENTS = (1.0, 1.2)
"""Half sides of the cubes that are searched for the visual hull, in initial half sides. The second
cube is searched when the hull touches the faces of the first one and most silhouettes are
complete."""
HULL_RESOLUTION = 64
GROWTH, LARGEST_GROWTH = 1.1, 6.0
ACCEPTED_FRACTION = 0.01
"""Fraction of the foreground rays that may miss the cube without a warning."""
RAYS_PER_VIEW = 2000
LEAST_DEPTH = 1e-6
"""Median depth of the center, as a fraction of the cameras' spread, above which the cameras look at
it."""
ONE_PLACE = 1e-9
"""Spread of the cameras, as a fraction of their coordinates, up to which their positions are
equal."""


@dataclass(frozen=True)
class Region:
    """A cube in the source's coordinates."""

    center: Float[np.ndarray, "3"]
    half_extent: float


def initial_region(
    poses: Float[np.ndarray, "n 3 4"],
    directions: Float[np.ndarray, "h w 3"],
    foreground: Bool[np.ndarray, "n h w"],
    *,
    where: object,
) -> Region:
    """The cube around the common point of all cameras that the foreground rectangles span there.

    Raises:
        SceneError: when all cameras have the same position or do not look at a common point.
    """
    _check_parallax(poses, where)
    used = foreground.any((1, 2))
    rectangles = np.array([_bounding_rectangle(mask, directions) for mask in foreground[used]])
    pixel_slope = np.abs(np.diff(directions[0, :, 0])).max(initial=0.0)
    rectangles += np.array([[-0.5], [0.5]]) * pixel_slope  # from the pixel centers to their edges
    poses = poses[used]
    middles = np.append(rectangles.mean(1), -np.ones((len(poses), 1)), axis=1)
    towards = (poses[:, :, :3] @ middles[:, :, None])[:, :, 0]
    center = nearest_point(poses[:, :, 3], towards, around=np.median(poses[:, :, 3], axis=0))
    depths = depths_of(center, poses)
    _check_common_point(depths, center, poses, where)
    sides = (rectangles[:, 1] - rectangles[:, 0]).max(1) / 2
    extents = (depths * sides)[_is_near(depths)]
    return Region(center, EXTENT_MARGIN * float(np.quantile(extents, EXTENT_QUANTILE)))


def _bounding_rectangle(
    mask: Bool[np.ndarray, "h w"], directions: Float[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "2 2"]:
    """The lowest and highest (x, y) of the ray directions through the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    corners = directions[np.ix_(rows[[0, -1]], columns[[0, -1]])][..., :2].reshape(4, 2)
    return np.stack([corners.min(0), corners.max(0)])


def depths_of(
    point: Float[np.ndarray, "3"], poses: Float[np.ndarray, "n 3 4"]
) -> Float[np.ndarray, "n"]:
    """Depths of a point along the optical axes of the cameras; negative behind a camera."""
    return ((poses[:, :, 3] - point) * poses[:, :, 2]).sum(-1)


def _is_near(depths: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which cameras have the center in front of them and are not much farther away than most."""
    return (depths > 0) & (depths <= FAR_RATIO * np.median(np.abs(depths)))


def _check_parallax(poses: Float[np.ndarray, "n 3 4"], where: object) -> None:
    positions = poses[:, :, 3]
    if len(poses) > 1 and np.ptp(positions, axis=0).max() <= ONE_PLACE * np.abs(positions).max():
        raise SceneError(
            "all cameras have the same position, so depth cannot be determined",
            where=str(where),
            remedy="give camera-to-world matrices; world-to-camera matrices cause this error",
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
            "the cameras look away from their common point, so the poses probably use OpenCV's "
            "axes, in which cameras look along +z",
            where=str(where),
            remedy="negate the second and third column of every matrix, which gives OpenGL's axes",
        )
    raise SceneError(
        "the cameras do not look at a common point in front of them",
        where=str(where),
        remedy="check the poses; the images must show an object from around it",
    )


def fitted_region(
    initial: Region,
    views: Views,
    intrinsics: Intrinsics,
    directions: Float[np.ndarray, "h w 3"],
    foreground: Bool[np.ndarray, "n h w"],
    where: object,
) -> Region:
    """The region that contains the foreground of the images, starting from the initial region.

    Raises:
        SceneError: when the silhouettes have no common volume.
    """
    if views.alpha is not None:
        if foreground.all():
            return initial
        hull = _hull(initial, foreground, views, intrinsics)
        if hull is None:
            raise SceneError(
                "the silhouettes have no common volume, so no object fits all of them",
                where=str(where),
                remedy="check the alpha channels or masks, and that every image has its own pose",
            )
        return hull
    if not foreground.all():
        hull = _hull(
            initial, np.stack([_filled_rectangle(mask) for mask in foreground]), views, intrinsics
        )
        initial = initial if hull is None else _union(initial, hull)
    near = _is_near(depths_of(initial.center, views.poses))
    return _grown(initial, views.poses[near], directions, foreground[near])


def _filled_rectangle(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """A mask with its bounding rectangle filled; all pixels when the mask is empty."""
    if not mask.any():
        return ~mask
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    filled = np.zeros_like(mask)
    filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled


def _are_complete(silhouettes: Bool[np.ndarray, "n h w"]) -> bool:
    """Whether most silhouettes do not touch the borders of their images."""
    sides = (silhouettes[:, 0], silhouettes[:, -1], silhouettes[..., 0], silhouettes[..., -1])
    return bool(np.mean([np.any(side, axis=1) for side in sides], axis=1).max() < 0.5)


def _union(one: Region, other: Region) -> Region:
    """The smallest cube around two cubes."""
    low = np.minimum(one.center - one.half_extent, other.center - other.half_extent)
    high = np.maximum(one.center + one.half_extent, other.center + other.half_extent)
    return Region((low + high) / 2, float((high - low).max()) / 2)


def _hull(
    initial: Region, silhouettes: Bool[np.ndarray, "n h w"], views: Views, intrinsics: Intrinsics
) -> Region | None:
    """The bounding cube of the silhouettes' visual hull; None when the hull is empty."""
    views = replace(views, alpha=255 * silhouettes.astype(np.uint8))
    space, unit = RaySpace("world", 0.0, 1.0), Box((0.0, 0.0, 0.0), 1.0)
    region, inside = initial, np.empty((0, 3))
    for extent in HULL_EXTENTS if _are_complete(silhouettes) else HULL_EXTENTS[:1]:
        region = replace(initial, half_extent=extent * initial.half_extent)
        local = SceneTransform.of(region.center, region.half_extent)
        placed = replace(views, poses=local.to_scene(views.poses).astype(np.float32))
        cells = candidate_cells(placed, intrinsics, space, unit, HULL_RESOLUTION)
        inside = cells.nonzero().numpy()
        if not len(inside):
            return None
        if inside.min() > 0 and inside.max() < HULL_RESOLUTION - 1:
            break
    depth = float(np.median(depths_of(region.center, views.poses)))
    # The margin is one cell of the grid or one pixel, whichever is larger.
    margin = max(2 / HULL_RESOLUTION, depth / intrinsics.fx / region.half_extent)
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
    foreground: Bool[np.ndarray, "n h w"],
) -> Region:
    """The region, enlarged until nearly all foreground rays of these views pass through it."""
    largest = LARGEST_GROWTH * region.half_extent
    while (
        region.half_extent < largest
        and missed_fraction(region, poses, directions, foreground) > ACCEPTED_FRACTION
    ):
        region = replace(region, half_extent=GROWTH * region.half_extent)
    return region


def missed_fraction(
    region: Region,
    poses: Float[np.ndarray, "n 3 4"],
    directions: Float[np.ndarray, "h w 3"],
    foreground: Bool[np.ndarray, "n h w"],
) -> float:
    """Fraction of the foreground rays that do not pass through the region."""
    missed, total = 0, 0
    for pose, mask in zip(poses, foreground, strict=True):
        rays = directions[mask]
        rays = rays[:: max(1, len(rays) // RAYS_PER_VIEW)] @ pose[:, :3].T
        inverse = 1 / np.where(rays == 0, 1e-30, rays)
        offset = region.center - pose[:, 3]
        a, b = (offset - region.half_extent) * inverse, (offset + region.half_extent) * inverse
        enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
        missed += int((np.maximum(enter, 0) >= leave).sum())
        total += len(rays)
    return missed / max(total, 1)
