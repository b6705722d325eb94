"""How the bricks are lit: a soft sun and a sky, whose visibility is baked once, and a plastic sheen.

Visibility does not depend on the camera, so it is computed once per scene and kept in charts: each
solid is photographed along the six axes, and each texel of those six images stores, at the point
it shows, the unblocked fraction of the sun's disc and of the sky above. Blocking is read off depth
maps taken along many directions. The cosine of the sun stays out of the chart, so that the rounded
edges of `Surfaces.normals` catch the light.

Light is computed in linear color and leaves as stored (sRGB) values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lightfield.camera import look_at
from lightfield.scenes.brick_rays import entry, first_hits, parallel_grid
from lightfield.scenes.brick_solids import Solid, Surfaces

TO_SUN = np.array([0.42, -0.50, 0.76], np.float32) / np.linalg.norm([0.42, -0.50, 0.76])
SUN_RADIUS = 0.11
"""Of the sun's disc, in units of its distance: how soft shadows are."""
SUN_COLOR = np.array([1.0, 0.95, 0.86], np.float32) * 0.72
SKY_COLOR = np.array([0.86, 0.93, 1.0], np.float32) * 0.68
GROUND_COLOR = np.array([0.9, 0.9, 0.88], np.float32) * 0.36
SKY_MIRRORED = np.array([0.9, 0.96, 1.0], np.float32)
SUN_SAMPLES, SKY_SAMPLES = 24, 72
TEXEL = 0.025
"""Side of a chart's texel, in world units: less than a pixel of a 100 x 100 image."""
DEPTH_MAP_SIZE = 192
SURFACE_OFFSET, DEPTH_BIAS = 0.008, 0.012
"""World units by which a point is lifted, and may lie behind a depth map, before it is shaded."""
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))


