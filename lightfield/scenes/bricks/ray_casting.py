"""Ray casting: the first solid that each ray of an image hits, in closed form.

Frame: the project's world. Letters: o is a ray's origin, d its direction (not normalized), t the
ray parameter; the points of a ray are o + t d. A ray is inside a convex solid during one interval
[enter, leave]; a bore can move the start of the interval. Each solid is tested only against the
rays in the window of pixels that its bounding box projects to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lightfield.camera import Intrinsics
from lightfield.errors import SceneError
from lightfield.rays import camera_directions
from lightfield.scenes.bricks.solids import Solid, Vector

FAR_AWAY = np.float32(np.inf)
SMALLEST_DIRECTION = np.float32(1e-9)

Grid = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The x, y and z of one vector per ray, each [h, w]."""


@dataclass(frozen=True)
class RayGrid:
    """The rays of an image, perspective or parallel, and the projection of points into it."""

    origin: Grid
    direction: Grid
    rotation: Float[np.ndarray, "3 3"]
    """Its columns are the image's right, up and back axes in the world."""
    center: Float[np.ndarray, "3"]
    focal: tuple[float, float]
    """Pixels per unit of x / depth and y / depth, or of x and y for parallel rays."""
    principal: tuple[float, float]
    parallel: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.direction[0].shape[0], self.direction[0].shape[1]

    def project(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Column, row (pixel centers at +0.5) and depth along the optical axis of world points."""
        right, up, back = ((points - self.center) @ self.rotation).T
        depth = -back
        scale = np.ones_like(depth) if self.parallel else depth
        column = self.focal[0] * right / scale + self.principal[0]
        row = -self.focal[1] * up / scale + self.principal[1]
        return np.stack([column, row, depth], axis=-1)

    def window(self, low: Vector, high: Vector) -> tuple[slice, slice]:
        """The rows and columns that a box can project to."""
        corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1])
                            for z in (low[2], high[2])], np.float32)  # fmt: skip
        height, width = self.shape
        column, row, depth = self.project(corners).T
        if not self.parallel and depth.min() < 1e-3:
            return slice(0, height), slice(0, width)
        left, right = np.clip([column.min() - 0.5, column.max() + 0.5], 0, width).astype(int)
        top, bottom = np.clip([row.min() - 0.5, row.max() + 0.5], 0, height).astype(int)
        return slice(top, bottom), slice(left, right)


def perspective_grid(pose: Float[np.ndarray, "3 4"], intrinsics: Intrinsics) -> RayGrid:
    """The rays through a camera's pixel centers.

    Raises:
        SceneError: for a camera with lens distortion.
    """
    if any(intrinsics.distortion):
        raise SceneError(
            "the embedded scene can only be rendered with a pinhole camera without distortion",
            where="intrinsics",
        )
    pose = np.asarray(pose, np.float32)
    direction = camera_directions(intrinsics).numpy() @ pose[:, :3].T
    x, y, z = np.ascontiguousarray(np.moveaxis(direction, -1, 0))
    ox, oy, oz = (np.broadcast_to(c, x.shape) for c in pose[:, 3])
    focal, principal = (intrinsics.fx, intrinsics.fy), (intrinsics.cx, intrinsics.cy)
    return RayGrid((ox, oy, oz), (x, y, z), pose[:, :3], pose[:, 3], focal, principal, False)


def parallel_grid(pose: Float[np.ndarray, "3 4"], half_width: float, size: int) -> RayGrid:
    """`size` x `size` rays along the optical axis that cover a square of side 2 `half_width`."""
    pose = np.asarray(pose, np.float32)
    across = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * np.float32(half_width)
    plane = across[None, :, None] * pose[:, 0] - across[:, None, None] * pose[:, 1] + pose[:, 3]
    ox, oy, oz = np.ascontiguousarray(np.moveaxis(plane, -1, 0))
    dx, dy, dz = (np.broadcast_to(-c, ox.shape) for c in pose[:, 2])
    focal = 0.5 * size / half_width
    half = 0.5 * size
    return RayGrid(
        (ox, oy, oz), (dx, dy, dz), pose[:, :3], pose[:, 3], (focal, focal), (half, half), True
    )


def entry(solid: Solid, origin: Grid, direction: Grid) -> Float[np.ndarray, "h w"]:
    """The ray parameter at which each ray enters a solid; infinite for rays that miss the solid.

    Rays that start inside the solid count as missing it. No component of a direction may be zero.
    """
    enter, leave = np.float32(0), FAR_AWAY
    for k in range(3):
        if solid.axis is not None and k != solid.axis:
            continue
        a = (np.float32(solid.low[k]) - origin[k]) / direction[k]
        b = (np.float32(solid.high[k]) - origin[k]) / direction[k]
        enter = np.maximum(enter, np.minimum(a, b))
        leave = np.minimum(leave, np.maximum(a, b))
    if solid.axis is not None:
        u, v = (k for k in range(3) if k != solid.axis)
        center = 0.5 * (solid.low[u] + solid.high[u]), 0.5 * (solid.low[v] + solid.high[v])
        radius = 0.5 * (solid.high[u] - solid.low[u])
        a, b = _inside_cylinder(origin, direction, (u, v), center, radius)
        enter, leave = np.maximum(enter, a), np.minimum(leave, b)
    for normal, offset in solid.cuts:
        nx, ny, nz = map(np.float32, normal)
        closing = nx * direction[0] + ny * direction[1] + nz * direction[2]
        closing = np.where(closing == 0, SMALLEST_DIRECTION, closing)
        height = nx * origin[0] + ny * origin[1] + nz * origin[2]
        t = (np.float32(offset) - height) / closing
        enter = np.where(closing < 0, np.maximum(enter, t), enter)
        leave = np.where(closing > 0, np.minimum(leave, t), leave)
    if solid.bore is not None:
        x, z, radius = solid.bore
        a, b = _inside_cylinder(origin, direction, (0, 2), (x, z), radius)
        enter = np.where((a < enter) & (enter < b), b, enter)
    return np.where((enter < leave) & (enter > 0), enter, FAR_AWAY)


def _inside_cylinder(
    origin: Grid,
    direction: Grid,
    across: tuple[int, int],
    center: tuple[float, float],
    radius: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave an infinite cylinder; (inf, -inf) for rays that miss it."""
    u, v = across
    ou, ov = origin[u] - np.float32(center[0]), origin[v] - np.float32(center[1])
    du, dv = direction[u], direction[v]
    a = du * du + dv * dv
    nearest = -(ou * du + ov * dv) / a
    # The squared distance at the nearest point is accurate enough in float32; b^2 - 4ac is not.
    pu, pv = ou + nearest * du, ov + nearest * dv
    inside = np.float32(radius * radius) - (pu * pu + pv * pv)
    half = np.sqrt(np.maximum(inside, 0) / a)
    missed = inside <= 0
    return np.where(missed, FAR_AWAY, nearest - half), np.where(missed, -FAR_AWAY, nearest + half)


def first_hits(
    solids: Sequence[Solid], rays: RayGrid
) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Ray parameter and index of the first solid that each ray hits; (inf, -1) for no hit."""
    dx, dy, dz = (
        np.where(np.abs(d) < SMALLEST_DIRECTION, SMALLEST_DIRECTION, d) for d in rays.direction
    )
    nearest = np.full(rays.shape, FAR_AWAY, np.float32)
    index = np.full(rays.shape, -1, np.int16)
    ox, oy, oz = rays.origin
    for i, solid in enumerate(solids):
        w = rays.window(solid.low, solid.high)
        t = entry(solid, (ox[w], oy[w], oz[w]), (dx[w], dy[w], dz[w]))
        closer = t < nearest[w]
        np.copyto(nearest[w], t, where=closer)
        np.copyto(index[w], np.int16(i), where=closer)
    return nearest, index
