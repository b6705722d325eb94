"""The similarity transform from the source's coordinates to the scene's normalized coordinates.

x_scene = rotation @ (x_source - center) / unit. The teacher, the student, the exports and the lens use
scene coordinates. The transform is stored beside them, so that a pose in the source's coordinates can
be rendered. The transform is applied in float64, because geographic coordinates may be millions of
units large while the orbit of the cameras is four units wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lightfield.errors import SceneError

Vector = tuple[float, float, float]
RIGID_TOLERANCE = 1e-6
IDENTITY_ROTATION: tuple[Vector, Vector, Vector] = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
)


@dataclass(frozen=True)
class SceneTransform:
    """A similarity transform from source to scene coordinates; the identity by default."""

    center: Vector = (0.0, 0.0, 0.0)
    """The source point that becomes the scene's origin."""
    unit: float = 1.0
    """Length of one scene unit, in source units."""
    rotation: tuple[Vector, Vector, Vector] = IDENTITY_ROTATION
    """Rows of the rotation from source axes to scene axes."""

    def __post_init__(self) -> None:
        rotation = np.array(self.rotation, np.float64)
        numbers = (*self.center, self.unit, *rotation.ravel())
        if not all(math.isfinite(number) for number in numbers) or self.unit <= 0:
            raise SceneError(
                "the center and the unit must be finite, and the unit must be positive",
                where="transform",
            )
        skew = np.abs(rotation @ rotation.T - np.eye(3)).max()
        if skew > RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
            raise SceneError("the rotation is not a rotation matrix", where="transform")

    @property
    def is_identity(self) -> bool:
        """Whether scene coordinates equal source coordinates."""
        return self == SceneTransform()

    def to_scene(self, poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
        """Camera-to-world matrices of the source, in scene coordinates (float64)."""
        rotation = np.array(self.rotation)
        poses = np.asarray(poses, np.float64)
        positions = (poses[:, :, 3] - self.center) @ rotation.T / self.unit
        return np.concatenate([rotation @ poses[:, :, :3], positions[:, :, None]], axis=2)

    def to_source(self, poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
        """The inverse of `to_scene` (float64)."""
        rotation = np.array(self.rotation)
        poses = np.asarray(poses, np.float64)
        positions = self.unit * poses[:, :, 3] @ rotation + self.center
        return np.concatenate([rotation.T @ poses[:, :, :3], positions[:, :, None]], axis=2)

    def point_to_scene(self, point: Vector) -> Vector:
        """A source point in scene coordinates."""
        x, y, z = np.array(self.rotation) @ (np.array(point) - self.center) / self.unit
        return float(x), float(y), float(z)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, to be read back by `from_json`."""
        return {
            "center": list(self.center),
            "unit": self.unit,
            "rotation": [list(row) for row in self.rotation],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SceneTransform:
        """The inverse of `to_json`."""
        return cls.of(data["center"], data["unit"], data["rotation"])

    @classmethod
    def of(cls, center: Any, unit: float, rotation: Any = IDENTITY_ROTATION) -> SceneTransform:
        """The transform with these numbers, given as arrays or lists."""
        rows = np.asarray(rotation, np.float64).tolist()
        return cls(
            _vector(center), float(unit), (_vector(rows[0]), _vector(rows[1]), _vector(rows[2]))
        )


def _vector(values: Any) -> Vector:
    x, y, z = (float(value) for value in values)
    return x, y, z