@dataclass(frozen=True)
class Charts:
    """Baked visibility: one flat array of texels, and where the six faces of each solid lie in it."""

    texels: Float[np.ndarray, "t 3"]
    """Weight (0 where the texel shows no surface), weight x sun, weight x sky."""
    start: Int[np.ndarray, "n 6"]
    """First texel of a face; faces are numbered 2 axis + (1 on the high side)."""
    size: Int[np.ndarray, "n 6 2"]
    """Texels along the face's two axes, (axis + 1) % 3 and (axis + 2) % 3."""

    def at(
        self,
        surfaces: Surfaces,
        index: Int[np.ndarray, "m"],
        points: Float[np.ndarray, "m 3"],
        face: Int[np.ndarray, "m"],
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Visible fractions of sun and sky at surface points, interpolated within their face."""
        low, high = surfaces.low[index], surfaces.high[index]
        unit = (points - low) / (high - low)
        rows = np.arange(len(index))
        size, start = self.size[index, face], self.start[index, face]
        u = unit[rows, (face // 2 + 1) % 3] * size[:, 0] - np.float32(0.5)
        v = unit[rows, (face // 2 + 2) % 3] * size[:, 1] - np.float32(0.5)
        u, v = np.clip(u, 0, size[:, 0] - 1), np.clip(v, 0, size[:, 1] - 1)
        i, j = u.astype(np.int32), v.astype(np.int32)
        u, v = (u - i).astype(np.float32)[:, None], (v - j).astype(np.float32)[:, None]
        next_i = np.minimum(i + 1, size[:, 0] - 1)
        next_j = np.minimum(j + 1, size[:, 1] - 1)
        first, second = start + i * size[:, 1], start + next_i * size[:, 1]
        near = self.texels[first + j] * (1 - v) + self.texels[first + next_j] * v
        far = self.texels[second + j] * (1 - v) + self.texels[second + next_j] * v
        weight, sun, sky = (near * (1 - u) + far * u).T
        weight = np.maximum(weight, 1e-6)
        return sun / weight, sky / weight


def bake(solids: Sequence[Solid]) -> Charts:
    """Photograph each solid along the six axes and find out how much light reaches each texel."""
    start, size = np.zeros((len(solids), 6), np.int32), np.zeros((len(solids), 6, 2), np.int32)
    points, owner, total = [], [], 0
    for i, solid in enumerate(solids):
        for face in range(6):
            seen = _face_points(solid, face)
            start[i, face], size[i, face] = total, seen.shape[:2]
            total += seen.shape[0] * seen.shape[1]
            points.append(seen.reshape(-1, 3))
            owner.append(np.full(len(points[-1]), i))
    places, owners = np.concatenate(points), np.concatenate(owner)
    shown = np.flatnonzero(np.isfinite(places[:, 0]))
    normals = Surfaces.of(solids).normals(owners[shown], places[shown])[0]
    sun, sky = _visibility(solids, places[shown], normals)
    texels = np.zeros((total, 3), np.float32)
    texels[shown] = np.stack([np.ones_like(sun), sun, sky], axis=-1)
    return Charts(texels, start, size)


def _face_points(solid: Solid, face: int) -> Float[np.ndarray, "u v 3"]:
    """The surface points that a parallel view along one axis sees, on a lattice; NaN where none."""
    axis, high_side = divmod(face, 2)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    low, high = np.array(solid.low, np.float32), np.array(solid.high, np.float32)
    count = [max(2, int(np.ceil((high[k] - low[k]) / TEXEL))) for k in (a, b)]
    origin, direction = np.zeros((3, *count), np.float32), np.full((3, *count), 1e-9, np.float32)
    for k, n, shape in ((a, count[0], (-1, 1)), (b, count[1], (1, -1))):
        lattice = low[k] + (np.arange(n, dtype=np.float32) + 0.5) / n * (high[k] - low[k])
        origin[k] = lattice.reshape(shape)
    origin[axis] = high[axis] + 1 if high_side else low[axis] - 1
    direction[axis] = -1 if high_side else 1
    t = entry(solid, tuple(origin), tuple(direction))
    with np.errstate(invalid="ignore"):
        points = np.moveaxis(origin + t * direction, 0, -1)
    return np.where(np.isfinite(t)[..., None], points, np.nan).astype(np.float32)


def _visibility(
    solids: Sequence[Solid], points: Float[np.ndarray, "m 3"], normals: Float[np.ndarray, "m 3"]
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """The fractions of the sun's disc and of the (cosine-weighted) sky that surface points see."""
    low = np.min([s.low for s in solids], 0)
    high = np.max([s.high for s in solids], 0)
    center, radius = 0.5 * (low + high), 0.5 * float(np.linalg.norm(high - low))
    lifted = points + np.float32(SURFACE_OFFSET) * normals

    def lit(direction: np.ndarray) -> np.ndarray:
        up = np.array([0.0, 1.0, 0.0]) if abs(direction[2]) > 0.9 else np.array([0.0, 0.0, 1.0])
        pose = look_at(center + (radius + 1) * direction, center, up)
        grid = parallel_grid(pose, radius, DEPTH_MAP_SIZE)
        depth, _ = first_hits(solids, grid)
        column, row, own = grid.project(lifted).T
        limit = DEPTH_MAP_SIZE - 1
        nearest = depth[np.clip(row, 0, limit).astype(int), np.clip(column, 0, limit).astype(int)]
        return own <= nearest + DEPTH_BIAS

    sun = np.zeros(len(points), np.float32)
    for direction in sun_directions():
        sun += lit(direction)
    sky, most = np.zeros(len(points), np.float32), np.full(len(points), 1e-6, np.float32)
    for direction in _sky_directions():
        cosine = np.maximum(normals @ direction.astype(np.float32), 0)
        most += cosine
        sky += cosine * lit(direction)
    return sun / SUN_SAMPLES, sky / most


def sun_directions() -> Float[np.ndarray, "s 3"]:
    """Directions to points spread evenly over the sun's disc."""
    k = np.arange(SUN_SAMPLES)
    radius, angle = SUN_RADIUS * np.sqrt((k + 0.5) / SUN_SAMPLES), GOLDEN_ANGLE * k
    across = look_at(TO_SUN, np.zeros(3), np.array([0.0, 0.0, 1.0]))
    offset = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) @ across[:, :2].T
    directions = TO_SUN + offset
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _sky_directions() -> Float[np.ndarray, "s 3"]:
    """Directions spread evenly over the upper half of the sphere."""
    k = np.arange(SKY_SAMPLES)
    z, angle = (k + 0.5) / SKY_SAMPLES, GOLDEN_ANGLE * k
    flat = np.sqrt(1 - z * z)
    return np.stack([flat * np.cos(angle), flat * np.sin(angle), z], 1)


