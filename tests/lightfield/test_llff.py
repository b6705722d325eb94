"""Loading of LLFF captures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightfield.camera import look_at
from lightfield.errors import ConfigError, SceneError
from lightfield.rays import camera_rays
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.formats import folder_kind, load_scene_folder, read_capture
from lightfield.scenes.llff import mean_camera_frame
from lightfield.scenes.scene import Scene

WIDTH, HEIGHT, FOCAL = 64, 48, 52.0
NEAREST = 8.0
UP = np.array([0.1, 1.0, 0.05])


def load(folder: Path, **choice: Any) -> Scene:
    return load_scene_folder(folder, SceneChoice(**choice))


def camera_poses(count: int) -> np.ndarray:
    """Cameras on a wavy patch at z = 3, looking about 10 units along -z, right-up-back axes."""
    rng = np.random.default_rng(0)
    places = np.column_stack([rng.uniform(-1, 1, (count, 2)), 3 + rng.uniform(-0.1, 0.1, count)])
    target = np.array([0.2, -0.1, -7.0])
    return np.stack([look_at(place, target + rng.uniform(-0.3, 0.3, 3), UP) for place in places])


def poses_bounds(poses: np.ndarray) -> np.ndarray:
    right, up, back, position = np.moveaxis(poses, 2, 0)
    size = np.broadcast_to([HEIGHT, WIDTH, FOCAL], (len(poses), 3))
    matrix = np.stack([-up, right, back, position, size], axis=2)
    depths = np.stack([NEAREST + 0.1 * np.arange(len(poses)), np.full(len(poses), 40.0)], axis=1)
    return np.concatenate([matrix.reshape(-1, 15), depths], axis=1)


@pytest.fixture
def capture(tmp_path):
    """A capture of 10 noise images with `images` at full size and `images_4` at a quarter."""
    folder = tmp_path / "plant"
    rng = np.random.default_rng(1)
    for name, shrink in (("images", 1), ("images_4", 4)):
        (folder / name).mkdir(parents=True)
        shape = (HEIGHT // shrink, WIDTH // shrink, 3)
        for index in range(10):
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"image{index:03d}.png")
    np.save(folder / "poses_bounds.npy", poses_bounds(camera_poses(10)))
    return folder


def test_every_8th_view_is_held_out(capture):
    scene = load(capture)
    assert (scene.name, scene.source, scene.background) == ("plant", "llff", (0, 0, 0))
    assert scene.test.names == ("images_4/image000.png", "images_4/image008.png")
    assert len(scene.train) == 8
    assert len(scene.val) == 0
    assert scene.train.alpha is None
    pixels = np.asarray(Image.open(capture / "images_4" / "image001.png"))
    np.testing.assert_array_equal(scene.train.images[0], pixels)
    assert load(capture, test_every=2).test.names == ("images_4/image000.png",)


def test_poses_are_moved_rigidly_and_scaled(capture):
    scene = load(capture)
    poses = np.concatenate([scene.test.poses[:1], scene.train.poses[:7]])  # views 0 to 7
    true = camera_poses(10)[:8]
    assert scene.transform.unit == 0.75 * NEAREST
    # Relative poses do not depend on the world frame, so only their lengths may differ.
    for i, j in ((0, 1), (3, 6)):
        ours = poses[i, :, :3].T @ poses[j]
        theirs = true[i, :, :3].T @ true[j]
        np.testing.assert_allclose(ours[:, :3], theirs[:, :3], atol=1e-6)
        ours_step = poses[i, :, :3].T @ (poses[j, :, 3] - poses[i, :, 3])
        theirs_step = true[i, :, :3].T @ (true[j, :, 3] - true[i, :, 3])
        np.testing.assert_allclose(ours_step * 0.75 * NEAREST, theirs_step, atol=1e-5)


def test_the_mean_camera_becomes_the_identity():
    frame = mean_camera_frame(camera_poses(10), 2.0)
    poses = frame.to_scene(camera_poses(10))
    np.testing.assert_allclose(poses[:, :, 3].mean(0), 0, atol=1e-12)
    back = poses[:, :, 2].mean(0)
    np.testing.assert_allclose(back / np.linalg.norm(back), [0, 0, 1], atol=1e-12)
    up = poses[:, :, 1].mean(0)
    assert up[0] == pytest.approx(0, abs=1e-12)
    assert up[1] > 0
    np.testing.assert_allclose(frame.to_source(poses), camera_poses(10), atol=1e-12)
    np.testing.assert_allclose(mean_camera_frame(poses, 1.0).to_scene(poses), poses, atol=1e-12)


def test_the_camera_scales_with_the_chosen_folder(capture):
    for resolution, folder in ((None, "images_4"), (16, "images_4"), (17, "images")):
        scene = load(capture, resolution=resolution)
        assert scene.provenance["images"] == folder
        c = scene.intrinsics
        assert c.fx / c.width == pytest.approx(FOCAL / WIDTH, rel=0.02)
        assert (c.cx, c.cy) == (c.width / 2, c.height / 2)
        expected = (2 * FOCAL / WIDTH, 2 * FOCAL / HEIGHT)
        assert scene.space.ndc_scale == pytest.approx(expected)
    exact = load(capture, resolution=(32, 24), multiple=8).intrinsics
    assert (exact.width, exact.height, exact.fx) == (32, 24, FOCAL / 2)
    with pytest.raises(ConfigError, match="cannot be enlarged to a longest side of 100"):
        load(capture, resolution=100)


def test_rays_stay_inside_the_box(capture):
    scene = load(capture)
    reach = 0.0
    for pose in scene.train.poses:
        origin, direction = camera_rays(torch.from_numpy(pose), scene.intrinsics, scene.space)
        np.testing.assert_allclose(origin[..., 2], -1, atol=1e-5)
        np.testing.assert_allclose((origin + direction)[..., 2], 1, atol=1e-5)
        for t in (0.0, 0.3, 1.0):
            reach = max(reach, (origin + t * direction).abs().max().item())
    assert scene.box.center == (0, 0, 0)
    assert 0.75 * scene.box.half_extent < reach < scene.box.half_extent


def rewrite(folder, change):
    rows = poses_bounds(camera_poses(10))
    np.save(folder / "poses_bounds.npy", change(rows))


def with_entry(row, column, value):
    def change(rows):
        rows[row, column] = value
        return rows

    return change


def turned_around(rows):
    matrix = rows[5, :15].reshape(3, 5)
    matrix[:, [0, 2]] *= -1  # a rotation by 180 degrees about the camera's x axis
    return rows


BAD_ROWS = {
    "one row of 17 numbers": lambda rows: rows[:, :15],
    r"one row of 17 numbers per view": lambda rows: rows[0],
    "holds 0 rows": lambda rows: rows[:0],
    "holds 10 rows of type int64": lambda rows: rows.astype(int),
    "frame 3: the pose holds NaN": with_entry(3, 3, np.nan),
    "frame 3: the pose is not a rigid motion": with_entry(3, 0, 2.0),
    "the depth bounds of 5 of 10 views are not positive": with_entry(slice(0, 5), 15, -1.0),
    "views do not all have the same positive size": with_entry(4, 14, 60.0),
    "holds 10 images, but poses_bounds.npy holds 9 poses": lambda rows: rows[:9],
    "do not all face forward": turned_around,
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_invalid_poses_raise_an_error_of_one_line(capture, message):
    rewrite(capture, BAD_ROWS[message])
    with pytest.raises(SceneError, match=message) as error:
        load(capture)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(capture))


def test_a_file_that_is_not_an_array_is_refused(capture):
    path = capture / "poses_bounds.npy"
    whole = path.read_bytes()
    pickled = np.array([{"a": 1}], dtype=object)
    for spoil in (
        lambda: path.write_bytes(whole[:-100]),
        lambda: path.write_bytes(whole[:40]),
        lambda: path.write_bytes(b""),
        lambda: path.write_text("no array"),
        lambda: np.save(path, pickled, allow_pickle=True),
    ):
        spoil()
        with pytest.raises(SceneError, match="not a readable array"):
            load(capture)
    path.unlink()
    with pytest.raises(SceneError, match="not a scene folder"):
        load(capture)


def test_images_of_another_aspect_ratio_and_missing_images_are_refused(capture):
    for path in (capture / "images_4").iterdir():
        Image.new("RGB", (12, 12)).save(path)
    with pytest.raises(SceneError, match="64 x 48 pixels, but the images have 12 x 12"):
        load(capture)
    for path in capture.glob("images*/*"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(SceneError, match="no images in images_8, images_4, images_2, images"):
        load(capture)
    (capture / "images_8").write_text("no folder")
    with pytest.raises(SceneError, match="images_8: not a readable folder"):
        load(capture)


def test_a_single_view_is_refused(capture):
    rewrite(capture, lambda rows: rows[:1])
    for path in sorted((capture / "images_4").iterdir())[1:]:
        path.unlink()
    with pytest.raises(SceneError, match="no images are left for training"):
        load(capture)


@pytest.mark.parametrize("value", [0.0, -3.0, np.nan, np.inf, 1e-6])
def test_an_outlying_depth_does_not_set_the_unit(capture, value):
    rewrite(capture, with_entry(4, 15, value))
    found = read_capture(capture)
    assert found.forward_frame.unit == 0.75 * NEAREST
    assert "the depth bounds of 1 of 10 views are ignored" in found.notes[0]


def test_depths_of_many_near_views_set_the_unit(capture):
    rewrite(capture, with_entry(slice(0, 3), 15, 1.0))
    found = read_capture(capture)
    assert found.forward_frame.unit == 0.75
    assert found.notes == ()


def around_an_object(rows):
    poses = np.stack(
        [look_at(4 * np.array([np.cos(a), np.sin(a), 0.3]), np.zeros(3), np.array([0, 0, 1.0]))
         for a in np.linspace(0, 6, 10)]
    )  # fmt: skip
    rows = poses_bounds(poses)
    rows[:, 15] = np.nan  # depths of an object are not used
    return rows


def test_cameras_around_an_object_are_loaded_as_an_object(capture):
    assert folder_kind(capture) == "forward"
    rewrite(capture, around_an_object)
    found = read_capture(capture)
    assert (found.kind, found.forward_frame.is_identity) == ("object", True)
    assert found.notes[0].startswith("the cameras do not all face forward, so the capture is")
    assert folder_kind(capture) == "object"
    assert load(capture).space.kind == "world"


def test_the_error_for_unread_image_formats_names_a_file(capture):
    for path in capture.glob("images*/*"):
        path.rename(path.with_suffix(".HEIC"))
    with pytest.raises(SceneError, match=r"holds 10 HEIC files, such as image000.HEIC"):
        load(capture)


def test_other_files_beside_the_images_are_ignored(capture):
    for name in (".DS_Store", "._image000.png", "Thumbs.db", "capture.mp4"):
        (capture / "images_4" / name).write_bytes(b"")
    assert read_capture(capture).notes == ()


def test_a_note_mentions_names_whose_numeric_order_differs(capture):
    for index, path in enumerate(sorted((capture / "images_4").iterdir())):
        path.rename(path.with_name(f"view_{index + 3}.png"))
    found = read_capture(capture)
    assert found.splits["test"].paths[0].name == "view_10.png"
    assert "alphabetical order" in found.notes[0]
    assert "view_10.png comes before view_3.png" in found.notes[0]


def test_no_note_mentions_names_whose_numeric_order_is_the_same(capture):
    for index, path in enumerate(sorted((capture / "images_4").iterdir())):
        path.rename(path.with_name(f"{'ab'[index // 5]}{index * 7 % 5}.png"))
    assert read_capture(capture).notes == ()


def test_a_folder_of_images_may_be_a_link(capture, tmp_path):
    (capture / "images_4").rename(tmp_path / "elsewhere")
    (capture / "images_4").symlink_to(tmp_path / "elsewhere")
    assert (
        "10 image files are links to files outside the scene folder"
        in read_capture(capture).notes[0]
    )
    tmp_path.chmod(0o777)  # the common folder is now writable by everybody
    with pytest.raises(SceneError, match="outside your own folders"):
        load(capture)


def test_poses_in_a_pipe_are_refused_without_blocking(capture):
    (capture / "poses_bounds.npy").unlink()
    os.mkfifo(capture / "poses_bounds.npy")
    with pytest.raises(SceneError, match="not a regular file"):
        load(capture)
