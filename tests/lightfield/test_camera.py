from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lightfield.camera import Intrinsics, checked_poses, focus_point, look_at
from lightfield.errors import SceneError

CAMERA = Intrinsics(40, 30, 50.0, 45.0, 18.5, 16.0, (0.1, -0.02, 0.001, 0.002))


def random_poses(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rotations = np.linalg.qr(random.normal(size=(count, 3, 3)))[0]
    rotations *= np.linalg.det(rotations)[:, None, None]
    return np.concatenate([rotations, random.normal(size=(count, 3, 1))], axis=2)


def test_field_of_view_of_a_known_camera():
    camera = Intrinsics.from_field_of_view(800, 600, 2 * math.atan(0.5))
    assert camera.fx == camera.fy == pytest.approx(800)
    assert (camera.cx, camera.cy) == (400, 300)


@pytest.mark.parametrize("angle", [0.0, -0.7, math.pi, math.inf, math.nan])
def test_impossible_field_of_view_is_refused(angle):
    with pytest.raises(SceneError, match="field of view"):
        Intrinsics.from_field_of_view(8, 8, angle)


def test_resizing_keeps_relative_image_positions():
    resized = CAMERA.resized(80, 10)
    for x, y in [(0.0, 0.0), (0.3, -0.2)]:
        u, v = CAMERA.fx * x + CAMERA.cx, CAMERA.fy * y + CAMERA.cy
        assert resized.fx * x + resized.cx == pytest.approx(u * 80 / 40)
        assert resized.fy * y + resized.cy == pytest.approx(v * 10 / 30)
    assert resized.resized(40, 30) == CAMERA
    assert resized.distortion == CAMERA.distortion


def test_intrinsics_are_unchanged_by_json():
    assert Intrinsics.from_json(json.loads(json.dumps(CAMERA.to_json()))) == CAMERA


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"height": -1},
        {"fx": 0.0},
        {"fy": -50.0},
        {"fx": math.nan},
        {"cy": math.inf},
        {"distortion": (0.1,)},
        {"distortion": (0.1, 0.0, math.nan, 0.0)},
        {"fx": 10**400},
        {"fx": 0.01},
        {"fy": 1e12},
        {"cx": -1e4},
        {"cy": 1e30},
        {"distortion": (1e300, 0.0, 0.0, 0.0)},
        {"distortion": (0.0, -1e300, 0.0, 0.0)},
        {"distortion": (0.0, 0.0, 40.0, 0.0)},
        {"distortion": (-20.0, 0.0, 0.0, 0.0)},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_camera_is_refused(wrong):
    with pytest.raises(SceneError) as refusal:
        Intrinsics.from_json({**CAMERA.to_json(), **wrong})
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "camera",
    [
        Intrinsics(
            1920, 1080, 500.0, 500.0, 960.0, 540.0, (-0.28, 0.08, 1e-3, -1e-3)
        ),  # action camera
        Intrinsics(
            4000, 3000, 40_000.0, 40_000.0, 2000.0, 1500.0, (2.0, -300.0, 0.01, 0.01)
        ),  # far
        Intrinsics.from_field_of_view(800, 800, math.radians(170)),
        Intrinsics.from_field_of_view(800, 800, 1e-4),
        Intrinsics(100, 80, 300.0, 300.0, -700.0, 600.0),  # a crop at the border of a large image
    ],
)
def test_unusual_cameras_are_accepted(camera):
    assert Intrinsics.from_json(camera.to_json()) == camera


@pytest.mark.parametrize("rows", [3, 4])
def test_rigid_poses_are_returned_in_double_precision(rows):
    poses = random_poses(50)
    given = np.concatenate([poses, np.tile([[[0, 0, 0, 1.0]]], (50, 1, 1))], axis=1)[:, :rows]
    checked = checked_poses(given, where="scene.json")
    assert checked.dtype == np.float64
    np.testing.assert_array_equal(checked, poses)


MIRROR, SHEAR = np.diag([1.0, 1.0, -1.0]), np.array([[1, 0.01, 0], [0, 1, 0], [0, 0, 1.0]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pose: pose * np.array([1, 1, 1, math.nan]), "NaN or infinity"),
        (lambda pose: pose + math.inf, "NaN or infinity"),
        (lambda pose: pose * 1.01, "not a rigid motion"),
        (lambda pose: np.c_[pose[:, :3] @ SHEAR, pose[:, 3]], "not a rigid motion"),
        (
            lambda pose: np.c_[pose[:, :3] @ MIRROR, pose[:, 3]],
            "not a rigid motion.*det R = -1.000",
        ),
        (lambda pose: pose * 0, "not a rigid motion"),
    ],
    ids=["nan", "infinity", "scale", "shear", "mirror", "zero"],
)
def test_the_error_for_a_pose_that_is_not_rigid_names_its_index(damage, message):
    poses = random_poses(4)
    poses[2] = damage(poses[2])
    with pytest.raises(SceneError, match=f"scene.json, frame 2: .*{message}"):
        checked_poses(poses, where="scene.json")


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 4), (3, 4), (2, 12)])
def test_arrays_of_another_shape_are_refused(shape):
    with pytest.raises(SceneError, match="shape"):
        checked_poses(np.ones(shape), where="scene.json")


def test_look_at_by_hand():
    pose = look_at(np.array([0.0, -4, 0]), np.zeros(3), np.array([0.0, 0, 1]))
    # A camera on the -y axis that looks along +y with z up: right is +x, and back is -y.
    np.testing.assert_allclose(pose[:, :3], [[1, 0, 0], [0, 0, -1], [0, 1, 0]], atol=1e-15)
    np.testing.assert_array_equal(pose[:, 3], [0, -4, 0])


def test_look_at_is_rigid_and_looks_at_the_target():
    random = np.random.default_rng(1)
    for position, target, up in random.normal(size=(20, 3, 3)):
        pose = look_at(position, target, up)
        checked_poses(pose[None], where="here")
        seen = pose[:, :3].T @ (target - position)
        distance = float(np.linalg.norm(target - position))
        np.testing.assert_allclose(seen, [0, 0, -distance], atol=1e-12)
        x, y, _ = pose[:, :3].T @ up
        assert abs(x) < 1e-12 < y


def test_focus_point_is_the_common_point_of_the_cameras():
    random = np.random.default_rng(2)
    target = np.array([0.3, -1.0, 2.0])
    poses = np.stack(
        [look_at(p, target, np.array([0.0, 0, 1])) for p in random.normal(size=(6, 3))]
    )
    np.testing.assert_allclose(focus_point(poses), target, atol=1e-9)


def test_focus_point_of_skew_axes_is_the_middle_between_them():
    along_x = look_at(np.array([-3.0, 0, 1]), np.array([0.0, 0, 1]), np.array([0.0, 0, 1]))
    along_y = look_at(np.array([0.0, -3, 2]), np.array([0.0, 0, 2]), np.array([0.0, 0, 1]))
    np.testing.assert_allclose(focus_point(np.stack([along_x, along_y])), [0, 0, 1.5], atol=1e-12)


def test_focus_point_of_parallel_axes_is_finite():
    pose = np.eye(4)[None, :3]
    pose[..., 3] = [1.0, 2.0, 5.0]
    np.testing.assert_allclose(focus_point(np.repeat(pose, 3, axis=0)), [1, 2, 0], atol=1e-12)
