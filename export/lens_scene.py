"""Scene description of a lens: sizes of the models, and the range of the camera.

The camera of a world scene moves on an orbit and looks at `orbit_center`. Azimuth turns about
`orbit_up` and starts at `orbit_east`; elevation is the angle above the horizontal plane. The camera
of an NDC scene starts at `mean_pose` and moves by x and y along the right and up axes of this pose.
Angles are in degrees, lengths in the world's units, and poses as in `lightfield.camera`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lightfield.camera import look_at
from lightfield.errors import ConfigError
from lightfield.light_field import LightField, ray_grid
from lightfield.student import Activation
from lightfield.transform import SceneTransform
from lightfield.viewpoints import orbit_of

Vector = tuple[float, float, float]
Row = tuple[float, float, float, float]
Range = tuple[float, float]

HIGHEST_ELEVATION = 89.5
DEGREES_PER_SCREEN = (-180.0, 120.0)
"""Change of azimuth per drag across the screen's width, of elevation per drag down its height."""
NAME_LENGTH = 60


@dataclass(frozen=True)
class LensScene:
    """The numbers that the generator writes into a lens's controller script."""

    scene_name: str
    ray_height: int
    ray_width: int
    points: int
    frequencies: int
    factor: int
    near: float
    far: float
    space: Literal["world", "ndc"]
    activation: Activation
    orbit_center: Vector = (0.0, 0.0, 0.0)
    orbit_radius: float = 1.0
    elevation_min: float = 0.0
    elevation_max: float = 0.0
    start_azimuth: float = 0.0
    start_elevation: float = 0.0
    azimuth_range: Range | None = None
    """None for a full circle."""
    orbit_east: Vector = (1.0, 0.0, 0.0)
    orbit_up: Vector = (0.0, 0.0, 1.0)
    mean_pose: tuple[Row, Row, Row] | None = None
    """The center of the camera's range; NDC scenes only, as the two ranges below."""
    x_range: Range = (0.0, 0.0)
    y_range: Range = (0.0, 0.0)
    transform: SceneTransform = field(default_factory=SceneTransform)
    """Map from the coordinates of the user's poses to those of the scene."""
    drift: float = 0.0
    """Speed of the camera without a touch, in degrees of azimuth per second (NDC: in units of x per
    second). With 0 the camera rests and the phone renders nothing."""

    def __post_init__(self) -> None:
        counts = (self.ray_height, self.ray_width, self.points, self.frequencies, self.factor)
        if min(counts) < 1:
            raise ConfigError(f"sizes {counts} must all be at least 1", where="lens")
        if not all(math.isfinite(x) for x in self._numbers()):
            raise ConfigError("a number is NaN or infinite", where="lens")
        if self.drift < 0:
            raise ConfigError("drift must not be negative", where="lens")
        if self.space == "ndc":
            self._check_shift()
        else:
            self._check_orbit()

    def _numbers(self) -> tuple[float, ...]:
        pose = sum(self.mean_pose, ()) if self.mean_pose else ()
        ranges = (*(self.azimuth_range or ()), *self.x_range, *self.y_range)
        angles = (self.elevation_min, self.elevation_max, self.start_azimuth, self.start_elevation)
        axes = (*self.orbit_center, *self.orbit_east, *self.orbit_up)
        return (*pose, *ranges, *angles, *axes, self.orbit_radius, self.near, self.far, self.drift)

    def _check_orbit(self) -> None:
        low, high = self.elevation_min, self.elevation_max
        if self.orbit_radius <= 0:
            raise ConfigError(
                f"the orbit's radius must be positive (got {self.orbit_radius})", where="lens"
            )
        if not -HIGHEST_ELEVATION <= low <= self.start_elevation <= high <= HIGHEST_ELEVATION:
            raise ConfigError(
                f"elevations {low} <= {self.start_elevation} <= {high} must be ordered "
                f"and within {HIGHEST_ELEVATION} degrees",
                where="lens",
            )
        if self.azimuth_range is not None:
            first, last = self.azimuth_range
            if not first <= self.start_azimuth <= last:
                raise ConfigError("the start azimuth is outside its range", where="lens")
        axes = np.array([self.orbit_east, self.orbit_up])
        if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-4:
            raise ConfigError("east and up must be orthogonal unit vectors", where="lens")

    def _check_shift(self) -> None:
        if self.mean_pose is None:
            raise ConfigError("a lens of an NDC scene needs a mean pose", where="lens")
        if not (
            self.x_range[0] <= 0 <= self.x_range[1] and self.y_range[0] <= 0 <= self.y_range[1]
        ):
            raise ConfigError("the ranges of x and y must contain 0, the mean pose", where="lens")

    @property
    def file_name(self) -> str:
        """The scene's name reduced to ASCII letters, digits, `-` and `_`, for file names.

        Raises:
            ConfigError: when the name has no such character.
        """
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", self.scene_name).strip("_-")[:NAME_LENGTH]
        if not name:
            raise ConfigError(
                f"the scene's name {self.scene_name!r} has no letter or digit for a file name",
                where="lens",
                remedy="rename the scene",
            )
        return name

    @property
    def image_height(self) -> int:
        """Rows of the image, in pixels."""
        return self.ray_height * self.factor

    @property
    def image_width(self) -> int:
        """Columns of the image, in pixels."""
        return self.ray_width * self.factor

    def script_numbers(self) -> dict[str, Any]:
        """The value of the script's SCENE constant."""
        return {
            "name": self.file_name,
            "rays": [self.ray_height, self.ray_width],
            "image": [self.image_height, self.image_width],
            "points": self.points,
            "frequencies": self.frequencies,
            "near": _rounded(self.near),
            "far": _rounded(self.far),
            "drift": _rounded(self.drift),
            "source": self.transform.to_json(),
            **(self._orbit_numbers() if self.space == "world" else self._shift_numbers()),
        }

    def _orbit_numbers(self) -> dict[str, Any]:
        across, down = DEGREES_PER_SCREEN
        elevations = (self.elevation_min, self.elevation_max)
        return {
            "path": "orbit",
            "center": _rounded(self.orbit_center),
            "radius": _rounded(self.orbit_radius),
            "east": _rounded(self.orbit_east),
            "north": _rounded(np.cross(self.orbit_up, self.orbit_east).tolist()),
            "up": _rounded(self.orbit_up),
            "horizontal": _axis(self.start_azimuth, self.azimuth_range, across),
            "vertical": _axis(self.start_elevation, elevations, down),
        }

    def _shift_numbers(self) -> dict[str, Any]:
        assert self.mean_pose is not None
        # The scene follows the finger, so the camera moves against the finger: left for a drag to
        # the right, and up for a drag down (y of a touch points down).
        return {
            "path": "shift",
            "pose": [_rounded(row) for row in self.mean_pose],
            "horizontal": _axis(0.0, self.x_range, self.x_range[0] - self.x_range[1]),
            "vertical": _axis(0.0, self.y_range, self.y_range[1] - self.y_range[0]),
        }


