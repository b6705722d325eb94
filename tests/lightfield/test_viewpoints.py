"""Random viewpoints in the range of a capture's cameras."""

from __future__ import annotations

import numpy as np
import pytest

from lightfield.camera import checked_poses, focus_point, look_at
from lightfield.viewpoints import orbit_of, sample_forward, sample_orbit, up_axis

X, Y, Z = np.eye(3)


def rotation(axis: int, degrees: float) -> np.ndarray:
    """A rotation about one of the camera's axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    result = np.eye(3)
    result[i, i] = result[j, j] = c
    result[i, j], result[j, i] = -s, s
    return result


def any_rotation(seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def spherical(azimuth: float, elevation: float, radius: float) -> np.ndarray:
    a, e = np.radians([azimuth, elevation])
    return radius * np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])


def capture(
    places: np.ndarray, center: np.ndarray | None = None, world: np.ndarray | None = None
) -> np.ndarray:
    """Cameras at (azimuth, elevation, radius) that look at a center, in a rotated world."""
    center = np.zeros(3) if center is None else center
    world = np.eye(3) if world is None else world
    poses = [look_at(spherical(*place), np.zeros(3), Z) for place in places]
    turned = np.stack([world @ pose for pose in poses])
    turned[:, :, 3] += center
    return turned.astype(np.float32)


def places(
    count: int,
    azimuth: tuple[float, float] = (0, 360),
    elevation: tuple[float, float] = (10, 60),
    radius: tuple[float, float] = (3, 5),
    seed: int = 0,
) -> np.ndarray:
    low, high = np.transpose([azimuth, elevation, radius])
    return np.random.default_rng(seed).uniform(low, high, (count, 3))


def angle_degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between rotations [..., 3, 3]; accurate near zero, unlike the arc cosine."""
    return np.degrees(2 * np.arcsin((np.linalg.norm(a - b, axis=(-2, -1)) / 8**0.5).clip(0, 1)))


@pytest.mark.parametrize("world", [np.eye(3), any_rotation(1), any_rotation(2)])
def test_an_orbit_reproduces_its_cameras(world):
    given = places(30)
    poses = capture(given, np.array([1.0, -2.0, 0.5]), world)
    poses[::2, :, :3] = poses[::2, :, :3] @ rotation(2, 20) @ rotation(0, 5)  # rolled, off-center
    orbit = orbit_of(poses)
    for i, pose in enumerate(poses):
        again = orbit.pose(orbit.azimuth_degrees[i], orbit.elevation_degrees[i], orbit.radius[i])
        again[:, :3] = again[:, :3] @ orbit.offset[i]
        np.testing.assert_allclose(again, pose, atol=2e-5)


def test_an_orbit_has_spherical_coordinates():
    given, center = places(40), np.array([1.0, -2.0, 0.5])
    orbit = orbit_of(capture(given, center))
    np.testing.assert_allclose(orbit.center, center, atol=1e-4)
    assert np.array_equal(orbit.up, Z)
    np.testing.assert_allclose(orbit.azimuth_degrees % 360, given[:, 0], atol=1e-3)
    np.testing.assert_allclose(orbit.elevation_degrees, given[:, 1], atol=1e-3)
    np.testing.assert_allclose(orbit.radius, given[:, 2], atol=1e-4)
    np.testing.assert_allclose(orbit.offset, np.tile(np.eye(3), (40, 1, 1)), atol=1e-5)
    assert orbit.azimuth_range_degrees[1] == 360