@dataclass(frozen=True)
class LitBricks:
    """Solids with everything that shading them needs."""

    solids: tuple[Solid, ...]
    surfaces: Surfaces
    charts: Charts
    albedo: Float[np.ndarray, "n 3"]
    gloss: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, solids: Sequence[Solid]) -> LitBricks:
        """Bake the light onto a list of solids."""
        return cls(
            tuple(solids),
            Surfaces.of(solids),
            bake(solids),
            _linear(np.array([s.color for s in solids], np.float32)),
            np.array([s.gloss for s in solids], np.float32),
        )

    def shade(
        self,
        index: Int[np.ndarray, "m"],
        points: Float[np.ndarray, "m 3"],
        directions: Float[np.ndarray, "m 3"],
    ) -> Float[np.ndarray, "m 3"]:
        """The color, as stored, of surface points seen along (not normalized) directions."""
        normal, edge, bored = self.surfaces.normals(index, points)
        axis = np.abs(normal).argmax(1)
        face = 2 * axis + (normal[np.arange(len(axis)), axis] > 0)
        face = np.where(bored, 4, face)  # only the view from below sees into an arch
        sun, sky = self.charts.at(self.surfaces, index, points, face)
        crease = (1 - np.float32(0.4) * edge)[:, None]
        facing = np.maximum(normal @ TO_SUN, 0)
        upwards = (0.5 + 0.5 * normal[:, 2])[:, None]
        ambient = SKY_COLOR * upwards + GROUND_COLOR * (1 - upwards)
        ambient = ambient * (0.22 + 0.78 * sky)[:, None] * crease
        light = SUN_COLOR * (facing * sun)[:, None] + ambient
        color = self.albedo[index] * light + self._sheen(index, normal, directions, sun, sky)
        return _stored(color)

    def _sheen(
        self,
        index: Int[np.ndarray, "m"],
        normal: Float[np.ndarray, "m 3"],
        directions: Float[np.ndarray, "m 3"],
        sun: Float[np.ndarray, "m"],
        sky: Float[np.ndarray, "m"],
    ) -> Float[np.ndarray, "m 3"]:
        """What the clear surface mirrors: a blurred sun and the sky (Schlick's Fresnel term)."""
        view = -directions / np.linalg.norm(directions, axis=1, keepdims=True)
        cosine = np.clip(np.einsum("mk,mk->m", normal, view), 0, 1)
        mirrored = 2 * cosine[:, None] * normal - view
        fresnel = self.gloss[index] * (0.035 + 0.30 * (1 - cosine) ** 5)
        glint = np.maximum(mirrored @ TO_SUN, 0) ** 28
        sky_seen = sky * np.clip(0.5 + 0.5 * mirrored[:, 2], 0, 1)
        return (
            fresnel[:, None] * sky_seen[:, None] * SKY_MIRRORED
            + (0.16 * self.gloss[index] * glint * sun)[:, None] * SUN_COLOR
        )


def _linear(stored: np.ndarray) -> np.ndarray:
    """sRGB to linear light."""
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


def _stored(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, clipped to [0, 1]."""
    x = np.clip(linear, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055).astype(np.float32)
