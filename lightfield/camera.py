"""Camera intrinsics and poses, in the world frame that the whole project uses.

Frame: a pose is a camera-to-world matrix [R | t] of shape (3, 4). The camera's x axis points right in
the image, y up, and it looks along -z (OpenGL, Blender). Pixel (column u, row v) covers
[u, u+1) x [v, v+1) with its center at (u + 0.5, v + 0.5); row 0 is the top one.
Every scene loader converts its poses into this frame once and records the conversion.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from lightfield.errors import SceneError, quoted

RIGID_TOLERANCE = 1e-3
ROUNDING_TOLERANCE = 2e-2
"""Largest deviation of R^T R from the identity that rounding to two or three decimals explains."""
REWEIGHTINGS = 20
LARGEST = 1e300
SHORTEST_FOCAL, LONGEST_FOCAL = 1 / 200, 1e6
"""Allowed focal lengths as multiples of the image side: fields of view of 179 to 0.00006 degrees."""
FARTHEST_CENTER = 10
"""Largest offset of the principal point from the image's middle, in image sides. Crops can put the
principal point far outside of the image."""


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera with optional lens distortion; lengths are in pixels.

    `distortion` is empty or OpenCV's (k1, k2, p1, p2).
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if self.width < 1 or self.height < 1:
            raise SceneError(
                f"invalid intrinsics: the image has {self.width} x {self.height} pixels",
                where="intrinsics",
            )
        if not all(abs(x) <= LARGEST for x in numbers) or self.fx <= 0 or self.fy <= 0:
            raise SceneError(
                "invalid intrinsics: focal lengths must be positive, and all numbers finite "
                f"(got {', '.join(quoted(str(x)) for x in numbers)})",
                where="intrinsics",
            )
        if len(self.distortion) not in (0, 4):
            raise SceneError("distortion must have the four terms k1 k2 p1 p2", where="intrinsics")

    def checked_view(self) -> Intrinsics:
        """This camera, after a check that it is plausible for a whole image.

        The camera of a few rows of an image would fail the check.

        Raises:
            SceneError: when the field of view, the principal point or the distortion is implausible.
        """
        for side, focal, center in (
            (self.width, self.fx, self.cx), (self.height, self.fy, self.cy),
        ):  # fmt: skip
            if not SHORTEST_FOCAL * side <= focal <= LONGEST_FOCAL * side:
                raise SceneError(
                    f"a focal length of {focal:g} pixels over {side} pixels is a field of view of "
                    f"{math.degrees(2 * math.atan(0.5 * side / focal)):g} degrees",
                    where="intrinsics",
                )
            if abs(center - 0.5 * side) > FARTHEST_CENTER * side:
                raise SceneError(
                    f"a principal point at pixel {center:g} of {side} is far outside of the image",
                    where="intrinsics",
                )
        if self.distortion and not self._bending() <= 1:
            terms = " ".join(f"{term:g}" for term in self.distortion)
            raise SceneError(
                f"the distortion {terms} moves points by more than their distance from the center",
                where="intrinsics",
            )
        return self

    def _bending(self) -> float:
        """Relative displacement by the distortion of a point half-way to the farthest corner.

        The unit is the point's distance from the center. Beyond 1 the distortion folds the image over.
        """
        x = max(self.cx, self.width - self.cx) / self.fx
        y = max(self.cy, self.height - self.cy) / self.fy
        r = 0.5 * math.hypot(x, y)
        k1, k2, p1, p2 = (abs(term) for term in self.distortion)
        return k1 * r * r + k2 * r * r * r * r + 3 * (p1 + p2) * r

    @classmethod
    def from_field_of_view(cls, width: int, height: int, angle_x: float) -> Intrinsics:
        """The centered square-pixel camera that sees `angle_x` radians across its width.

        Raises:
            SceneError: unless the angle lies between 0 and pi.
        """
        if not 0 < angle_x < math.pi:
            raise SceneError(
                f"the field of view is {angle_x} radians and must lie between 0 and pi",
                where="intrinsics",
            )
        focal = 0.5 * width / math.tan(0.5 * angle_x)
        return cls(width, height, focal, focal, 0.5 * width, 0.5 * height).checked_view()

    def resized(self, width: int, height: int) -> Intrinsics:
        """The camera of the same image resampled to `width` x `height` pixels."""
        sx, sy = width / self.width, height / self.height
        return replace(
            self,
            width=width,
            height=height,
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=self.cx * sx,
            cy=self.cy * sy,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, to be read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Intrinsics:
        """The inverse of `to_json`."""
        return cls(**{**data, "distortion": tuple(data.get("distortion", ()))}).checked_view()


@np.errstate(over="ignore", invalid="ignore")
def checked_poses(poses: np.ndarray, *, where: object) -> Float[np.ndarray, "n 3 4"]:
    """The top three rows of camera-to-world matrices (float64), checked to be rigid motions.

    Args:
        poses: (n, 3, 4) or (n, 4, 4).
        where: the place that an error names, with the frame's index appended.

    Raises:
        SceneError: on another shape, NaN or infinite entries, a scale, a shear or a reflection.
    """
    if poses.shape[1:] not in ((3, 4), (4, 4)):
        raise SceneError(
            f"poses of shape {poses.shape}, not (n, 3, 4) or (n, 4, 4)", where=str(where)
        )
    top = np.asarray(poses, dtype=np.float64)[:, :3]
    for index, pose in enumerate(top):
        place = f"{where}, frame {index}"
        if not np.isfinite(pose).all():
            raise SceneError(
                "the pose holds NaN or infinity", where=place, remedy="remove the frame"
            )
        rotation = pose[:, :3]
        skew = _skew(rotation)
        if not skew <= RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
            raise SceneError(
                f"the pose is not a rigid motion (R^T R differs from the identity by {skew:.2g}, "
                f"det R = {np.linalg.det(rotation):.3f})",
                where=place,
                remedy="give poses that only rotate and translate",
            )
    return top


@np.errstate(over="ignore", invalid="ignore")
def rigid_poses(
    poses: np.ndarray, *, where: object
) -> tuple[Float[np.ndarray, "n 3 4"], list[str]]:
    """Camera-to-world matrices as `checked_poses` returns them, and one sentence per repair.

    Two unambiguous faults are repaired: a uniform scale of the rotation (a scaled camera object) and
    rounded numbers. Positions are not changed.

    Raises:
        SceneError: for every other fault that `checked_poses` refuses.
    """
    mended = np.array(poses, dtype=np.float64)
    scales, errors = [], []
    for pose in mended:
        block = pose[:3, :3]
        skew = _skew(block)
        if not np.isfinite(pose).all() or skew <= RIGID_TOLERANCE:
            continue
        scale = float(np.cbrt(np.linalg.det(block)))
        if not scale > 0 or not _skew(block / scale) <= ROUNDING_TOLERANCE:
            continue
        left, _, right = np.linalg.svd(block / scale)
        pose[:3, :3] = left @ right
        if skew > ROUNDING_TOLERANCE:
            scales.append(scale)
        else:
            errors.append(skew)
    notes = []
    if scales:
        span = f"{min(scales):.4g}" + (f" to {max(scales):.4g}" if np.ptp(scales) > 1e-2 else "")
        notes.append(
            f"the rotations of {len(scales)} of {len(mended)} poses contain a scale of {span}; the "
            "scale is removed"
        )
    if errors:
        notes.append(
            f"the rotations of {len(errors)} of {len(mended)} poses are rounded (R^T R differs from "
            f"the identity by up to {max(errors):.2g}) and are made orthogonal"
        )
    return checked_poses(mended, where=where), notes


@np.errstate(over="ignore", invalid="ignore")
def _skew(block: Float[np.ndarray, "3 3"]) -> float:
    """Largest absolute difference between R^T R and the identity."""
    return float(np.abs(block.T @ block - np.eye(3)).max())


def look_at(
    position: Float[np.ndarray, "3"],
    target: Float[np.ndarray, "3"],
    up: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "3 4"]:
    """The pose at `position` that looks at `target` with `up` upwards in the image (float64).

    Not defined where the viewing direction is parallel to `up`.
    """
    back = np.asarray(position, np.float64) - target
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, np.asarray(position, np.float64)], axis=1)


def focus_point(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "3"]:
    """The point nearest to nearly all optical axes, which is what the cameras look at (float64).

    When the axes are (nearly) parallel, the point nearest to the world's origin is returned.
    """
    return nearest_point(poses[:, :, 3], poses[:, :, 2], around=np.zeros(3))


def nearest_point(
    origins: Float[np.ndarray, "n 3"],
    directions: Float[np.ndarray, "n 3"],
    *,
    around: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "3"]:
    """The point nearest to nearly all lines, robust against a few outlying lines (float64).

    The method is iteratively reweighted least squares with Cauchy weights. The scale of the weights is
    the median distance between the point and the lines; in the first iteration it is the median
    distance of the origins from their median. When the lines are (nearly) parallel, the point is
    (nearly) undetermined, and the solution nearest to `around` is returned. `around` should lie near
    the origins, because float64 subtracts it from them.
    """
    origin = origins.astype(np.float64) - around
    along = directions / np.linalg.norm(directions, axis=-1, keepdims=True).astype(np.float64)
    projector = np.eye(3) - along[:, :, None] * along[:, None, :]
    weight = _cauchy(np.linalg.norm(origin - np.median(origin, axis=0), axis=-1))
    reach, point = np.median(np.abs(origin)), np.zeros(3)
    for _ in range(REWEIGHTINGS):
        weighted = projector * weight[:, None, None]
        rhs = (weighted @ origin[:, :, None]).sum(0)[:, 0]
        point = np.linalg.lstsq(weighted.sum(0), rhs, rcond=1e-6)[0]
        distance = np.linalg.norm((projector @ (point - origin)[:, :, None])[:, :, 0], axis=-1)
        if np.median(distance) <= 1e-9 * reach:
            break
        weight = _cauchy(distance)
    return point + around


def _cauchy(distance: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Cauchy weights: beyond the median distance they fall with the square of the distance."""
    scale = np.median(distance)
    return 1 / (1 + (distance / scale) ** 2) if scale > 0 else np.ones(len(distance))
