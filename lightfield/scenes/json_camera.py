"""Camera intrinsics in a transforms JSON, at the top level or in every frame.

The intrinsics are `fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2` in pixels of a w x h image, or the
fields of view `camera_angle_x` and `camera_angle_y` in radians. Pixels are square and the principal
point is centered unless the JSON says otherwise. Only pinhole cameras with this distortion are
supported. Every key or value that names another projection is refused, because the images would be
misread silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightfield.camera import Intrinsics
from lightfield.errors import SceneError, quoted
from lightfield.scenes.images import ImageFormat, is_same_aspect

FOCAL_KEYS = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y")
TERMS = ("k1", "k2", "p1", "p2")
FURTHER_TERMS = ("k3", "k4", "k5", "k6", "s1", "s2", "s3", "s4", "b1", "b2")
"""Unsupported distortion terms; they are accepted when they are zero."""
MODEL_KEYS = ("camera_model", "camera_type", "lens_model", "projection", "projection_type")
VAGUE_KEYS = ("camera", "lens", "lens_type", "model", "type")
"""Keys that are refused only when their value names another projection."""
CAMERA_KEYS = frozenset(
    ("w", "h", "cx", "cy", *FOCAL_KEYS, *TERMS, *FURTHER_TERMS, *MODEL_KEYS, *VAGUE_KEYS)
)
PINHOLE_MODELS = frozenset(
    (
        *("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL"),
        *("PERSPECTIVE", "PERSP", "BROWN"),
    )
)
OTHER_PROJECTION = re.compile(
    r"fish_?eye|equirect|latlong|lat_long|spheric|panoram|ortho(?!gonal)|cylind|cubemap|omnidir"
    r"|ftheta|f_theta|\bvr180|\b360",
    re.IGNORECASE,
)
"""Names of projections other than the pinhole projection, in keys and values."""
SAME_CAMERA = 1e-4
"""Largest relative difference of two cameras that count as equal."""


def stated_size(data: Mapping[str, Any]) -> tuple[float, float] | None:
    """Width and height that a JSON object states for its images; None when they are implausible."""
    width, height = data.get("w"), data.get("h")
    if not isinstance(width, int | float) or not isinstance(height, int | float):
        return None
    return (width, height) if 0 < width < 1e9 and 0 < height < 1e9 else None


def camera_fields(data: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    """The camera keys of a frame: the frame's own keys, and those of the top level for the rest."""
    own = {key: value for key, value in frame.items() if is_camera_key(key)}
    own_focal = any(key in own for key in FOCAL_KEYS)
    shared = {
        key: value
        for key, value in data.items()
        if is_camera_key(key) and not (own_focal and key in FOCAL_KEYS)
    }
    return {**shared, **own}


def is_camera_key(key: str) -> bool:
    """Whether a key describes the camera."""
    return key in CAMERA_KEYS or OTHER_PROJECTION.search(key) is not None


def is_same_camera(one: Intrinsics, other: Intrinsics) -> bool:
    """Whether two cameras of the same images differ only by rounding."""
    first, second = ((c.fx, c.fy, c.cx, c.cy, *(c.distortion or (0,) * 4)) for c in (one, other))
    return np.allclose(first, second, rtol=SAME_CAMERA, atol=1e-6)


def intrinsics_from(data: Mapping[str, Any], images: ImageFormat, *, where: object) -> Intrinsics:
    """The camera that a JSON object describes, scaled to the size of the images.

    Raises:
        SceneError: when the object has no focal length, another projection, or invalid numbers.
    """
    where = str(where)
    numbers = _Numbers(data, where)
    _check_projection(data, numbers, where)
    width, height = numbers.get("w", images.width), numbers.get("h", images.height)
    if not is_same_aspect(images.width, images.height, width, height):
        raise SceneError(
            f"w and h describe images of {width:g} x {height:g} pixels, but the images have "
            f"{images.width} x {images.height} pixels, which is another aspect ratio",
            where=where,
            remedy="correct w and h, or resize the images without cropping",
        )
    if "fl_x" in numbers:
        fx = numbers.get("fl_x")
        fy = numbers.get("fl_y", fx)
    elif "camera_angle_x" in numbers:
        fx = numbers.focal_length("camera_angle_x", width)
        fy = numbers.focal_length("camera_angle_y", height) if "camera_angle_y" in numbers else fx
    else:
        raise SceneError(
            "the camera has neither camera_angle_x nor fl_x",
            where=where,
            remedy="add the horizontal field of view in radians as camera_angle_x",
        )
    terms = tuple(numbers.get(key) for key in TERMS)
    sx, sy = images.width / width, images.height / height
    try:
        return Intrinsics(
            images.width,
            images.height,
            fx * sx,
            fy * sy,
            numbers.get("cx", 0.5 * width) * sx,
            numbers.get("cy", 0.5 * height) * sy,
            terms if any(terms) else (),
        ).checked_view()
    except SceneError as reason:
        raise SceneError(reason.what, where=where, remedy="correct the intrinsics") from reason


class _Numbers:
    """Checked access to the numbers in a JSON object; null counts as absent."""

    def __init__(self, data: Mapping[str, Any], where: str):
        self._data, self._where = data, where

    def __contains__(self, key: str) -> bool:
        return self._data.get(key) is not None

    def get(self, key: str, default: float = 0.0) -> float:
        value = self._data[key] if key in self else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise SceneError(
                f"{key} is {quoted(repr(value))}, which is not a finite number", where=self._where
            )
        return float(value)

    def focal_length(self, angle_key: str, side: float) -> float:
        angle = self.get(angle_key)
        if not 0 < angle < math.pi:
            raise SceneError(
                f"{angle_key} is {angle:g}, which is not between 0 and pi radians",
                where=self._where,
                remedy="give the field of view in radians",
            )
        return 0.5 * side / math.tan(0.5 * angle)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that exceeds every float
        return False


def _check_projection(data: Mapping[str, Any], numbers: _Numbers, where: str) -> None:
    for key, value in data.items():
        if value and _is_other_projection(key, value):
            raise SceneError(
                f"{key} is {quoted(repr(value))}, but only pinhole cameras with the distortion "
                "k1 k2 p1 p2 are supported",
                where=where,
                remedy="undistort the images, or project them to pinhole images",
            )
    further = [key for key in FURTHER_TERMS if numbers.get(key)]
    if further:
        raise SceneError(
            f"the distortion terms {', '.join(further)} are not supported, only k1 k2 p1 p2 are",
            where=where,
            remedy="undistort the images",
        )


def _is_other_projection(key: str, value: Any) -> bool:
    if key in MODEL_KEYS:
        return not isinstance(value, str) or value.upper() not in PINHOLE_MODELS
    if key in VAGUE_KEYS:
        return isinstance(value, str) and OTHER_PROJECTION.search(value) is not None
    return OTHER_PROJECTION.search(key) is not None
