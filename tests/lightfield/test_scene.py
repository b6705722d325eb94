"""Saving and loading of scenes."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import CheckpointError, SceneError
from lightfield.rays import RaySpace
from lightfield.scenes.scene import SPLITS, Box, Scene, Views, load_scene, save_scene

HEIGHT, WIDTH = 6, 8


def views(count: int, *, seed: int, alpha: bool = False) -> Views:
    random = np.random.default_rng(seed)
    up = np.array([0.0, 0.0, 1.0])
    poses = [look_at(position, np.zeros(3), up) for position in random.normal(size=(count, 3))]
    return Views(
        tuple(f"r_{seed}_{i}" for i in range(count)),
        np.array(poses, np.float32).reshape(count, 3, 4),
        random.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8),
        random.integers(0, 256, (count, HEIGHT, WIDTH), np.uint8) if alpha else None,
    )


def scene(**changes) -> Scene:
    made = Scene(
        name="toy",
        source="bricks",
        intrinsics=Intrinsics(WIDTH, HEIGHT, 9.0, 8.0, 4.5, 2.5, (0.1, 0.0, 0.0, 0.0)),
        space=RaySpace("world", 2.0, 6.0),
        box=Box((0.0, 0.5, -0.25), 1.5),
        background=(1.0, 1.0, 1.0),
        train=views(3, seed=1, alpha=True),
        val=views(0, seed=2),
        test=views(2, seed=3),
        provenance={"seed": 7, "hashes": {"r_0.png": "ab"}},
    )
    return replace(made, **changes)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_scene(scene(), tmp_path)
    return tmp_path


def test_a_scene_is_unchanged_by_saving_and_loading(saved):
    original, loaded = scene(), load_scene(saved)
    for split in SPLITS:
        a: Views = getattr(original, split)
        b: Views = getattr(loaded, split)
        assert a.names == b.names
        np.testing.assert_array_equal(a.poses, b.poses)
        np.testing.assert_array_equal(a.images, b.images)
        assert (a.alpha is None) == (b.alpha is None)
        if a.alpha is not None and b.alpha is not None:
            np.testing.assert_array_equal(a.alpha, b.alpha)
    splits = {split: getattr(original, split) for split in SPLITS}
    assert replace(loaded, **splits) == original


def test_loaded_images_are_memory_maps(saved):
    loaded = load_scene(saved)
    assert isinstance(loaded.train.images, np.memmap)
    assert isinstance(loaded.train.alpha, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.train.images[0] = 0


def test_image_returns_floats_from_0_to_1():
    train = views(2, seed=1)
    train.images[1, 0, 0] = [0, 51, 255]
    image = train.image(1)
    assert image.dtype == np.float32
    assert image[0, 0].tolist() == [0.0, pytest.approx(0.2), 1.0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_scene_without_views_is_refused(split):
    with pytest.raises(SceneError, match=f"toy: the scene has no {split} views"):
        scene(**{split: views(0, seed=0)})


FILES = ("scene.json", "train_images.npy", "train_alpha.npy", "test_poses.npy", "val_images.npy")


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [name for name in FILES if "alpha" not in name])
def test_the_error_for_a_missing_file_names_it(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_scene(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"hello, world",
        lambda content: b"PK\x03\x04" + bytes(50),
        lambda content: pickle.dumps({"poses": 1}),
        lambda content: array_file(np.array([{}], dtype=object)),
        lambda content: array_file(np.zeros((5, 4))),
        lambda content: array_file(np.array(3.0)),
    ],
    ids=["empty", "half", "stump", "text", "zip", "pickle", "objects", "other_array", "scalar"],
)
@pytest.mark.usefixtures("unchecked")
def test_a_damaged_file_is_refused(saved, name, damage):
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    with pytest.raises(CheckpointError):
        load_scene(saved)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train_images", np.zeros((3, HEIGHT, WIDTH, 3), np.float32)),
        ("train_images", np.zeros((3, WIDTH, HEIGHT, 3), np.uint8)),
        ("train_images", np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)),
        ("train_alpha", np.zeros((3, HEIGHT, WIDTH, 1), np.uint8)),
        ("train_poses", np.zeros((3, 4, 4), np.float32)),
        ("train_poses", np.zeros((3, 3, 4), np.int64)),
        ("val_images", np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_array_of_another_dtype_or_shape_is_refused(saved, name, array):
    np.save(saved / f"{name}.npy", array)
    with pytest.raises(CheckpointError, match=rf"{name}\.npy: holds {array.dtype} values"):
        load_scene(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_cameras_with_invalid_or_huge_positions_are_refused(saved, value):
    poses = np.load(saved / "train_poses.npy")
    poses[1, 0, 3] = value
    np.save(saved / "train_poses.npy", poses)
    with pytest.raises(CheckpointError, match=r"scene\.json: not a scene of this tool"):
        load_scene(saved)


def without(key):
    return lambda data: {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(
    "damage",
    [
        *map(without, ["name", "intrinsics", "space", "box", "names", "provenance"]),
        lambda data: [],
        lambda data: None,
        lambda data: data | {"intrinsics": data["intrinsics"] | {"fx": 0}},
        lambda data: data | {"intrinsics": data["intrinsics"] | {"skew": 1}},
        lambda data: data | {"space": data["space"] | {"near": 9}},
        lambda data: data | {"space": "world"},
        lambda data: data | {"box": {"center": None, "half_extent": 1}},
        lambda data: data | {"box": {"center": [0, 0, 0], "half_extent": "3"}},
        lambda data: data | {"box": {"center": [0, 0, 0], "half_extent": 0}},
        lambda data: data | {"box": {"center": [0, 0, 0], "half_extent": float("nan")}},
        lambda data: data | {"box": {"center": [0, 1e300, 0], "half_extent": 1}},
        lambda data: data | {"box": {"center": [0, 0], "half_extent": 1}},
        lambda data: data | {"box": {"center": ["0", 0, 0], "half_extent": 1}},
        lambda data: data | {"background": [1, 1]},
        lambda data: data | {"background": [1, 1, float("nan")]},
        lambda data: data | {"background": "white"},
        lambda data: data | {"space": data["space"] | {"far": 1e308}},
        lambda data: data | {"space": data["space"] | {"far": "9"}},
        lambda data: data | {"space": data["space"] | {"near": float("nan")}},
        lambda data: data | {"intrinsics": data["intrinsics"] | {"width": "24"}},
        lambda data: data | {"intrinsics": data["intrinsics"] | {"distortion": 3}},
        lambda data: data | {"intrinsics": list(data["intrinsics"])},
        lambda data: data | {"names": data["names"] | {"train": "abc"}},
        lambda data: data | {"provenance": "nowhere"},
        lambda data: data | {"names": {"train": ["a"], "val": [], "test": ["b"]}},
        lambda data: data | {"names": {"train": ["a", "b", "c"]}},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_incompatible_scene_json_is_refused(saved, damage):
    data = json.loads((saved / "scene.json").read_text())
    (saved / "scene.json").write_text(json.dumps(damage(data)))
    with pytest.raises(CheckpointError):
        load_scene(saved)


def test_a_scene_of_an_earlier_version_is_refused_with_a_remedy(saved):
    path = saved / "scene.json"
    data = json.loads(path.read_text())
    del data["transform"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"earlier version.*nelf scene"):
        load_scene(saved)
