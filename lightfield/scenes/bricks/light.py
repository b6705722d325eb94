"""Shading of the bricks: a soft sun and a sky with baked visibility, and specular reflection.

Visibility does not depend on the camera, so it is baked once per scene into textures. Each solid is
projected along the six axis directions. Each texel of these six projections stores, for the surface
point that it shows, the visible fractions of the sun's disc and of the sky. Occlusion is determined
by shadow maps along many directions. The texels do not contain the cosine term of the sun, so that
the rounded edges of `Surfaces.normals` are shaded correctly.

Light is computed in linear color; `LitBricks.shade` returns sRGB values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lightfield.camera import look_at
from lightfield.scenes.bricks.ray_casting import entry, first_hits, parallel_grid
from lightfield.scenes.bricks.solids import Solid, Surfaces

TO_SUN = np.array([0.42, -0.50, 0.76], np.float32) / np.linalg.norm([0.42, -0.50, 0.76])
SUN_RADIUS = 0.11
"""Radius of the sun's disc as a fraction of its distance. It sets the softness of the shadows."""
SUN_COLOR = np.array([1.0, 0.95, 0.86], np.float32) * 0.72
SKY_COLOR = np.array([0.86, 0.93, 1.0], np.float32) * 0.68
GROUND_COLOR = np.array([0.9, 0.9, 0.88], np.float32) * 0.36
REFLECTED_SKY_COLOR = np.array([0.9, 0.96, 1.0], np.float32)
SUN_SAMPLES, SKY_SAMPLES = 24, 72
TEXEL = 0.025
"""Side of a texel in world units, which is less than a pixel of a 100 x 100 image."""
SHADOW_MAP_SIZE = 192
SURFACE_OFFSET, DEPTH_BIAS = 0.008, 0.012
"""Distance by which a point is lifted off its surface before the shadow test, and the depth by
which a visible point may be behind the shadow map, in world units."""
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))


@dataclass(frozen=True)
class VisibilityMaps:
    """Baked visibility: one flat array of texels, and the place of each solid's six faces in it."""

    texels: Float[np.ndarray, "t 3"]
    """Weight (0 where the texel shows no surface), weight x sun, weight x sky."""
    start: Int[np.ndarray, "n 6"]
    """First texel of a face; faces are numbered 2 axis + (1 on the high side)."""
    size: Int[np.ndarray, "n 6 2"]
    """Number of texels along the face's two axes, (axis + 1) % 3 and (axis + 2) % 3."""

    def at(
        self,
        surfaces: Surfaces,
        index: Int[np.ndarray, "m"],
        points: Float[np.ndarray, "m 3"],
        face: Int[np.ndarray, "m"],
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Visible fractions of sun and sky at surface points, interpolated in their face."""
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


def bake(solids: Sequence[Solid]) -> VisibilityMaps:
    """Project each solid along the six axis directions and compute the visibility of each texel."""
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
    return VisibilityMaps(texels, start, size)


def _face_points(solid: Solid, face: int) -> Float[np.ndarray, "u v 3"]:
    """A grid of the surface points in a parallel projection along one axis; NaN for none."""
    axis, high_side = divmod(face, 2)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    low, high = np.array(solid.low, np.float32), np.array(solid.high, np.float32)
    count = [max(2, int(np.ceil((high[k] - low[k]) / TEXEL))) for k in (a, b)]
    origin, direction = np.zeros((3, *count), np.float32), np.full((3, *count), 1e-9, np.float32)
    for k, n, shape in ((a, count[0], (-1, 1)), (b, count[1], (1, -1))):
        places = low[k] + (np.arange(n, dtype=np.float32) + 0.5) / n * (high[k] - low[k])
        origin[k] = places.reshape(shape)
    origin[axis] = high[axis] + 1 if high_side else low[axis] - 1
    direction[axis] = -1 if high_side else 1
    t = entry(solid, tuple(origin), tuple(direction))
    with np.errstate(invalid="ignore"):
        points = np.moveaxis(origin + t * direction, 0, -1)
    return np.where(np.isfinite(t)[..., None], points, np.nan).astype(np.float32)


def _visibility(
    solids: Sequence[Solid], points: Float[np.ndarray, "m 3"], normals: Float[np.ndarray, "m 3"]
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """Visible fractions of the sun's disc and of the (cosine-weighted) sky at surface points."""
    low = np.min([s.low for s in solids], 0)
    high = np.max([s.high for s in solids], 0)
    center, radius = 0.5 * (low + high), 0.5 * float(np.linalg.norm(high - low))
    lifted = points + np.float32(SURFACE_OFFSET) * normals

    def lit(direction: np.ndarray) -> np.ndarray:
        up = np.array([0.0, 1.0, 0.0]) if abs(direction[2]) > 0.9 else np.array([0.0, 0.0, 1.0])
        pose = look_at(center + (radius + 1) * direction, center, up)
        grid = parallel_grid(pose, radius, SHADOW_MAP_SIZE)
        depth, _ = first_hits(solids, grid)
        column, row, own = grid.project(lifted).T
        limit = SHADOW_MAP_SIZE - 1
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
    """Directions to points that are evenly distributed over the sun's disc."""
    k = np.arange(SUN_SAMPLES)
    radius, angle = SUN_RADIUS * np.sqrt((k + 0.5) / SUN_SAMPLES), GOLDEN_ANGLE * k
    across = look_at(TO_SUN, np.zeros(3), np.array([0.0, 0.0, 1.0]))
    offset = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) @ across[:, :2].T
    directions = TO_SUN + offset
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _sky_directions() -> Float[np.ndarray, "s 3"]:
    """Directions that are evenly distributed over the upper hemisphere."""
    k = np.arange(SKY_SAMPLES)
    z, angle = (k + 0.5) / SKY_SAMPLES, GOLDEN_ANGLE * k
    flat = np.sqrt(1 - z * z)
    return np.stack([flat * np.cos(angle), flat * np.sin(angle), z], 1)


