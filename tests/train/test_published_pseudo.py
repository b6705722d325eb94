"""Published pseudo folders: written from a known scene, read back, and distrusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import WORLD, orbit_poses

from lightfield.camera import Intrinsics
from lightfield.errors import CheckpointError
from lightfield.rays import camera_rays
from train.posed_images import IMAGES, load_poses
from train.published_pseudo import BLENDER_UNIT, load_published_pseudo

CAMERA = Intrinsics(24, 16, 20.0, 20.0, 12.0, 8.0)
COUNT = 5
FLIP = np.diag([1.0, -1.0, -1.0])


def seen(pose: np.ndarray) -> np.ndarray:
    """Colors float32 [H W, 3] that depend on every ray of the camera, a little outside of [0, 1]."""
    origins, directions = camera_rays(torch.from_numpy(pose), CAMERA, WORLD)
    return (0.5 + 0.6 * torch.sin(2 * origins + 3 * directions)).view(-1, 3).numpy()


def write_folder(folder: Path, kind: str, poses: np.ndarray, scale: float = 2.5) -> None:
    """As the published teacher writes it: an 8 times smaller camera, centers in its own units."""
    forward = kind == "forward"
    info = {
        "downscaled_height": 2, "downscaled_width": 3, "downscaled_focal": 2.5, "scale": scale,
        "max_radius": 1.6, "ff": forward, "dataset_type": "nerf" if kind == "blender" else "colmap",
    }  # fmt: skip
    for name in ("hwf", "poses", "16x24_rgb", "vis"):
        (folder / name).mkdir(parents=True)
    (folder / "hwf/dataset_info.json").write_text(json.dumps(info))
    for index, pose in enumerate(poses):
        colors = seen(pose)
        if forward:
            array = np.concatenate([FLIP @ pose[:, :3] @ FLIP, FLIP @ pose[:, 3:] / scale], axis=1)
        else:
            unit = BLENDER_UNIT if kind == "blender" else 1 / 1.6
            array = pose[:, 3] / unit
        np.save(folder / f"poses/c2w_{index:05d}.npy", array.astype(np.float32))
        np.save(folder / f"16x24_rgb/rendered_rgb_{index:05d}.npy", colors)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "ours").mkdir()
    return tmp_path / "ours"


@pytest.mark.parametrize("kind", ["blender", "orbit", "forward"])
def test_images_and_rays_are_those_of_the_scene_they_were_made_from(tmp_path, into, kind):
    poses = orbit_poses(COUNT)
    write_folder(tmp_path / "theirs", kind, poses)
    calls = []
    images, camera = load_published_pseudo(
        tmp_path / "theirs", into, progress=lambda done, total: calls.append((done, total))
    )
    assert camera == CAMERA
    assert load_poses(into) == pytest.approx(poses, abs=1e-5)
    expected = [(255 * seen(pose).clip(0, 1)).round().reshape(16, 24, 3) for pose in poses]
    assert np.array_equal(images, np.stack(expected))
    assert images.dtype == np.uint8
    assert isinstance(images, np.memmap)
    assert calls == [(n, COUNT) for n in range(1, COUNT + 1)]
    assert np.array_equal(np.load(into / IMAGES), images)


def test_another_unit_moves_the_cameras_only(tmp_path, into):
    poses = orbit_poses(COUNT)
    write_folder(tmp_path / "theirs", "forward", poses)
    load_published_pseudo(tmp_path / "theirs", into, unit=0.5)
    converted = load_poses(into)
    assert converted[:, :, 3] == pytest.approx(0.5 * poses[:, :, 3], abs=1e-5)
    assert converted[:, :, :3] == pytest.approx(poses[:, :, :3], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("16x24_rgb/rendered_rgb_00003.npy", np.zeros((16 * 24, 3))),
        ("16x24_rgb/rendered_rgb_00003.npy", np.zeros((16, 24, 3), np.float32)),
        ("16x24_rgb/rendered_rgb_00003.npy", np.full((16 * 24, 3), np.nan, np.float32)),
        ("16x24_rgb/rendered_rgb_00003.npy", np.array([{}, 1], dtype=object)),
        ("poses/c2w_00003.npy", np.zeros((3, 4), np.float32)),
        ("poses/c2w_00003.npy", np.array([0, 0, 2], np.float32)),
        ("poses/c2w_00003.npy", np.array([np.nan, 1, 2], np.float32)),
        ("poses/c2w_00003.npy", np.array([{}, 1], dtype=object)),
        ("poses/c2w_00003.npy", np.array([np.inf, 1, 2], np.float32)),
        ("poses/c2w_00003.npy", np.array([1e30, 1, 2], np.float32)),
        ("poses/c2w_00003.npy", np.zeros(1 << 20, np.float32)),
    ],
)
def test_wrong_and_pickled_arrays_are_refused_by_name(tmp_path, into, name, array, unchecked):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    np.save(tmp_path / "theirs" / name, array, allow_pickle=True)
    with pytest.raises(CheckpointError, match=Path(name).name):
        load_published_pseudo(tmp_path / "theirs", into)


def test_poses_that_are_not_rotations_are_refused(tmp_path, into, unchecked):
    write_folder(tmp_path / "theirs", "forward", orbit_poses(COUNT))
    np.save(tmp_path / "theirs/poses/c2w_00001.npy", np.ones((3, 4), np.float32))
    with pytest.raises(CheckpointError, match=r"c2w_00001.npy.*rigid"):
        load_published_pseudo(tmp_path / "theirs", into)


@pytest.mark.parametrize("name", ["16x24_rgb/rendered_rgb_00002.npy", "poses/c2w_00002.npy"])
@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_missing_and_truncated_files_are_refused(tmp_path, into, name, change):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    path = tmp_path / "theirs" / name
    if change == "truncated":
        os.truncate(path, path.stat().st_size - 3)
    else:
        path.rename(path.with_name("another.npy"))
    with pytest.raises(CheckpointError, match=path.name):
        load_published_pseudo(tmp_path / "theirs", into)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"downscaled_height": 3}, "integer multiple"),
        ({"downscaled_focal": -1.0}, "positive"),
        ({"scale": "big"}, "does not describe"),
        ({"max_radius": None}, "does not describe"),
        ({"downscaled_width": float("inf")}, "does not describe"),
        ({"downscaled_focal": float("nan")}, "positive"),
        ({"downscaled_focal": 5000 * "9."}, "does not describe .{,130}$"),
        ({"max_radius": 1e-300}, "positive"),
        ({"dataset_type": (1 << 20) * "x"}, "more than 1 MiB of text"),
    ],
)
def test_descriptions_that_fit_no_images_are_refused(tmp_path, into, change, said, unchecked):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    path = tmp_path / "theirs/hwf/dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        load_published_pseudo(tmp_path / "theirs", into)


@pytest.mark.parametrize(
    "header",
    [
        "(" * 9000, "-" * 9000 + "1", "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10 ** 99,)}", "{'descr': 'V0'}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + 99 * "9" + ",)}", "\0",
    ],
)  # fmt: skip
def test_invalid_headers_are_refused_in_one_line(tmp_path, into, header):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    path = tmp_path / "theirs/poses/c2w_00001.npy"
    text = header.encode("latin1") + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12))
    with pytest.raises(CheckpointError, match=r"c2w_00001\.npy: .{,130}$"):
        load_published_pseudo(tmp_path / "theirs", into)


@pytest.mark.parametrize("name", ["hwf/dataset_info.json", "poses/c2w_00002.npy"])
def test_a_pipe_is_refused_unopened(tmp_path, into, name):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    (tmp_path / "theirs" / name).unlink()
    os.mkfifo(tmp_path / "theirs" / name)
    with pytest.raises(CheckpointError, match=rf"{Path(name).name}: .*not a regular file"):
        load_published_pseudo(tmp_path / "theirs", into)


@pytest.mark.parametrize("names", [[], ["8x8_rgb"]])
def test_a_folder_without_one_set_of_images_is_refused(tmp_path, into, names):
    write_folder(tmp_path / "theirs", "blender", orbit_poses(COUNT))
    for name in names:
        (tmp_path / "theirs" / name).mkdir()
    if not names:
        (tmp_path / "theirs/16x24_rgb").rename(tmp_path / "theirs/images")
    with pytest.raises(CheckpointError, match="one folder named like"):
        load_published_pseudo(tmp_path / "theirs", into)


def test_files_of_file_managers_are_not_read_as_images(tmp_path, into):
    write_folder(tmp_path / "theirs", "orbit", orbit_poses(COUNT))
    for name in ("._rendered_rgb_00000.npy", "mean.npy", ".DS_Store"):
        (tmp_path / "theirs/16x24_rgb" / name).write_bytes(b"\0\5\26\7")
    assert len(load_published_pseudo(tmp_path / "theirs", into)[0]) == COUNT
