"""Loading of transforms files as other programs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_scenes import ANGLE, edit, noise_image, ring_pose, write_scene
from PIL import Image

from lightfield.camera import checked_poses, rigid_poses
from lightfield.errors import SceneError
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.formats import load_scene_folder, read_capture
from lightfield.scenes.images import fitted_size


def single(folder: Path, count: int = 9, **more: Any) -> Path:
    """One `transforms.json` of all views, with more keys at the top."""
    write_scene(folder, train=count)
    path = folder / "transforms_train.json"
    (folder / "transforms.json").write_text(json.dumps({**json.loads(path.read_text()), **more}))
    path.unlink()
    return folder


def add_masks(folder: Path, white: Any, split: str = "train") -> None:
    """A mask beside every image of a split, white in a slice of its columns."""
    for path in (folder / split).glob("r_*.png"):
        mask = np.zeros((8, 8), np.uint8)
        mask[2:6, white] = 255
        Image.fromarray(noise_image(0, 8, 8)[..., :3]).save(path)
        Image.fromarray(mask).save(path.with_name(f"mask_{path.name}"))

    def name_masks(data: dict[str, Any]) -> None:
        for index, frame in enumerate(data["frames"]):
            frame["mask_path"] = f"{split}/mask_r_{index}.png"

    edit(folder, name_masks, split)


def notes(folder: Path) -> str:
    return "\n".join(read_capture(folder).notes)


def test_every_8th_view_of_a_single_file_is_held_out(tmp_path):
    capture = read_capture(single(tmp_path, 17, aabb_scale=16, scale=0.33, offset=[1, 2, 3]))
    names = [path.name for path in capture.splits["test"].paths]
    assert (capture.source, names) == ("transforms", ["r_0.png", "r_8.png", "r_16.png"])
    assert (len(capture.splits["train"]), len(capture.splits["val"])) == (14, 0)
    assert capture.notes == ()


def test_splits_that_a_single_file_lists_are_used(tmp_path):
    names = [f"train/r_{i}" for i in range(9)]
    folder = single(
        tmp_path, train_filenames=names[:5], val_filenames=[names[5]], test_filenames=names[6:8]
    )
    capture = read_capture(folder)
    found = {s: [p.stem for p in frames.paths] for s, frames in capture.splits.items()}
    assert found == {
        "train": ["r_0", "r_1", "r_2", "r_3", "r_4"],
        "val": ["r_5"],
        "test": ["r_6", "r_7"],
    }
    assert capture.notes == (
        "1 frames of transforms.json are not used, because none of its splits lists them",
    )


def test_files_of_splits_are_preferred_to_a_single_file(tmp_path):
    folder = write_scene(tmp_path, train=2, test=1)
    (folder / "transforms.json").write_text("{}")
    assert "transforms.json is not used, because transforms_train.json exists" in notes(folder)


def test_frames_without_images_are_skipped_and_counted(tmp_path):
    folder = write_scene(tmp_path, train=5, test=2)
    for index in (1, 3):
        (folder / "train" / f"r_{index}.png").unlink()
    capture = read_capture(folder)
    assert [path.stem for path in capture.splits["train"].paths] == ["r_0", "r_2", "r_4"]
    np.testing.assert_allclose(capture.splits["train"].poses[1], ring_pose(2)[:3])
    assert capture.notes == (
        "2 of 5 frames of transforms_train.json are skipped, because their image files are "
        "missing; the first is './train/r_1'",
    )


def test_the_error_for_a_scene_without_images_names_the_first_image(tmp_path):
    folder = write_scene(tmp_path, train=2, test=1)
    for image in folder.glob("train/*"):
        image.unlink()
    with pytest.raises(
        SceneError, match=r"frame 0: the image './train/r_0' is missing; restore .*r_0.png"
    ):
        read_capture(folder)


def test_test_poses_without_images_hold_out_training_views(tmp_path):
    folder = write_scene(tmp_path, train=9, val=1, test=4)
    for image in [*folder.glob("test/*"), *folder.glob("val/*")]:
        image.unlink()
    capture = read_capture(folder)
    assert {s: len(f) for s, f in capture.splits.items()} == {"train": 7, "val": 0, "test": 2}
    assert (
        "none of the 4 frames of transforms_test.json has an image file, so every 8th"
        in "".join(capture.notes)
    )


INTRINSICS = {"w": 8, "h": 8, "fl_x": 11.0, "fl_y": 12.0, "cx": 4.5, "cy": 3.5, "k1": 0.01}


def test_frames_may_each_state_the_same_camera(tmp_path):
    folder = write_scene(tmp_path, train=4, test=2)
    for split in ("train", "test"):
        edit(folder, lambda d: d.pop("camera_angle_x"), split)
        edit(folder, lambda d: [f.update(INTRINSICS) for f in d["frames"]], split)
    edit(folder, lambda d: d["frames"][1].update(fl_x=11.0005))
    camera = read_capture(folder).camera
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (11, 12, 4.5, 3.5)
    edit(folder, lambda d: d["frames"][1].update(fl_x=11.5))
    with pytest.raises(SceneError, match=r"frame 1: the camera .* differs"):
        read_capture(folder)


def test_the_focal_length_of_a_frame_overrides_the_top_level(tmp_path):
    folder = write_scene(tmp_path, train=3, test=1, camera={"fl_x": 10.0})
    angle = 2 * np.arctan(4 / 10.0)
    edit(folder, lambda d: d["frames"][1].update(camera_angle_x=angle))
    assert read_capture(folder).camera.fx == 10


PROJECTIONS = [
    {"camera_model": "EQUIRECTANGULAR"},
    {"camera_model": "OPENCV_FISHEYE"},
    {"camera_model": "orthophoto"},
    {"camera_model": "something new"},
    {"camera_model": 3},
    {"is_equirectangular": True},
    {"is_fisheye": True},
    {"is_spherical": 1},
    {"type": "panorama"},
    {"ftheta_p1": 0.2},
    {"k3": 0.1},
    {"k5": -0.1},
]


@pytest.mark.parametrize("keys", PROJECTIONS, ids=str)
@pytest.mark.parametrize("place", ["top", "frame"])
def test_other_projections_are_refused(tmp_path, keys, place):
    folder = write_scene(tmp_path, train=2, test=1)
    edit(folder, lambda d: (d if place == "top" else d["frames"][1]).update(keys))
    with pytest.raises(SceneError, match=f"{next(iter(keys))}.*undistort") as error:
        read_capture(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"camera_model": "OPENCV", "k3": 0, "k4": 0.0, "is_fisheye": False},
        {"camera_model": "pinhole", "orientation_override": "none"},
        {"applied_transform": [[1, 0, 0, 0]], "applied_scale": 2.0, "ply_file_path": "a.ply"},
        {"type": "image", "is_equirectangular": None, "rolling_shutter": [0, 0, 0, 0]},
    ],
    ids=str,
)
def test_no_note_mentions_harmless_keys(tmp_path, keys):
    folder = write_scene(tmp_path, train=2, test=1)
    edit(folder, lambda d: d.update(keys))
    edit(folder, lambda d: d["frames"][0].update(sharpness=3.0, colmap_im_id=1, timestamp=0.5))
    assert notes(folder) == ""


def test_one_note_lists_unused_keys(tmp_path):
    folder = write_scene(tmp_path, train=3, test=1)
    edit(folder, lambda d: d.update(rolling_shutter=[0, 0, 1, 0]))
    edit(folder, lambda d: [f.update(time=i, odd="yes") for i, f in enumerate(d["frames"])])
    assert notes(folder) == "these keys of the JSON are not used: rolling_shutter, odd, time"


def test_masks_that_isolate_the_object_become_alpha_channels(tmp_path):
    folder = write_scene(tmp_path, train=8, test=2)
    for split in ("train", "test"):
        add_masks(folder, slice(2, 6), split)
    scene = load_scene_folder(folder, SceneChoice())
    alpha = scene.train.alpha
    assert alpha is not None
    assert alpha[0, 3].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    np.testing.assert_array_equal(scene.train.images[0][alpha[0] == 0], 255)
    np.testing.assert_array_equal(
        scene.train.images[0][alpha[0] > 0], noise_image(0, 8, 8)[..., :3][alpha[0] > 0]
    )
    assert "the masks (mask_path) are used as alpha channels of the images" in scene.notes
    described = read_capture(folder).described_by
    assert folder / "test" / "mask_r_1.png" in described


def test_masks_are_multiplied_with_alpha_channels(tmp_path):
    folder = write_scene(tmp_path, train=2, test=1)
    for split in ("train", "test"):
        add_masks(folder, slice(2, 6), split)
    faint = np.full((8, 8, 4), 100, np.uint8)
    Image.fromarray(faint).save(folder / "train" / "r_1.png")
    alpha = load_scene_folder(folder, SceneChoice()).train.alpha
    assert alpha is not None
    assert alpha[1, 3].tolist() == [0, 0, 100, 100, 100, 100, 0, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "train" / "mask_r_1.png").unlink(), "1 of 4 images have no mask"),
        (
            lambda folder: Image.new("L", (4, 4)).save(folder / "train" / "mask_r_1.png"),
            "mask_r_1.png has 4 x 4 pixels, but the images have 8 x 8",
        ),
        (lambda folder: add_white_masks(folder), "do not isolate an object"),
    ],
)
def test_a_note_gives_the_reason_for_unused_masks(tmp_path, change, reason):
    folder = write_scene(tmp_path, train=3, test=1)
    for split in ("train", "test"):
        add_masks(folder, slice(2, 6), split)
    change(folder)
    capture = read_capture(folder)
    assert not capture.image_format.has_alpha
    assert any(n.startswith("the masks (mask_path) are not used: ") for n in capture.notes)
    assert reason in "".join(capture.notes)


def add_white_masks(folder: Path) -> None:
    for mask in folder.glob("*/mask_*.png"):
        pixels = np.full((8, 8), 255, np.uint8)
        pixels[4:6, 4:6] = 0
        Image.fromarray(pixels).save(mask)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_with_a_byte_order_mark_is_read(tmp_path, encoding):
    folder = write_scene(tmp_path, train=2, test=1)
    path = folder / "transforms_train.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert len(read_capture(folder).splits["train"]) == 2


def test_scaled_and_rounded_rotations_are_repaired():
    poses = np.stack([ring_pose(i)[:3] for i in range(6)])
    scaled = poses.copy()
    scaled[1:3, :, :3] *= [[[1.5]], [[0.01]]]
    repaired, repairs = rigid_poses(scaled, where="here")
    np.testing.assert_allclose(repaired, poses, atol=1e-12)
    assert repairs == [
        "the rotations of 2 of 6 poses contain a scale of 0.01 to 1.5; the scale is removed"
    ]
    rounded, repairs = rigid_poses(poses.round(2), where="here")
    checked_poses(rounded, where="here")
    np.testing.assert_allclose(rounded, poses, atol=0.01)
    assert "of 6 poses are rounded" in repairs[0]
    exact, repairs = rigid_poses(poses, where="here")
    np.testing.assert_array_equal(exact, poses)
    assert repairs == []


@pytest.mark.parametrize(
    "block",
    [
        np.diag([1.0, 1.0, -1.0]),
        np.diag([1.0, 1.2, 1.0]),
        np.array([[1, 0.05, 0], [0, 1, 0], [0, 0, 1.0]]),
        np.zeros((3, 3)),
        np.full((3, 3), np.nan),
        1e200 * np.eye(3),
    ],
    ids=["mirror", "stretch", "shear", "zero", "nan", "huge"],
)
def test_matrices_that_are_not_rigid_are_refused(block):
    poses = np.stack([ring_pose(i)[:3] for i in range(2)])
    poses[1, :, :3] = poses[1, :, :3] @ block
    with pytest.raises(SceneError, match="frame 1: the pose"):
        rigid_poses(poses, where="here")


@pytest.mark.parametrize(
    ("source", "wanted", "multiple", "expected"),
    [
        ((2220, 1080), 200, 8, (200, 96)),
        ((555, 270), 200, 8, (200, 96)),
        ((1080, 2340), 200, 8, (88, 192)),
        ((2532, 1170), 200, 8, (192, 88)),
        ((1080, 2400), 800, 8, (360, 800)),
        ((1920, 1080), 400, 12, (384, 216)),
    ],
)
def test_fitted_sizes_of_phone_images_are_near_the_requested_size(
    source, wanted, multiple, expected
):
    size = fitted_size(source[0], source[1], wanted, multiple=multiple)
    stretch = size[0] / size[1] / (source[0] / source[1])
    assert max(size) >= 0.9 * wanted
    assert abs(stretch - 1) < 0.06
    assert size == expected


def test_a_note_mentions_a_stretch_and_the_camera_is_stretched(tmp_path):
    folder = write_scene(tmp_path, width=37, height=18, train=8, test=1)
    scene = load_scene_folder(folder, SceneChoice(resolution=32, multiple=8))
    camera = scene.intrinsics
    assert (camera.width, camera.height) == (32, 16)
    focal = 18.5 / np.tan(ANGLE / 2)
    assert (camera.fx, camera.fy) == pytest.approx((focal * 32 / 37, focal * 16 / 18))
    assert any(
        "resampled to 32 x 16, which stretches their height by 2.8%" in n for n in scene.notes
    )
