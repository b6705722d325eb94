"""Bounds, backgrounds and normalized coordinates of scenes, on captures of a ball."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ball_captures import UP, ball_images, ring, write_capture

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import ConfigError, SceneError
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.bounds import STANDARD_HALF_EXTENT, BoundsChoice
from lightfield.scenes.formats import load_scene_folder
from lightfield.scenes.scene import Scene, load_scene, save_scene

SIDE, ANGLE = 40, math.radians(40)


def write_ball(
    folder: Path,
    *,
    poses: np.ndarray | None = None,
    angle: float = ANGLE,
    center: tuple[float, float, float] = (0.0, 0.0, 0.0),
    radius: float = 1.0,
    alpha: bool = True,
    background: int = 255,
    **moved: Any,
) -> Path:
    """A capture of a ball. `scale` and `shift` apply to poses and ball, so images do not change."""
    poses = ring(17, 4.0) if poses is None else poses
    camera = Intrinsics.from_field_of_view(SIDE, SIDE, angle)
    images, coverage = ball_images(poses, camera, np.array(center), radius, background)
    placed = poses.copy()
    placed[:, :, 3] = moved.get("scale", 1.0) * poses[:, :, 3] + moved.get("shift", 0.0)
    return write_capture(folder, placed, images, coverage if alpha else None, angle)


def load(folder: Path, **choice: Any) -> Scene:
    return load_scene_folder(folder, SceneChoice(**choice))


def relative_half_extent(scene: Scene, center: np.ndarray, radius: float) -> float:
    """Half side of the box in radii of a ball, which the box must contain; in source units."""
    middle = scene.transform.point_to_scene(tuple(center))
    reach = np.abs(np.subtract(scene.box.center, middle)).max() + radius / scene.transform.unit
    assert reach <= scene.box.half_extent
    return scene.box.half_extent * scene.transform.unit / radius


FAR_AWAY = np.concatenate([ring(16, 4.0), ring(17, 40.0)[-1:]])
ASTRAY = ring(17, 4.0)
ASTRAY[3, :, 0] *= -1
ASTRAY[3, :, 2] *= -1  # turned by 180 degrees, so it looks away from the ball


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"poses": ring(17, 2.0), "angle": math.radians(72)},
        {"poses": ring(17, 16.0), "angle": math.radians(10)},
        {"poses": FAR_AWAY},
        {"poses": ASTRAY},
        {"center": (0.4, -0.3, 0.2), "radius": 0.5},
        {"radius": 0.2},
        {"alpha": False},
        {"alpha": False, "background": 0},
        {"alpha": False, "background": 90, "poses": ring(17, 2.0), "angle": math.radians(72)},
        {"alpha": False, "poses": FAR_AWAY},
    ],
)
def test_the_box_contains_the_object_tightly(tmp_path, made):
    scene = load(write_ball(tmp_path, **made))
    center, radius = np.array(made.get("center", (0, 0, 0.0))), made.get("radius", 1.0)
    assert relative_half_extent(scene, center, radius) < 1.6
    depths = 2.0 if "angle" in made and made["angle"] > 1 else None
    if depths:
        assert scene.space.near < (depths - radius) / scene.transform.unit


@pytest.mark.parametrize("scale", [1.0, 25.0, 0.05, 1e-6, 1e6])
@pytest.mark.parametrize("shift", [0.0, 7.0, 5e5])
def test_bounds_do_not_depend_on_units_and_origin(tmp_path, scale, shift):
    plain = load(write_ball(tmp_path / "plain"))
    moved = load(write_ball(tmp_path / "moved", scale=scale, shift=shift * scale))

    def relative(scene: Scene) -> np.ndarray:
        return (scene.train.poses[:, :, 3] - scene.box.center) / scene.box.half_extent

    np.testing.assert_allclose(relative(moved), relative(plain), atol=2e-5)
    ratio = moved.box.half_extent / plain.box.half_extent
    assert moved.space.near / plain.space.near == pytest.approx(ratio, rel=1e-4)
    assert moved.space.far / plain.space.far == pytest.approx(ratio, rel=1e-4)
    assert 0.7 < ratio < 1.5
    if not moved.transform.is_identity:
        assert moved.box.half_extent == pytest.approx(STANDARD_HALF_EXTENT)
        np.testing.assert_allclose(moved.box.center, 0, atol=1e-6)


def test_the_transform_of_a_saved_scene_maps_source_poses_to_scene_poses(tmp_path):
    folder = write_ball(tmp_path / "moved", scale=25.0, shift=4e5)
    scene = load(folder)
    (tmp_path / "saved").mkdir()
    save_scene(scene, tmp_path / "saved")
    transform = load_scene(tmp_path / "saved").transform
    own = ring(17, 4.0)
    own[:, :, 3] = 25 * own[:, :, 3] + 4e5
    kept = [index for index in range(17) if index % 8]
    np.testing.assert_allclose(transform.to_scene(own)[kept], scene.train.poses, atol=1e-6)
    np.testing.assert_allclose(transform.to_source(transform.to_scene(own)), own, atol=1e-6)


def test_scenes_of_standard_size_keep_their_coordinates(tmp_path):
    assert load(write_ball(tmp_path / "a")).transform.is_identity
    big = write_ball(tmp_path / "b", scale=25.0)
    assert load(big).transform.unit > 10
    kept = load(big, keep_units=True)
    assert kept.transform.is_identity
    assert kept.box.half_extent > 25


def test_bounds_set_by_the_user_are_in_source_units(tmp_path):
    folder = write_ball(tmp_path, scale=25.0, shift=1000.0)
    choice = BoundsChoice(box=50.0, center=(1001.0, 999.0, 1000.0), near=40.0, far=160.0)
    scene = load(folder, bounds=choice)
    unit = scene.transform.unit
    assert scene.box.half_extent * unit == pytest.approx(50)
    np.testing.assert_allclose(scene.transform.point_to_scene(choice.center), scene.box.center)
    assert (scene.space.near * unit, scene.space.far * unit) == pytest.approx((40, 160))
    with pytest.raises(ConfigError, match="near 200 is not less than far 160"):
        load(folder, bounds=BoundsChoice(near=200.0, far=160.0))


def test_a_warning_tells_when_many_foreground_rays_miss_the_box(tmp_path):
    folder = write_ball(tmp_path, alpha=False)
    assert not any("warning" in note for note in load(folder).notes)
    notes = load(folder, bounds=BoundsChoice(box=0.3)).notes
    assert any("warning" in note and "--box" in note for note in notes)


def test_without_a_backdrop_the_box_grows_until_nearly_all_rays_enter_it(tmp_path):
    random = np.random.default_rng(0)
    poses = ring(17, 4.0)
    images = random.integers(0, 256, (17, SIDE, SIDE, 3), np.uint8)  # no uniform border
    scene = load(write_capture(tmp_path, poses, images, None, math.radians(80)))
    assert scene.box.half_extent * scene.transform.unit > 3
    assert not any("warning" in note for note in scene.notes)


def test_images_without_a_visible_object_are_refused(tmp_path):
    camera = Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE)
    poses = ring(9, 4.0)
    images, alpha = ball_images(poses, camera, np.zeros(3), 0.5)
    write_capture(tmp_path / "hidden", poses, images, 0 * alpha, ANGLE)
    with pytest.raises(SceneError, match="fully transparent"):
        load(tmp_path / "hidden")
    write_capture(tmp_path / "blank", poses, np.full_like(images, 77), None, ANGLE)
    with pytest.raises(SceneError, match="single uniform color"):
        load(tmp_path / "blank")
    aside = np.zeros_like(alpha)
    for index in range(len(aside)):  # the silhouette is in another corner of each image
        corner = SIDE // 2 * (index % 2), SIDE // 2 * (index // 2 % 2)
        aside[index, corner[0] : corner[0] + 4, corner[1] : corner[1] + 4] = 255
    write_capture(tmp_path / "aside", poses, images, aside, ANGLE)
    with pytest.raises(SceneError, match="no common volume"):
        load(tmp_path / "aside")


def test_the_error_for_opencv_axes_names_them(tmp_path):
    poses = ring(9, 4.0)
    images, alpha = ball_images(
        poses, Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE), np.zeros(3), 1
    )
    poses[:, :, 1:3] *= -1
    with pytest.raises(SceneError, match="OpenCV's axes"):
        load(write_capture(tmp_path, poses, images, alpha, ANGLE))


@pytest.mark.parametrize("count", [9, 17])
@pytest.mark.parametrize("distance", [1e5, 1e30])
def test_the_error_for_a_distant_camera_names_its_image(tmp_path, count, distance):
    poses = ring(count, 4.0)
    images, alpha = ball_images(
        poses, Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE), np.zeros(3), 1
    )
    poses[5, 0, 3] = distance
    with pytest.raises(SceneError, match=r"camera of train/r_005.png is .* times as far"):
        load(write_capture(tmp_path, poses, images, alpha, ANGLE))


@pytest.mark.parametrize("alpha", [True, False])
def test_the_box_contains_the_object_with_few_cameras_on_a_narrow_arc(tmp_path, alpha):
    lift, turn = np.radians(np.linspace(5, 25, 12)), np.radians(60 * np.linspace(0, 1, 12))
    places = [np.cos(lift) * np.cos(turn), np.cos(lift) * np.sin(turn), np.sin(lift)]
    poses = np.stack([look_at(4 * place, np.zeros(3), UP) for place in np.stack(places, -1)])
    scene = load(write_ball(tmp_path, poses=poses, alpha=alpha, background=30))
    assert relative_half_extent(scene, np.zeros(3), 1.0) < 1.7


def test_three_distant_cameras_do_not_set_the_size_of_the_box(tmp_path):
    poses = np.concatenate([ring(18, 4.0), ring(19, 40.0)[[5, 11, 17]]])
    images = np.random.default_rng(1).integers(0, 256, (21, SIDE, SIDE, 3), np.uint8)
    scene = load(write_capture(tmp_path, poses, images, None, ANGLE))
    assert scene.box.half_extent * scene.transform.unit < 4


def test_faint_coverage_does_not_enlarge_the_foreground(tmp_path):
    poses, camera = ring(17, 4.0), Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE)
    images, alpha = ball_images(poses, camera, np.zeros(3), 1.0)
    noise = np.random.default_rng(2).integers(0, 9, alpha.shape, np.uint8)
    scene = load(write_capture(tmp_path, poses, images, np.maximum(alpha, noise), ANGLE))
    assert relative_half_extent(scene, np.zeros(3), 1.0) < 1.3


def test_a_fully_opaque_alpha_channel_is_ignored(tmp_path):
    poses, camera = ring(17, 4.0), Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE)
    images, alpha = ball_images(poses, camera, np.zeros(3), 1.0, background=0)
    scene = load(write_capture(tmp_path, poses, images, np.full_like(alpha, 255), ANGLE))
    assert scene.train.alpha is None
    assert scene.background == (0, 0, 0)
    assert relative_half_extent(scene, np.zeros(3), 1.0) < 1.6


def test_cameras_with_equal_positions_are_refused(tmp_path):
    poses, camera = ring(17, 4.0), Intrinsics.from_field_of_view(SIDE, SIDE, ANGLE)
    images, alpha = ball_images(poses, camera, np.zeros(3), 1.0)
    poses = np.concatenate(  # world-to-camera
        [poses[:, :, :3].swapaxes(1, 2), np.tile([[0.0], [0.0], [-4.0]], (17, 1, 1))], axis=2
    )
    with pytest.raises(SceneError, match=r"the same position.*world-to-camera"):
        load(write_capture(tmp_path, poses, images, alpha, ANGLE))