@dataclass(frozen=True)
class LitBricks:
    """Solids with their surfaces, baked visibility and materials."""

    solids: tuple[Solid, ...]
    surfaces: Surfaces
    visibility: VisibilityMaps
    albedo: Float[np.ndarray, "n 3"]
    gloss: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, solids: Sequence[Solid]) -> LitBricks:
        """Bake the visibility of a list of solids."""
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
        """The sRGB colors of surface points seen along (not normalized) directions."""
        normal, edge, bored = self.surfaces.normals(index, points)
        axis = np.abs(normal).argmax(1)
        face = 2 * axis + (normal[np.arange(len(axis)), axis] > 0)
        face = np.where(
            bored, 4, face
        )  # only the projection from below shows the inside of an arch
        sun, sky = self.visibility.at(self.surfaces, index, points, face)
        crease = (1 - np.float32(0.4) * edge)[:, None]
        facing = np.maximum(normal @ TO_SUN, 0)
        upwards = (0.5 + 0.5 * normal[:, 2])[:, None]
        ambient = SKY_COLOR * upwards + GROUND_COLOR * (1 - upwards)
        ambient = ambient * (0.22 + 0.78 * sky)[:, None] * crease
        light = SUN_COLOR * (facing * sun)[:, None] + ambient
        color = self.albedo[index] * light + self._specular(index, normal, directions, sun, sky)
        return _srgb(color)

    def _specular(
        self,
        index: Int[np.ndarray, "m"],
        normal: Float[np.ndarray, "m 3"],
        directions: Float[np.ndarray, "m 3"],
        sun: Float[np.ndarray, "m"],
        sky: Float[np.ndarray, "m"],
    ) -> Float[np.ndarray, "m 3"]:
        """Specular reflection of a blurred sun and of the sky, with Schlick's Fresnel term."""
        view = -directions / np.linalg.norm(directions, axis=1, keepdims=True)
        cosine = np.clip(np.einsum("mk,mk->m", normal, view), 0, 1)
        mirrored = 2 * cosine[:, None] * normal - view
        fresnel = self.gloss[index] * (0.035 + 0.30 * (1 - cosine) ** 5)
        highlight = np.maximum(mirrored @ TO_SUN, 0) ** 28
        reflected_sky = sky * np.clip(0.5 + 0.5 * mirrored[:, 2], 0, 1)
        return (
            fresnel[:, None] * reflected_sky[:, None] * REFLECTED_SKY_COLOR
            + (0.16 * self.gloss[index] * highlight * sun)[:, None] * SUN_COLOR
        )


def _linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB to linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, clipped to [0, 1]."""
    x = np.clip(linear, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055).astype(np.float32)
