"""Solids that the toy bricks consist of, and their surface normals.

A solid is an axis-aligned box in any frame with z up. Optionally it is reduced to the cylinder
inscribed along one axis, cut by half spaces, and bored by one cylinder along y. It is convex before
boring. Ray casting uses its sharp edges; shading uses rounded edges, at which the normals turn over
a strip of width `bevel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_CUTS = 2

Vector = tuple[float, float, float]
HalfSpace = tuple[Vector, float]
"""Unit normal n and offset; the half space holds the points p with n . p <= offset."""


@dataclass(frozen=True)
class Solid:
    """One convex solid, possibly bored."""

    low: Vector
    high: Vector
    color: Vector
    """Albedo in sRGB."""
    axis: int | None = None
    """Axis (0, 1 or 2) of the inscribed cylinder to which the box is reduced; None keeps the box.
    The cross-section must be square."""
    cuts: tuple[HalfSpace, ...] = ()
    """At most MOST_CUTS half spaces, with which the box is intersected."""
    bore: tuple[float, float, float] | None = None
    """x, z and radius of a hole along y."""
    bevel: float = 0.04
    """Width of the strip over which the shading normals turn at an edge."""
    gloss: float = 1.0
    """Strength of the specular reflection; 1 is plastic, 0 is matte."""
    studded: bool = False
    """Whether the top has studs, which `model` adds as solids of their own."""

    def placed(self, scale: float, shift: Vector) -> Solid:
        """The solid, scaled about the origin and then shifted."""

        def moved(p: Vector) -> Vector:
            x, y, z = (scale * a + b for a, b in zip(p, shift, strict=True))
            return x, y, z

        cuts = tuple((n, scale * offset + float(np.dot(n, shift))) for n, offset in self.cuts)
        bore = self.bore
        if bore is not None:
            bore = (scale * bore[0] + shift[0], scale * bore[1] + shift[2], scale * bore[2])
        return replace(
            self,
            low=moved(self.low),
            high=moved(self.high),
            cuts=cuts,
            bore=bore,
            bevel=scale * self.bevel,
        )

    def contains(self, point: Vector) -> bool:
        """Whether a point is inside the solid; tests use this slow, direct definition."""
        if any(not a < p < b for a, p, b in zip(self.low, point, self.high, strict=True)):
            return False
        if self.axis is not None:
            across = [k for k in range(3) if k != self.axis]
            offset = [point[k] - 0.5 * (self.low[k] + self.high[k]) for k in across]
            if math.hypot(*offset) > 0.5 * (self.high[across[0]] - self.low[across[0]]):
                return False
        if any(np.dot(normal, point) > offset for normal, offset in self.cuts):
            return False
        if self.bore is not None:
            x, z, radius = self.bore
            return math.hypot(point[0] - x, point[2] - z) >= radius
        return True


@dataclass(frozen=True)
class Surfaces:
    """The parameters of many solids as arrays, for vectorized computation of normals."""

    low: Float[np.ndarray, "n 3"]
    high: Float[np.ndarray, "n 3"]
    along: Bool[np.ndarray, "n 3"]
    """Axes whose two end faces bound the solid."""
    cuts: Float[np.ndarray, "n c 4"]
    bore: Float[np.ndarray, "n 3"]
    bevel: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, solids: Sequence[Solid]) -> Surfaces:
        """The surfaces of a list of solids, in the order of the list."""
        cuts = np.full((len(solids), MOST_CUTS, 4), (0, 0, 1, 1e6), np.float32)
        for i, solid in enumerate(solids):
            for k, (normal, offset) in enumerate(solid.cuts):
                cuts[i, k] = (*normal, offset)
        return cls(
            low=np.array([s.low for s in solids], np.float32),
            high=np.array([s.high for s in solids], np.float32),
            along=np.array([[s.axis in (None, k) for k in range(3)] for s in solids]),
            cuts=cuts,
            bore=np.array([s.bore or (1e6, 1e6, 0) for s in solids], np.float32),
            bevel=np.array([s.bevel for s in solids], np.float32),
        )

    def normals(
        self, index: Int[np.ndarray, "m"], points: Float[np.ndarray, "m 3"]
    ) -> tuple[Float[np.ndarray, "m 3"], Float[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
        """Rounded outward unit normals of surface points, their edge weights, and bore flags.

        The normal is the sum of the normals of all faces within `bevel` of the point, each weighted
        by `bevel` minus its distance. For a box this is exactly the normal of the box with rounded
        edges. The edge weight is 0 on flat parts and 1 on an edge. The flag tells whether a point
        is in a bore.
        """
        bevel = self.bevel[index][:, None]
        low, high, along = self.low[index], self.high[index], self.along[index]
        pull = np.maximum(bevel - (high - points), 0) - np.maximum(bevel - (points - low), 0)
        pull *= along
        is_round = np.flatnonzero(~along.all(1))
        if len(is_round):
            lo, hi, across = low[is_round], high[is_round], ~along[is_round]
            offset = (points[is_round] - 0.5 * (lo + hi)) * across
            radius = 0.5 * ((hi - lo) * across).max(1, keepdims=True)
            distance = np.linalg.norm(offset, axis=1, keepdims=True)
            near = np.maximum(bevel[is_round] - (radius - distance), 0)
            pull[is_round] += near * offset / np.maximum(distance, 1e-6)
        for k in range(MOST_CUTS):
            cut = self.cuts[index, k]
            below = cut[:, 3] - np.einsum("mk,mk->m", cut[:, :3], points)
            pull += np.maximum(bevel - below[:, None], 0) * cut[:, :3]
        bore = self.bore[index]
        offset = (points[:, 0::2] - bore[:, :2]).astype(np.float32)
        distance = np.linalg.norm(offset, axis=1)
        near = np.maximum(bevel[:, 0] - (distance - bore[:, 2]), 0)
        pull[:, 0::2] -= near[:, None] * offset / np.maximum(distance, 1e-6)[:, None]
        length = np.linalg.norm(pull, axis=1, keepdims=True)
        edge = np.clip((length / bevel - 1) / (np.sqrt(2) - 1), 0, 1)[:, 0]
        return pull / np.maximum(length, 1e-9), edge.astype(np.float32), near > 0