@pytest.mark.parametrize("world", [np.eye(3), any_rotation(3)])
def test_new_viewpoints_are_in_the_range_of_the_cameras(world):
    given, center = places(40), np.array([1.0, -2.0, 0.5])
    new = sample_orbit(capture(given, center, world), 500, seed=0)
    assert new.shape == (500, 3, 4)
    assert new.dtype == np.float32
    checked_poses(new, where="samples")
    outward = (new[:, :, 3] - center) @ world
    radius = np.linalg.norm(outward, axis=1)
    elevation = np.degrees(np.arcsin(outward[:, 2] / radius))
    assert given[:, 2].min() - 1e-3 <= radius.min() <= radius.max() <= given[:, 2].max() + 1e-3
    assert given[:, 1].min() - 0.05 <= elevation.min()
    assert elevation.max() <= given[:, 1].max() + 0.05
    np.testing.assert_allclose(
        focus_point(new), center, atol=1e-3
    )  # the center that the cameras look at
    sectors = np.bincount(
        (np.degrees(np.arctan2(outward[:, 1], outward[:, 0])) // 30).astype(int) + 6
    )
    assert len(sectors) == 12
    assert sectors.min() > 20  # the expected number is 42


def test_elevation_and_radius_follow_the_distributions_of_the_cameras():
    given = np.concatenate(
        [places(90, elevation=(10, 12), radius=(3, 3.1)), places(10, elevation=(60, 62), seed=1)]
    )
    new = sample_orbit(capture(given), 2000, seed=0)
    radius = np.linalg.norm(new[:, :, 3], axis=1)
    elevation = np.degrees(np.arcsin(new[:, 2, 3] / radius))
    assert np.mean(elevation < 12.5) == pytest.approx(0.9, abs=0.03)
    assert np.mean(elevation > 59.5) == pytest.approx(0.1, abs=0.03)
    assert np.median(radius) == pytest.approx(np.median(given[:, 2]), abs=0.05)


@pytest.mark.parametrize("start", [0, 100, 200, 330])
def test_no_viewpoint_is_in_the_gap_of_a_partial_arc(start):
    given = places(60, azimuth=(start, start + 160))
    given[:2, 0] = start, start + 160
    orbit = orbit_of(capture(given))
    found, extent = orbit.azimuth_range_degrees
    assert (found - start + 180) % 360 == pytest.approx(180, abs=0.05)
    assert extent == pytest.approx(160, abs=0.1)
    new = sample_orbit(capture(given), 400, seed=0)
    azimuth = (np.degrees(np.arctan2(new[:, 1, 3], new[:, 0, 3])) - start + 5) % 360 - 5
    assert azimuth.min() > -0.1
    assert azimuth.max() < 160.1
    assert azimuth.min() < 5  # the whole arc is used
    assert azimuth.max() > 155


def test_viewpoints_of_a_single_camera_equal_the_camera():
    poses = capture(np.array([[30.0, 40.0, 4.0]]))
    assert orbit_of(poses).azimuth_range_degrees[1] == 0
    np.testing.assert_allclose(sample_orbit(poses, 3, seed=0), np.repeat(poses, 3, 0), atol=1e-5)


def test_roll_and_off_center_views_are_preserved():
    """The cameras have two rotation offsets; new offsets are between them and reach both."""
    given = places(60)
    poses = capture(given)
    kinds = rotation(2, 30), rotation(1, 12)
    for i in range(len(poses)):
        poses[i, :, :3] = poses[i, :, :3] @ kinds[i % 2]
    orbit, new = orbit_of(poses), sample_orbit(poses, 300, seed=0)
    outward = new[:, :, 3] - orbit.center
    straight = np.stack(
        [look_at(place, np.zeros(3), orbit.up)[:, :3] for place in outward.astype(np.float64)]
    )
    offset = np.swapaxes(straight, 1, 2) @ new[:, :, :3]
    a, b = orbit.offset[0], orbit.offset[1]
    spread = max(angle_degrees(orbit.offset[i::2], orbit.offset[i]).max() for i in (0, 1))
    apart = angle_degrees(a, b)
    assert apart > 25
    to_a, to_b = angle_degrees(offset, a), angle_degrees(offset, b)
    assert (to_a + to_b < apart + 2 * spread + 0.5).all()
    assert to_a.min() < 2 * spread + 1
    assert to_b.min() < 2 * spread + 1


def test_cameras_without_roll_give_viewpoints_without_roll():
    new = sample_orbit(capture(places(20)), 50, seed=0)
    for pose in new:
        np.testing.assert_allclose(
            pose, look_at(pose[:, 3].astype(np.float64), np.zeros(3), Z), atol=2e-3
        )


@pytest.mark.parametrize("elevation", [89.9, 90.0, -90.0])
def test_a_camera_at_the_pole_gives_finite_viewpoints(elevation):
    given = places(20)
    poses = capture(given)
    top = np.array([X, Y, Z]).T if elevation > 0 else np.array([X, -Y, -Z]).T
    poses[0] = np.concatenate([top, spherical(0, elevation, 4)[:, None]], 1)
    orbit = orbit_of(poses)
    assert np.isfinite(orbit.offset).all()
    again = orbit.pose(orbit.azimuth_degrees[0], orbit.elevation_degrees[0], orbit.radius[0])
    np.testing.assert_allclose(again[:, :3] @ orbit.offset[0], poses[0, :, :3], atol=1e-5)
    checked_poses(sample_orbit(poses, 200, seed=0), where="samples")


@pytest.mark.parametrize("sample", [sample_orbit, sample_forward])
def test_viewpoints_depend_only_on_the_seed(sample):
    poses = capture(places(20))
    assert np.array_equal(sample(poses, 10, seed=1), sample(poses, 10, seed=1))
    assert not np.array_equal(sample(poses, 10, seed=1), sample(poses, 10, seed=2))


@pytest.mark.parametrize(
    ("azimuth", "elevation"),
    [((0, 360), (0, 80)), ((100, 260), (30, 30)), ((100, 260), (5, 75)), ((0, 90), (60, 60))],
)
@pytest.mark.parametrize(
    ("world", "up"),
    [
        (np.eye(3), Z),
        (np.array([Y, Z, X]), Y),
        (np.array([Z, X, Y]), X),
        (np.diag([1.0, -1.0, -1.0]), -Z),
    ],
)
def test_up_is_exactly_the_common_axis_of_level_cameras(azimuth, elevation, world, up):
    given = places(50, azimuth, elevation)
    assert np.array_equal(up_axis(capture(given, world=world)), up)


def test_up_snaps_only_to_an_axis_within_ten_degrees():
    for tilt, snaps in ((8, True), (12, False)):
        up = up_axis(capture(places(50), world=rotation(0, tilt)))
        assert np.array_equal(up, Z) == snaps
        if not snaps:
            np.testing.assert_allclose(up, rotation(0, tilt) @ Z, atol=1e-5)
        assert np.linalg.norm(up) == pytest.approx(1)


def test_up_is_not_affected_by_small_rolls():
    random, poses = np.random.default_rng(0), capture(places(60))
    for pose in poses:
        pose[:, :3] = pose[:, :3] @ rotation(2, random.normal(0, 4))
    assert np.array_equal(up_axis(poses), Z)


def test_the_up_axis_of_parallel_cameras_is_the_mean_of_their_up_directions():
    poses = np.stack(
        [look_at(np.array([x, 0, 4]), np.array([x, 0, 0]), Y) for x in np.linspace(-1, 1, 5)]
    )
    assert np.array_equal(up_axis(poses), Y)


def test_cameras_that_look_straight_down_have_an_up_axis():
    turns = [rotation(2, 10 * i) for i in range(36)]
    poses = np.stack([np.concatenate([turn, 4 * Z[:, None]], 1) for turn in turns])
    up = up_axis(poses)
    assert abs(up @ Z) == 1


def forward_capture(count: int = 20, world: np.ndarray | None = None) -> np.ndarray:
    random = np.random.default_rng(0)
    world = np.eye(3) if world is None else world
    poses = []
    for position in random.uniform([-1, -0.5, -0.1], [1, 0.5, 0.1], (count, 3)):
        pose = look_at(position, position + random.normal([0, 0, -1], [0.1, 0.1, 0]), Y)
        pose[:, :3] = pose[:, :3] @ rotation(2, random.normal(0, 2))
        poses.append(world @ pose)
    return np.stack(poses).astype(np.float32)


@pytest.mark.parametrize("world", [np.eye(3), any_rotation(5)])
def test_forward_facing_viewpoints_are_in_the_enlarged_boxes(world):
    poses = forward_capture(world=world)
    new = sample_forward(poses, 1000, seed=0)
    assert new.shape == (1000, 3, 4)
    checked_poses(new, where="samples")

    def box(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = values.min(0), values.max(0)
        margin = 0.05 * (high - low)  # a tenth of the side, on both sides together
        return low - margin - 1e-5, high + margin + 1e-5

    low, high = box(poses[:, :, 3])
    assert (new[:, :, 3] >= low).all()
    assert (new[:, :, 3] <= high).all()
    filled = np.ptp(new[:, :, 3], axis=0) / (high - low)
    assert filled.min() > 0.98
    # A viewing axis is in the box up to its length. The ranges of lengths that put each coordinate
    # into the box must overlap.
    low, high = box(poses[:, :, 2])
    bounds = np.sort(np.stack([low / new[:, :, 2], high / new[:, :, 2]]), axis=0)
    straddling = np.sign(low) != np.sign(high)  # zero is inside, so there is only an upper limit
    lower = np.where(straddling, -np.inf, bounds[0])
    assert (lower.max(1) <= bounds[1].min(1)).all()


@pytest.mark.parametrize("world", [np.eye(3), any_rotation(5)])
def test_forward_facing_viewpoints_are_upright(world):
    poses = forward_capture(world=world)
    up = poses[:, :, 1].astype(np.float64).mean(0)
    up /= np.linalg.norm(up)
    new = sample_forward(poses, 200, seed=0)
    np.testing.assert_allclose(new[:, :, 0] @ up, 0, atol=1e-6)
    assert (new[:, :, 1] @ up > 0.8).all()
    assert (new[:, :, 2] @ (world @ Z) > 0.8).all()
