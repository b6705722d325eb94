"""Scenes in the Blender form of NeRF: `transforms_{train,val,test}.json` beside their pictures.

Poses are camera-to-world and OpenGL (x right, y up, looking along -z), which is the project's world
frame: nothing is converted. The camera is `fl_x, fl_y, cx, cy, w, h, k1, k2, p1, p2` where the JSON
gives them, in pixels of a w x h picture, else the fields of view `camera_angle_x` and
`camera_angle_y`, with square pixels and a centred principal point where nothing is said.

Without `transforms_val.json` there are no validation views. Without `transforms_test.json` every
8th training view is held out as a test view.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lightfield.camera import Intrinsics, checked_poses
from lightfield.errors import SceneError
from lightfield.files import read_json, sha256_of
from lightfield.scenes.capture import Capture
from lightfield.scenes.frames import (
    HELD_OUT_EVERY,
    Frames,
    folder_entries,
    picture_path,
)
from lightfield.scenes.pictures import (
    ASPECT_TOLERANCE,
    PictureFormat,
    Resolution,
    picture_format,
)
from lightfield.scenes.scene import SPLITS

TRAIN_JSON = "transforms_train.json"
CAMERA_KEYS = (
    *("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y"),
    *("k1", "k2", "p1", "p2", "k3", "k4", "is_fisheye", "camera_model"),
)


def read_blender(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a scene folder that holds `transforms_train.json`; there is one size of images only.

    Raises:
        SceneError: when anything in the folder is missing, damaged, or makes no sense.
    """
    there = folder_entries(folder)
    files = {split: folder / f"transforms_{split}.json" for split in SPLITS}
    files = {s: path for s, path in files.items() if s == "train" or path.name in there}
    sources = {split: _json_object(path) for split, path in files.items()}
    splits, test_rule = _splits(folder, sources, files)
    pictures = picture_format([path for frames in splits.values() for path in frames.paths])
    return Capture(
        source="blender",
        kind="object",
        folder=folder,
        where=files["train"],
        splits=splits,
        format=pictures,
        camera=_common_camera(sources, files, pictures),
        described_by=tuple(files.values()),
        provenance={
            "poses": "as stored: camera-to-world, OpenGL axes",
            "test_views": test_rule,
            "json_sha256": {path.name: sha256_of(path) for path in files.values()},
        },
    )


def _splits(
    folder: Path, sources: dict[str, dict[str, Any]], files: dict[str, Path]
) -> tuple[dict[str, Frames], str]:
    """The frames of all three splits, and where the test views come from."""
    frames = {split: _frames(folder, data, files[split]) for split, data in sources.items()}
    train, val, test = (frames.get(split) for split in SPLITS)
    assert train is not None
    if test is not None:
        rule = "those of transforms_test.json"
    else:
        train, test = train.held_out()
        rule = f"no transforms_test.json: 1 in {HELD_OUT_EVERY} training views held out"
    if not len(train):
        raise SceneError("one frame cannot both train and test", where=files["train"])
    return {"train": train, "val": val or train.at([]), "test": test}, rule


def _json_object(path: Path) -> dict[str, Any]:
    data = read_json(path, SceneError)
    if not isinstance(data, dict) or not isinstance(data.get("frames"), list):
        raise SceneError("holds no list of frames", where=path, remedy="is it a Blender scene?")
    if not data["frames"]:
        raise SceneError("lists no frames", where=path, remedy="add views, or remove the file")
    return data


def _frames(folder: Path, data: dict[str, Any], path: Path) -> Frames:
    paths, poses = [], []
    for index, frame in enumerate(data["frames"]):
        where = f"{path}, frame {index}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise SceneError("frame has no file_path", where=where, remedy="remove the frame")
        if any(key in frame and frame[key] != data.get(key) for key in CAMERA_KEYS):
            raise SceneError(
                "frame has a camera of its own",
                where=where,
                remedy="all views of a scene must share one camera; undistort them to a common one",
            )
        paths.append(picture_path(folder, frame["file_path"], where=where))
        poses.append(_matrix(frame, where))
    return Frames(tuple(paths), checked_poses(np.stack(poses), where=path))


