"""Solids that toy bricks are made of, and their surfaces.

Frame: any with z up; lengths in its units. A solid is an axis-aligned box, optionally narrowed to the
cylinder inscribed along one axis, cut by half spaces, and bored by one cylinder along y. Before
boring it is convex. Its edges are sharp for rays and rounded for light: normals turn over a strip
that is `bevel` wide.
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
"""Unit normal n and offset: the points p with n . p <= offset."""


@dataclass(frozen=True)
class Solid:
    """One convex piece of plastic, possibly bored."""

    low: Vector
    high: Vector
    color: Vector
    """Albedo, as stored (sRGB)."""
    axis: int | None = None
    """0, 1 or 2: keep only the inscribed cylinder along this axis; the cross-section must be square."""
    cuts: tuple[HalfSpace, ...] = ()
    """At most MOST_CUTS."""
    bore: tuple[float, float, float] | None = None
    """x, z and radius of a hole along y."""
    bevel: float = 0.04
    """Width of the strip over which light sees a rounded edge."""
    gloss: float = 1.0
    """Strength of mirror-like reflection; 1 is plastic, 0 is dull rubber."""
    studded: bool = False
    """Whether the top carries studs; the model's builder makes them."""

    def placed(self, scale: float, shift: Vector) -> Solid:
        """The solid scaled about the origin, then moved."""

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
        """Whether a point lies inside (the slow, plain definition of the solid)."""
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
    """The solids' numbers as arrays, so that many surface points are treated at once."""

    low: Float[np.ndarray, "n 3"]
    high: Float[np.ndarray, "n 3"]
    along: Bool[np.ndarray, "n 3"]
    """Axes whose two end faces bound the solid."""
    cuts: Float[np.ndarray, "n c 4"]
    bore: Float[np.ndarray, "n 3"]
    bevel: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, solids: Sequence[Solid]) -> Surfaces:
        """The surfaces of a list of solids, in its order."""
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
        """Rounded outward unit normals, how much of an edge each point is (0 to 1), and whether it
        lies in a bore.

        Each face within `bevel` of the point pulls the normal towards its own, in proportion to its
        nearness: on the box this is exactly the normal of the box with rounded edges.
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
