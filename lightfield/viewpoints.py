"""The range of camera poses of a capture, and random new poses from that range.

A 360-degree capture is described by spherical coordinates about the point that its cameras look at:
azimuth about `up`, elevation above the plane normal to `up`, and radius. A small rotation is added,
from the camera that looks straight at the point to the real camera, which preserves off-center views
and roll. A forward-facing capture is described by the bounding boxes of its positions and viewing axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from lightfield.camera import focus_point, look_at

POLE_MARGIN_DEGREES = 0.5
FULL_CIRCLE_GAP_DEGREES = 90.0
UP_SNAP_DEGREES = 10.0
LEVEL_SPREAD = 0.05
"""Mean squared spread of the x axes from which on they determine a plane."""
FORWARD_MARGIN = 1.1
USUAL_RATIO = 3.0
"""Cameras at more than this multiple of the median radius, or less than its inverse, are left out."""


@dataclass(frozen=True)
class Orbit:
    """Spherical coordinates of cameras about a center; angles in degrees, radius in world units."""

    center: Float[np.ndarray, "3"]
    up: Float[np.ndarray, "3"]
    azimuth_degrees: Float[np.ndarray, "n"]
    elevation_degrees: Float[np.ndarray, "n"]
    radius: Float[np.ndarray, "n"]
    offset: Float[np.ndarray, "n 3 3"]
    """Rotations from the camera that looks straight at the center to the real camera."""

    @property
    def azimuth_range_degrees(self) -> tuple[float, float]:
        """Start and extent of the azimuths; the extent is 360 when there is no large gap."""
        around = np.sort(self.azimuth_degrees)
        gaps = np.diff(np.append(around, around[0] + 360))
        widest = int(gaps.argmax())
        if gaps[widest] < FULL_CIRCLE_GAP_DEGREES:
            return float(around[0]), 360.0
        return float(around[(widest + 1) % len(around)]), float(360 - gaps[widest])

    def pose(self, azimuth: float, elevation: float, radius: float) -> Float[np.ndarray, "3 4"]:
        """The pose that looks straight at the center from the given place (degrees)."""
        east, north = _horizon(self.up)
        a, e = np.radians(azimuth), np.radians(elevation)
        outward = np.cos(e) * (np.cos(a) * east + np.sin(a) * north) + np.sin(e) * self.up
        return look_at(self.center + radius * outward, self.center, self.up)


def orbit_of(poses: Float[np.ndarray, "n 3 4"]) -> Orbit:
    """Describe 360-degree cameras as an orbit."""
    poses = poses.astype(np.float64)
    center, up = focus_point(poses), up_axis(poses)
    east, north = _horizon(up)
    outward = poses[:, :, 3] - center
    radius = np.linalg.norm(outward, axis=1)
    elevation = np.degrees(np.arcsin(np.clip(outward @ up / radius, -1, 1)))
    azimuth = np.degrees(np.arctan2(outward @ north, outward @ east))
    limit = 90 - POLE_MARGIN_DEGREES
    orbit = Orbit(
        center,
        up,
        azimuth,
        elevation.clip(-limit, limit),
        radius,
        np.tile(np.eye(3), (len(poses), 1, 1)),
    )
    straight = np.stack(
        [orbit.pose(*place) for place in zip(azimuth, orbit.elevation_degrees, radius, strict=True)]
    )
    offset = np.swapaxes(straight[:, :, :3], 1, 2) @ poses[:, :, :3]
    return Orbit(center, up, azimuth, orbit.elevation_degrees, radius, offset)


def up_axis(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "3"]:
    """The cameras' common up direction: the direction most nearly normal to their x axes (float64).

    Its sign is that of the mean y axis. It snaps to a world axis that is within 10 degrees. When the
    x axes do not span a plane (few or parallel cameras), it is the mean y axis.
    """
    right, mean_up = poses[:, :, 0].astype(np.float64), poses[:, :, 1].astype(np.float64).mean(0)
    spread, axes = np.linalg.eigh(right.T @ right / len(right))
    up = axes[:, 0] if spread[1] > LEVEL_SPREAD else mean_up
    up = up * (-1 if up @ mean_up < 0 else 1) / np.linalg.norm(up)
    nearest = int(np.abs(up).argmax())
    if abs(up[nearest]) > np.cos(np.radians(UP_SNAP_DEGREES)):
        return np.eye(3)[nearest] * np.sign(up[nearest])
    return up


def sample_orbit(
    poses: Float[np.ndarray, "n 3 4"], count: int, *, seed: int
) -> Float[np.ndarray, "{count} 3 4"]:
    """Random poses in the range of a 360-degree capture.

    The azimuth is uniform; elevation and radius follow the distributions of the cameras; the rotation
    away from the center is interpolated between two random cameras. Cameras at unusual distances are
    left out.
    """
    random = np.random.default_rng(seed)
    poses = poses[_usual(orbit_of(poses).radius)]
    orbit = orbit_of(poses)
    start, extent = orbit.azimuth_range_degrees
    azimuth = start + extent * random.random(count)
    elevation = _redrawn(orbit.elevation_degrees, count, random)
    radius = _redrawn(orbit.radius, count, random)
    first, second = random.integers(len(poses), size=(2, count))
    mix = random.random(count)
    result = np.empty((count, 3, 4), np.float32)
    for i in range(count):
        pose = orbit.pose(azimuth[i], elevation[i], radius[i])
        between = _between(orbit.offset[first[i]], orbit.offset[second[i]], mix[i])
        pose[:, :3] = pose[:, :3] @ between
        result[i] = pose
    return result


def sample_forward(
    poses: Float[np.ndarray, "n 3 4"], count: int, *, seed: int
) -> Float[np.ndarray, "{count} 3 4"]:
    """Random poses in the range of a forward-facing capture, sampled as in MobileR2L.

    Position and viewing axis are uniform in their bounding boxes, enlarged by a tenth; up is the mean
    of the cameras' y axes.
    """
    random = np.random.default_rng(seed)
    poses = poses.astype(np.float64)
    up = poses[:, :, 1].mean(0)
    result = np.empty((count, 3, 4), np.float32)
    position = _in_box(poses[:, :, 3], count, random)
    axis = _in_box(poses[:, :, 2], count, random)
    for i in range(count):
        result[i] = look_at(position[i], position[i] - axis[i], up)
    return result


def _horizon(up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors that span the plane normal to `up`: x and y for up = z."""
    east = np.roll(np.eye(3)[int(np.abs(up).argmax())], 1)
    east -= (east @ up) * up
    east /= np.linalg.norm(east)
    return east, np.cross(up, east)


def _usual(radius: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which cameras are at a usual distance; one distant camera would spread the samples too far."""
    median = np.median(radius)
    return (radius <= USUAL_RATIO * median) & (radius >= median / USUAL_RATIO)


def _redrawn(values: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Samples from the piecewise-linear distribution through the sorted values."""
    return np.interp(
        random.random(count) * (len(values) - 1), np.arange(len(values)), np.sort(values)
    )


def _in_box(values: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    low, high = values.min(0), values.max(0)
    middle, half = 0.5 * (low + high), 0.5 * FORWARD_MARGIN * (high - low)
    return middle + half * random.uniform(-1, 1, (count, 3))


def _between(a: np.ndarray, b: np.ndarray, mix: float) -> np.ndarray:
    """The rotation at the fraction `mix` of the way from a to b.

    Both are near the identity, so the function interpolates the matrices and takes the nearest
    rotation.
    """
    u, _, vt = np.linalg.svd((1 - mix) * a + mix * b)
    return u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