def _matrix(frame: dict[str, Any], where: str) -> Float[np.ndarray, "3 4"]:
    try:
        matrix = np.asarray(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        matrix = np.empty(0)
    if matrix.shape not in ((3, 4), (4, 4)):
        raise SceneError(
            "transform_matrix is not a 4 x 4 matrix of numbers",
            where=where,
            remedy="correct or remove the frame",
        )
    return matrix[:3]


def _common_camera(
    sources: dict[str, dict[str, Any]], files: dict[str, Path], source: PictureFormat
) -> Intrinsics:
    cameras = {
        split: camera_of(data, source, where=files[split]) for split, data in sources.items()
    }
    first = cameras["train"]
    for split, camera in cameras.items():
        ours, theirs = (
            (c.fx, c.fy, c.cx, c.cy, *(c.distortion or (0, 0, 0, 0))) for c in (first, camera)
        )
        if not np.allclose(ours, theirs, rtol=1e-4):
            raise SceneError(
                f"another camera (focal length {camera.fx:.1f}) than {TRAIN_JSON} ({first.fx:.1f})",
                where=files[split],
                remedy="all views of a scene must share one camera",
            )
    return first


def camera_of(data: dict[str, Any], pictures: PictureFormat, *, where: Path) -> Intrinsics:
    """The camera a transforms JSON describes, for pictures of the given size.

    Raises:
        SceneError: when it gives no focal length, or numbers that are no camera.
    """

    def number(key: str, default: float = 0.0) -> float:
        value = data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise SceneError(f"{key} is {value!r}, which is no number", where=where)
        return float(value)

    def focal(key: str, side: float) -> float:
        angle = number(key)
        if not 0 < angle < math.pi:
            raise SceneError(f"{key} is {angle:g}, not between 0 and pi radians", where=where)
        return 0.5 * side / math.tan(0.5 * angle)

    fisheye = data.get("is_fisheye") or "FISHEYE" in str(data.get("camera_model", "")).upper()
    if fisheye or number("k3") or number("k4"):
        raise SceneError(
            "fisheye lenses and terms beyond k1 k2 p1 p2 are not understood",
            where=where,
            remedy="undistort the pictures",
        )
    width, height = number("w", pictures.width), number("h", pictures.height)
    ratio = (width * pictures.height) / (height * pictures.width) if min(width, height) > 0 else 0.0
    if abs(ratio - 1) > ASPECT_TOLERANCE:
        raise SceneError(
            f"describes pictures of {width:g} x {height:g} pixels, but they have "
            f"{pictures.width} x {pictures.height}",
            where=where,
            remedy="correct w and h, or the pictures",
        )
    if "fl_x" in data:
        fx = number("fl_x")
        fy = number("fl_y", fx)
    elif "camera_angle_x" in data:
        fx = focal("camera_angle_x", width)
        fy = focal("camera_angle_y", height) if "camera_angle_y" in data else fx
    else:
        raise SceneError(
            "has neither camera_angle_x nor fl_x",
            where=where,
            remedy="add the camera's horizontal field of view in radians as camera_angle_x",
        )
    terms = tuple(number(key) for key in ("k1", "k2", "p1", "p2"))
    sx, sy = pictures.width / width, pictures.height / height
    try:
        return Intrinsics(
            pictures.width,
            pictures.height,
            fx * sx,
            fy * sy,
            number("cx", 0.5 * width) * sx,
            number("cy", 0.5 * height) * sy,
            terms if any(terms) else (),
        )
    except SceneError as reason:
        raise SceneError(reason.what, where=where, remedy="correct the intrinsics") from reason


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