def _axis(start: float, span: Range | None, per_screen: float) -> dict[str, Any]:
    return {
        "start": _rounded(start),
        "range": None if span is None else _rounded(span),
        "per_screen": _rounded(per_screen),
    }


def _rounded(value: Any) -> Any:
    """Floats rounded to 7 decimals: far below a pixel, and the same text on every machine."""
    if isinstance(value, float | int):
        return round(float(value), 7) + 0.0  # + 0.0 turns -0.0 into 0.0
    return [_rounded(x) for x in value]


def lens_scene_from(
    light_field: LightField, poses: Float[np.ndarray, "n 3 4"], scene_name: str
) -> LensScene:
    """Describe a light field's lens; the camera stays within the range of the training poses.

    The camera starts at the training pose of median elevation, or at the center of a forward-facing
    capture.

    Raises:
        ConfigError: when the image is not a multiple of the up-sampling factor, or the student does
            not have three output channels.
    """
    spec, space = light_field.student.spec, light_field.space
    if spec.output_channels != 3:
        raise ConfigError(
            f"a lens shows three channels (RGB), this student has {spec.output_channels}",
            where="lens",
        )
    grid = ray_grid(light_field.intrinsics, spec)
    view = _orbit(poses) if space.kind == "world" else _shift(poses)
    return LensScene(
        scene_name=scene_name,
        ray_height=grid.height,
        ray_width=grid.width,
        points=spec.points,
        frequencies=spec.frequencies,
        factor=spec.factor,
        near=float(space.near),
        far=float(space.far),
        space=space.kind,
        activation=spec.activation,
        transform=light_field.transform,
        **view,
    )


def _orbit(poses: np.ndarray) -> dict[str, Any]:
    orbit = orbit_of(poses)
    elevations = orbit.elevation_degrees.clip(-HIGHEST_ELEVATION, HIGHEST_ELEVATION)
    middle = int(np.argsort(elevations, kind="stable")[len(elevations) // 2])
    first, extent = orbit.azimuth_range_degrees
    azimuth = float(orbit.azimuth_degrees[middle])
    if extent < 360:
        azimuth = min(first + (azimuth - first) % 360, first + extent)
    east = orbit.pose(0, 0, 1)[:, 2]  # at azimuth 0 on the horizon, `back` is east
    return {
        "orbit_center": _tuple(orbit.center),
        "orbit_radius": float(np.median(orbit.radius)),
        "elevation_min": float(elevations.min()),
        "elevation_max": float(elevations.max()),
        "start_azimuth": azimuth,
        "start_elevation": float(elevations[middle]),
        "azimuth_range": None if extent >= 360 else (first, first + extent),
        "orbit_east": _tuple(east),
        "orbit_up": _tuple(orbit.up),
    }


def _shift(poses: np.ndarray) -> dict[str, Any]:
    _, up, back, center = poses.astype(np.float64).mean(0).T
    mean = look_at(center, center - back, up)
    offsets = (poses[:, :, 3] - center) @ mean[:, :2]
    low, high = offsets.min(0), offsets.max(0)
    return {
        "mean_pose": tuple(_tuple(row) for row in mean),
        "x_range": (float(min(low[0], 0)), float(max(high[0], 0))),
        "y_range": (float(min(low[1], 0)), float(max(high[1], 0))),
    }


def _tuple(vector: np.ndarray) -> Any:
    return tuple(float(x) for x in vector)
