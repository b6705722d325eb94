"""Rays of a camera, and the space (world or NDC) in which a field is evaluated along them.

Letters: o origin, d direction, t ray parameter, so a point is o + t d. Directions are **not**
normalized: in camera space their z is -1, so t is the depth along the optical axis (before NDC).
The teacher, the student and the exported Sampler all rely on these definitions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.errors import SceneError

UNDISTORT_STEPS = 10
LONGEST = 1e15
"""Upper bound of distances: the squares of larger ones come too close to float32's largest number."""


@dataclass(frozen=True)
class RaySpace:
    """The space of a field's coordinates, and the interval [near, far] of every ray that is used.

    `world`: rays in world coordinates. `ndc`: rays of a forward-facing capture, projected to
    normalized device coordinates (NeRF, appendix C), so that t runs from 0 at the near plane to 1 at
    infinity. In `ndc`, `ndc_scale` is (2 fx / W, 2 fy / H) and `ndc_near` the near plane's distance.
    """

    kind: Literal["world", "ndc"]
    near: float
    far: float
    ndc_scale: tuple[float, float] = (0.0, 0.0)
    ndc_near: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("world", "ndc"):
            raise SceneError(f"unknown kind {self.kind!r}", where="ray space")
        if not 0 <= self.near < self.far < LONGEST:
            raise SceneError(
                f"near {self.near} and far {self.far} must satisfy 0 <= near < far < {LONGEST:g}",
                where="ray space",
            )
        if self.kind == "ndc" and not all(
            0 < x < math.inf for x in (*self.ndc_scale, self.ndc_near)
        ):
            raise SceneError("an NDC space needs ndc_scale and ndc_near", where="ray space")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, to be read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RaySpace:
        """The inverse of `to_json`."""
        return cls(**{**data, "ndc_scale": tuple(data["ndc_scale"])})


def camera_directions(
    intrinsics: Intrinsics, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "h w 3"]:
    """Directions through all pixel centers, in camera space, with z = -1."""
    u = torch.arange(intrinsics.width, device=device, dtype=torch.float32) + 0.5
    v = torch.arange(intrinsics.height, device=device, dtype=torch.float32) + 0.5
    x = ((u - intrinsics.cx) / intrinsics.fx).expand(intrinsics.height, -1)
    y = ((v - intrinsics.cy) / intrinsics.fy)[:, None].expand(-1, intrinsics.width)
    if any(intrinsics.distortion):
        x, y = _undistorted(x, y, intrinsics.distortion)
    return torch.stack([x, -y, -torch.ones_like(x)], dim=-1)


def _undistorted(x: Tensor, y: Tensor, distortion: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Invert OpenCV's distortion by fixed-point iteration; y points down, as in OpenCV."""
    k1, k2, p1, p2 = distortion
    x0, y0 = x, y
    for _ in range(UNDISTORT_STEPS):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        dx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        dy = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        x, y = (x0 - dx) / radial, (y0 - dy) / radial
    return x, y


def world_rays(
    directions: Float[Tensor, "*grid 3"], pose: Float[Tensor, "*#grid 3 4"]
) -> tuple[Float[Tensor, "*grid 3"], Float[Tensor, "*grid 3"]]:
    """World-space origins and directions from camera-space directions; the poses broadcast."""
    d = (pose[..., :3] @ directions[..., None])[..., 0]
    return pose[..., 3].expand_as(d), d


def rays_in_space(
    origins: Float[Tensor, "*grid 3"], directions: Float[Tensor, "*grid 3"], space: RaySpace
) -> tuple[Float[Tensor, "*grid 3"], Float[Tensor, "*grid 3"]]:
    """World rays transformed into `space`; the identity for `world`.

    Not defined for NDC rays that do not look along -z.
    """
    if space.kind == "world":
        return origins, directions
    sx, sy = space.ndc_scale
    n = space.ndc_near
    o = origins - ((n + origins[..., 2:]) / directions[..., 2:]) * directions
    ox, oy, oz = o.unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    origin = torch.stack([-sx * ox / oz, -sy * oy / oz, 1 + 2 * n / oz], -1)
    direction = torch.stack([-sx * (dx / dz - ox / oz), -sy * (dy / dz - oy / oz), -2 * n / oz], -1)
    return origin, direction


def camera_rays(
    pose: Float[Tensor, "3 4"], intrinsics: Intrinsics, space: RaySpace
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 3"]]:
    """The rays of one image in `space`, on the pose's device."""
    directions = camera_directions(intrinsics, device=pose.device)
    return rays_in_space(*world_rays(directions, pose), space)


def points_along(
    origins: Float[Tensor, "*grid 3"],
    directions: Float[Tensor, "*grid 3"],
    space: RaySpace,
    count: int,
    *,
    jitter: Float[Tensor, "*grid {count}"] | None = None,
) -> Float[Tensor, "*grid {count}*3"]:
    """`count` points per ray, flattened to point * 3 + axis.

    The points lie at t = linspace(near, far, count). `jitter` is the position in [0, 1] of each point
    within its stratum, the interval between the midpoints to its neighbors (stratified sampling, for
    training only; MobileR2L 3.1).
    """
    t = torch.linspace(space.near, space.far, count, device=origins.device)
    if jitter is not None:
        middle = 0.5 * (t[1:] + t[:-1])
        low, high = torch.cat([t[:1], middle]), torch.cat([middle, t[-1:]])
        t = low + (high - low) * jitter
    shape = (*origins.shape[:-1], count)
    points = origins[..., None, :] + t.expand(shape)[..., None] * directions[..., None, :]
    return points.flatten(-2)
