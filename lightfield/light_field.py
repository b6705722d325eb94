"""A light field: a student, with the camera and the ray space that it was trained for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.rays import (
    RaySpace,
    camera_directions,
    camera_rays,
    points_along,
    rays_in_space,
    world_rays,
)
from lightfield.student import Student, StudentSpec
from lightfield.transform import SceneTransform

GOLDEN = (5**0.5 - 1) / 2
"""Golden-ratio conjugate; its multiples modulo 1 form a low-discrepancy sequence."""


def ray_grid(intrinsics: Intrinsics, spec: StudentSpec) -> Intrinsics:
    """The low-resolution camera that has one pixel per ray of the student.

    Raises:
        ConfigError: when the image's sides are not multiples of the up-sampling factor.
    """
    s = spec.factor
    if intrinsics.width % s or intrinsics.height % s:
        raise ConfigError(
            f"an image of {intrinsics.width}x{intrinsics.height} pixels cannot be up-sampled {s}x "
            "from a whole number of rays",
            remedy=f"choose a resolution divisible by {s}, or other tail factors",
        )
    return intrinsics.resized(intrinsics.width // s, intrinsics.height // s)


def encoded_rays(
    pose: Float[Tensor, "3 4"], intrinsics: Intrinsics, space: RaySpace, spec: StudentSpec
) -> Float[Tensor, "1 c h w"]:
    """A student's input for one pose, on the pose's device; `intrinsics` is the image's camera."""
    rays = camera_rays(pose, ray_grid(intrinsics, spec), space)
    points = points_along(*rays, space, spec.points)
    return encode(points, spec.frequencies).permute(2, 0, 1)[None]


def scattered_rays(
    poses: Float[Tensor, "n 3 4"],
    intrinsics: Intrinsics,
    space: RaySpace,
    spec: StudentSpec,
    *,
    each: int,
) -> Float[Tensor, "n*{each} c"]:
    """A student's input for `each` rays of each pose, on the poses' device.

    The choice of rays depends neither on the number of points nor on the number of frequencies.
    """
    grid = ray_grid(intrinsics, spec)
    directions = camera_directions(grid, device=poses.device).reshape(-1, 3)
    count = torch.arange(len(poses) * each, dtype=torch.float64, device=poses.device)
    at = (count * GOLDEN % 1 * len(directions)).long().view(len(poses), each)
    rays = rays_in_space(*world_rays(directions[at], poses[:, None]), space)
    return encode(points_along(*rays, space, spec.points), spec.frequencies).flatten(0, 1)


@dataclass(frozen=True)
class LightField:
    """Renders images of `intrinsics` from poses in scene coordinates.

    `transform` maps the coordinates of the user's own poses to scene coordinates. `intrinsics` is the
    camera of the output image; each ray goes through the center of a block of s x s pixels.
    """

    student: Student
    intrinsics: Intrinsics
    space: RaySpace
    transform: SceneTransform = field(default_factory=SceneTransform)

    def encoded_rays(self, pose: Float[Tensor, "3 4"]) -> Float[Tensor, "1 c h w"]:
        """The student's input for one pose, on the pose's device."""
        return encoded_rays(pose, self.intrinsics, self.space, self.student.spec)

    @torch.no_grad()
    def render(self, pose: Float[Tensor, "3 4"]) -> Float[Tensor, "sh sw rgb"]:
        """One image with values in (0, 1); the student stays in its current mode (train or eval)."""
        return self.student(self.encoded_rays(pose))[0].permute(1, 2, 0)
