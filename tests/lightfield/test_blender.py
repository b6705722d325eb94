"""Loading of scenes with one transforms file per split."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_scenes import ANGLE, RADIUS, edit, noise_image, ring_pose, write_scene
from PIL import Image

from lightfield.errors import ConfigError, SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes import decoding
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.formats import load_scene_folder
from lightfield.scenes.images import area_means, fitted_size
from lightfield.scenes.scene import Scene, load_scene, save_scene


def load(folder: Path, progress: Progress = silent, **choice: Any) -> Scene:
    return load_scene_folder(folder, SceneChoice(**choice), progress)


def test_reads_every_split_with_the_published_geometry(tmp_path):
    scene = load(write_scene(tmp_path / "toy"))
    assert (scene.name, scene.source) == ("toy", "blender")
    assert [len(v) for v in (scene.train, scene.val, scene.test)] == [9, 1, 3]
    assert scene.test.names == ("test/r_0.png", "test/r_1.png", "test/r_2.png")
    np.testing.assert_allclose(scene.train.poses[2], ring_pose(2)[:3], atol=1e-6)
    camera = scene.intrinsics
    assert camera.fx == camera.fy == pytest.approx(4 / math.tan(ANGLE / 2))
    assert (camera.cx, camera.cy) == (4, 4)
    assert scene.transform.is_identity
    assert scene.box.center == pytest.approx((0, 0, 0), abs=0.1)
    one_pixel_more = RADIUS * 4.5 / camera.fx
    assert scene.box.half_extent == pytest.approx(one_pixel_more, rel=0.1)
    reach = math.sqrt(3) * scene.box.half_extent
    bounds = RADIUS - reach, RADIUS + reach
    assert (scene.space.near, scene.space.far) == pytest.approx(bounds, abs=0.1)


def test_images_are_composited_on_the_background(tmp_path):
    folder = write_scene(tmp_path)
    rgba = noise_image(1, 8, 8).astype(float) / 255
    for background in ((1.0, 1.0, 1.0), (0.0, 0.5, 1.0)):
        scene = load(folder, background=background)
        alpha = rgba[..., 3:]
        expected = rgba[..., :3] * alpha + (1 - alpha) * background
        np.testing.assert_allclose(scene.train.image(1), expected, atol=0.51 / 255)
        assert scene.train.alpha is not None
        np.testing.assert_array_equal(scene.train.alpha[1], noise_image(1, 8, 8)[..., 3])


def test_resampling_is_the_mean_of_composited_pixels(tmp_path):
    scene = load(write_scene(tmp_path, width=16, height=8), resolution=8)
    rgba = noise_image(0, 16, 8).astype(float)
    white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    expected = white.reshape(4, 2, 8, 2, 3).mean((1, 3))
    assert scene.train.images.shape == (9, 4, 8, 3)
    np.testing.assert_allclose(scene.train.images[0], expected, atol=0.5 + 1e-6)
    full = load(tmp_path).intrinsics
    assert scene.intrinsics == full.resized(8, 4)


@pytest.mark.parametrize(("width", "height"), [(5, 3), (7, 1), (10, 6), (3, 4)])
def test_area_means_integrate_fractional_pixels(width, height):
    plane = np.random.default_rng(0).integers(0, 65026, (6, 10)).astype(np.uint32)
    # After enlarging by the common multiple, every output pixel covers whole pixels.
    copies = np.repeat(np.repeat(plane, height, 0), width, 1).astype(float)
    expected = copies.reshape(height, 6, width, 10).mean((1, 3))
    np.testing.assert_allclose(area_means(plane, width, height), expected, rtol=1e-12)


def test_area_means_are_exact_at_the_largest_values():
    plane = np.full((decoding.MAX_SIDE, 2), 255 * 255, np.uint32)
    assert (area_means(plane, 1, 3) == 255 * 255).all()


@pytest.mark.parametrize(
    ("resolution", "multiple", "expected"),
    [
        (None, 1, (1008, 756)),
        (None, 8, (1008, 752)),
        (252, 1, (252, 189)),
        (252, 12, (240, 180)),
        (100, 1, (100, 75)),
        ((504, 380), 1, (504, 380)),
    ],
)
def test_fitted_sizes_keep_the_aspect_ratio_in_whole_multiples(resolution, multiple, expected):
    assert fitted_size(1008, 756, resolution, multiple=multiple) == expected
    turned = resolution[::-1] if isinstance(resolution, tuple) else resolution
    assert fitted_size(756, 1008, turned, multiple=multiple) == expected[::-1]


@pytest.mark.parametrize(
    ("resolution", "multiple"), [(1009, 1), (0, 1), ((504, 400), 1), ((504, 378), 12), (20, 12)]
)
def test_impossible_sizes_are_refused(resolution, multiple):
    with pytest.raises(ConfigError, match=r"resolution: .*"):
        fitted_size(1008, 756, resolution, multiple=multiple)


def test_explicit_intrinsics_scale_with_the_images(tmp_path):
    camera = {"fl_x": 30, "fl_y": 40, "cx": 10, "cy": 20, "w": 32, "h": 48, "camera_angle_x": 3.0}
    scene = load(write_scene(tmp_path, width=16, height=24, camera=camera), resolution=12)
    c = scene.intrinsics
    assert (c.width, c.height) == (8, 12)
    assert (c.fx, c.fy, c.cx, c.cy, c.distortion) == (7.5, 10, 2.5, 5, ())


def test_both_fields_of_view_and_the_distortion_are_read(tmp_path):
    camera = {"camera_angle_x": 0.8, "camera_angle_y": 0.5, "k1": 0.1, "p2": -0.01}
    c = load(write_scene(tmp_path, width=16, camera=camera)).intrinsics
    assert c.fx == pytest.approx(8 / math.tan(0.4))
    assert c.fy == pytest.approx(4 / math.tan(0.25))
    assert c.distortion == (0.1, 0, 0, -0.01)


def test_test_every_takes_every_nth_test_view(tmp_path):
    scene = load(write_scene(tmp_path, train=3, test=5), test_every=2)
    assert scene.test.names == ("test/r_0.png", "test/r_2.png", "test/r_4.png")
    assert len(scene.val) == 0
    assert scene.val.images.shape == (0, 8, 8, 3)
    with pytest.raises(ConfigError, match="step between test views is 0"):
        load(tmp_path, test_every=0)


def test_without_a_test_split_training_views_are_held_out(tmp_path):
    scene = load(write_scene(tmp_path, train=17))
    assert scene.test.names == ("train/r_0.png", "train/r_8.png", "train/r_16.png")
    assert len(scene.train) == 14
    assert not set(scene.train.names) & set(scene.test.names)
    np.testing.assert_array_equal(scene.test.alpha[1], noise_image(8, 8, 8)[..., 3])  # type: ignore
    assert "held out" in scene.provenance["test_views"]


def test_file_names_may_differ_in_suffix_case_and_separators(tmp_path):
    folder = write_scene(tmp_path, train=3, test=1)
    for path in folder.glob("*/*.png"):
        Image.open(path).convert("RGB").save(path)
    (folder / "train" / "r_1.png").rename(folder / "train" / "r_1.v2.PNG")
    Image.open(folder / "train" / "r_2.png").save(folder / "train" / "r_2.jpg")
    edit(folder, lambda d: d["frames"][0].update(file_path="train/r_0.png"))
    edit(folder, lambda d: d["frames"][1].update(file_path=".\\train\\r_1.v2"))
    edit(folder, lambda d: d["frames"][2].update(file_path="train/../train/r_2.jpg"))
    scene = load(folder)
    assert scene.train.alpha is None
    np.testing.assert_array_equal(scene.train.images[1], noise_image(1, 8, 8)[..., :3])


def test_provenance_contains_hashes_of_the_files_that_were_read(tmp_path):
    folder = write_scene(tmp_path)
    before = load(folder).provenance
    assert set(before["json_sha256"]) == {f"transforms_{s}.json" for s in ("train", "val", "test")}
    Image.fromarray(noise_image(99, 8, 8)).save(folder / "test" / "r_1.png")
    after = load(folder).provenance
    assert before.pop("images_sha256") != after.pop("images_sha256")
    assert before == after


def test_a_loaded_scene_is_unchanged_by_saving_and_loading(tmp_path):
    scene = load(write_scene(tmp_path / "toy"), resolution=4)
    (tmp_path / "artifact").mkdir()
    save_scene(scene, tmp_path / "artifact")
    again = load_scene(tmp_path / "artifact")
    np.testing.assert_array_equal(again.train.images, scene.train.images)
    assert (again.intrinsics, again.provenance) == (scene.intrinsics, scene.provenance)


def test_progress_counts_all_images(tmp_path):
    seen = []
    load(write_scene(tmp_path), progress=lambda done, total, /, **_: seen.append((done, total)))
    assert seen == [(i, 13) for i in range(1, 14)]


def shear(data):
    data["frames"][1]["transform_matrix"][0][0] += 0.1


def insert_nan(data):
    data["frames"][1]["transform_matrix"][0][0] = math.nan


BAD_JSON = {
    "camera_angle_x nor fl_x": lambda d: d.pop("camera_angle_x"),
    "camera_angle_x is 'wide'": lambda d: d.update(camera_angle_x="wide"),
    "camera_angle_x is nan": lambda d: d.update(camera_angle_x=math.nan),
    "not between 0 and pi": lambda d: d.update(camera_angle_x=0),
    "invalid intrinsics": lambda d: d.update(fl_x=-1),
    "an integer of 401 digits": lambda d: d.update(fl_x=10**400),
    "images of 8 x 0 pixels": lambda d: d.update(w=8, h=0),
    "images of 16 x 8 pixels": lambda d: d.update(w=16, h=8),
    "undistort the images": lambda d: d.update(camera_model="OPENCV_FISHEYE"),
    "the distortion terms k3 are not supported": lambda d: d.update(k3=0.1),
    "frame 1: the camera .* differs": lambda d: d["frames"][1].update(fl_x=9),
    "frame 1: the pose holds NaN": insert_nan,
    "frame 1: the pose is not a rigid motion": shear,
    "frame 2: transform_matrix": lambda d: d["frames"][2].pop("transform_matrix"),
    "frame 3: transform_matrix": lambda d: d["frames"][3].update(transform_matrix=[[1, 2], [3]]),
    "frame 0: the frame has no file_path": lambda d: d["frames"].insert(0, {}),
    "the file lists no frames": lambda d: d.update(frames=[]),
    "no list `frames`": lambda d: d.update(frames={}),
    "have the same position": lambda d: [
        f.update(transform_matrix=np.diag([1.0, 1, 1, 1]).tolist()) for f in d["frames"]
    ],
    "cannot be opened": lambda d: d["frames"][1].update(file_path="a" * 5000),
    "cannot be opened .*null": lambda d: d["frames"][1].update(file_path="train/r\0.png"),
    "the last row of transform_matrix is": lambda d: d["frames"][1]["transform_matrix"][
        3
    ].__setitem__(0, 1),
}


@pytest.mark.parametrize("message", BAD_JSON)
def test_invalid_json_raises_an_error_of_one_line(tmp_path, message):
    edit(write_scene(tmp_path), BAD_JSON[message])
    with pytest.raises(SceneError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert "transforms_train.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    (write_scene(tmp_path) / "transforms_val.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SceneError, match=r"transforms_val.json"):
        load(tmp_path)


def test_a_different_camera_in_another_split_is_refused(tmp_path):
    edit(write_scene(tmp_path), lambda d: d.update(camera_angle_x=0.5), split="test")
    with pytest.raises(SceneError, match=r"transforms_test.json: the camera .* differs"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "train/../../outside.png", "{abs}"])
def test_paths_out_of_the_scene_folder_are_refused(tmp_path, name):
    outside = tmp_path / "outside.png"
    Image.fromarray(noise_image(0, 8, 8)).save(outside)
    folder = write_scene(tmp_path / "toy")
    name = name.replace("{abs}", str(outside))
    edit(folder, lambda d: d["frames"][1].update(file_path=name))
    with pytest.raises(SceneError, match=r"frame 1: .* is outside the scene folder"):
        load(folder)


def test_a_scene_folder_may_itself_be_a_link(tmp_path):
    write_scene(tmp_path / "toy")
    (tmp_path / "link").symlink_to(tmp_path / "toy")
    assert load(tmp_path / "link").test.names[0] == "test/r_0.png"


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no image")
    elif how == "size":
        Image.new("RGBA", (9, 8)).save(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot be read"),
        ("empty", "not a PNG, JPEG, WebP, TIFF"),
        ("text", "not a PNG, JPEG, WebP, TIFF"),
        ("size", "the image has 9 x 8 pixels, but r_0.png has 8 x 8"),
    ],
)
def test_errors_name_damaged_images(tmp_path, how, message):
    damage(write_scene(tmp_path) / "test" / "r_1.png", how)
    with pytest.raises(SceneError, match=message) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "test" / "r_1.png"))


def test_an_image_that_would_exhaust_the_memory_is_not_decoded(tmp_path):
    folder = write_scene(tmp_path)
    bomb = (folder / "train" / "r_0.png").read_bytes()
    # Only the header states 100,000 x 100,000 pixels; its checksum is correct.
    header = bomb[12:16] + (100_000).to_bytes(4, "big") * 2 + bomb[24:29]
    bomb = bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    (folder / "train" / "r_0.png").write_bytes(bomb)
    with pytest.raises(SceneError, match=r"r_0.png: .* decompression bomb"):
        load(folder)


def test_images_above_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 63)
    with pytest.raises(SceneError, match="8 x 8 pixels, which is too large"):
        load(write_scene(tmp_path))


def test_a_json_file_that_cannot_be_opened_is_refused(tmp_path):
    folder = write_scene(tmp_path)
    (folder / "transforms_val.json").unlink()
    (folder / "transforms_val.json").mkdir()
    with pytest.raises(SceneError, match=r"transforms_val.json: cannot be read"):
        load(folder)


def test_an_image_without_read_permission(tmp_path, monkeypatch):
    def refuse(path, **_):  # file modes do not restrict root, who may run the tests
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(
        SceneError, match=r"r_0.png: the image cannot be read \(Permission denied\);"
    ):
        load(write_scene(tmp_path))


def test_a_single_view_is_refused(tmp_path):
    with pytest.raises(SceneError, match="no images are left for training"):
        load(write_scene(tmp_path, train=1))


def test_the_files_of_a_folder_determine_its_format(tmp_path):
    write_scene(tmp_path / "toy")
    assert load(tmp_path / "toy", resolution=4, multiple=2).source == "blender"
    with pytest.raises(SceneError, match=r"contains scenes: toy; give one of them"):
        load(tmp_path)
    with pytest.raises(SceneError, match=r"transforms_train.json .* found r_0.png"):
        load(tmp_path / "toy" / "val")
    with pytest.raises(SceneError, match="there is no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(SceneError, match="not a readable folder"):
        load(tmp_path / "toy" / "transforms_train.json")
