"""Forward-facing captures in the LLFF form: `poses_bounds.npy` beside folders of pictures.

Each of the n rows of `poses_bounds.npy` holds a 3 x 5 matrix, row by row, and two depths. The matrix
is [R | t | (height, width, focal)] of the full-resolution picture, where R's columns are the
camera's axes (down, right, back); the depths bound what the camera sees.

Conversion, as NeRF does it: axes become (right, up, back); lengths are divided by 0.75 of the nearest
depth, so that everything lies beyond the near plane z = -1; poses are expressed in their mean
camera. Fields are queried in NDC. Every 8th view, from the first, is a test view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lightfield.arrays import read_array
from lightfield.camera import Intrinsics, checked_poses
from lightfield.errors import SceneError
from lightfield.files import sha256_of
from lightfield.scenes.capture import Capture
from lightfield.scenes.frames import (
    HELD_OUT_EVERY,
    Frames,
    folder_entries,
    picture_path,
)
from lightfield.scenes.pictures import (
    ASPECT_TOLERANCE,
    SUFFIXES,
    PictureFormat,
    Resolution,
    picture_format,
)
from lightfield.transform import SceneTransform

POSES_FILE = "poses_bounds.npy"
PICTURE_FOLDERS = ("images_8", "images_4", "images")  # smallest first
USUAL_FOLDER = "images_4"
BOUND_FACTOR = 0.75


@dataclass(frozen=True)
class PosesBounds:
    """What `poses_bounds.npy` holds, in the project's axes but its own lengths (float64)."""

    poses: Float[np.ndarray, "n 3 4"]
    depths: Float[np.ndarray, "n 2"]
    height: float
    width: float
    focal: float


def read_llff(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a capture folder, from the smallest of its image folders that is large enough.

    Without a resolution it is `images_4`, where there is one.

    Raises:
        SceneError: when anything in the folder is missing, damaged, or makes no sense.
    """
    path = folder / POSES_FILE
    rows = read_poses_bounds(path)
    images = _chosen_pictures(folder, resolution, len(rows.poses))
    pictures = picture_format(images)
    unit = BOUND_FACTOR * float(rows.depths.min())
    train, test = Frames(tuple(images), rows.poses).held_out()
    if not len(train):
        raise SceneError("one view cannot both train and test", where=path)
    return Capture(
        source="llff",
        kind="forward",
        folder=folder,
        where=path,
        splits={"train": train, "val": train.at([]), "test": test},
        format=pictures,
        camera=_camera(rows, pictures, path),
        forward_frame=mean_camera_frame(rows.poses, unit),
        described_by=(path,),
        provenance={
            "poses": "axes (down, right, back) to (right, up, back); then in the mean camera",
            "unit_rule": f"{BOUND_FACTOR} of the nearest depth is 1",
            "pictures": images[0].parent.name,
            "test_views": f"1 in {HELD_OUT_EVERY} held out",
            "poses_sha256": sha256_of(path),
        },
    )


def read_poses_bounds(path: Path) -> PosesBounds:
    """Read `poses_bounds.npy`.

    Raises:
        SceneError: when it is missing, damaged, or holds impossible poses or depths.
    """
    rows = read_array(path, error=SceneError)
    if rows.ndim != 2 or rows.shape[1] != 17:
        raise SceneError(f"is {rows.shape}, not one row of 17 numbers per view", where=path)
    if not len(rows) or rows.dtype.kind != "f":
        raise SceneError(f"holds {len(rows)} views of type {rows.dtype}", where=path)
    values = np.array(rows, dtype=np.float64)
    matrix, depths = values[:, :15].reshape(-1, 3, 5), values[:, 15:]
    down, right, back, position, size = np.moveaxis(matrix, 2, 0)
    poses = np.stack([right, -down, back, position], axis=-1)
    checked_poses(poses, where=path)
    if not (np.isfinite(depths).all() and (depths[:, 0] > 0).all()):
        raise SceneError("depth bounds are not all positive numbers", where=path)
    if (
        not np.isfinite(size).all()
        or (size <= 0).any()
        or not np.allclose(size, size[0], rtol=1e-3)
    ):
        raise SceneError(
            "views differ in size or focal length, or have none",
            where=path,
            remedy="all views of a scene must share one camera",
        )
    height, width, focal = (float(value) for value in size[0])
    return PosesBounds(poses, depths, height, width, focal)


def mean_camera_frame(poses: Float[np.ndarray, "n 3 4"], unit: float) -> SceneTransform:
    """The frame of the mean camera: mean position, mean viewing axis, mean up.

    Not defined where the mean viewing axis or up vanishes.
    """
    back = poses[:, :, 2].mean(0)
    back /= np.linalg.norm(back)
    right = np.cross(poses[:, :, 1].mean(0), back)
    right /= np.linalg.norm(right)
    return SceneTransform.of(
        poses[:, :, 3].mean(0), unit, np.stack([right, np.cross(back, right), back])
    )


def _chosen_pictures(folder: Path, resolution: Resolution, count: int) -> list[Path]:
    """The files of the smallest picture folder that need not be enlarged, one per pose."""
    there = folder_entries(folder)
    found = {name: _pictures(folder, name) for name in PICTURE_FOLDERS if name in there}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise SceneError(
            f"no pictures in {', '.join(PICTURE_FOLDERS)}",
            where=folder,
            remedy="put one picture per pose into one of these folders",
        )
    chosen = list(found)[-1]
    if resolution is None:
        chosen = USUAL_FOLDER if USUAL_FOLDER in found else next(iter(found))
    else:
        wanted = max(resolution) if isinstance(resolution, tuple) else resolution
        for name, paths in found.items():
            first = picture_format(paths[:1])
            if wanted <= max(first.width, first.height):
                chosen = name
                break
    if len(found[chosen]) != count:
        raise SceneError(
            f"{len(found[chosen])} pictures but {count} poses in {POSES_FILE}",
            where=folder / chosen,
            remedy="there must be one picture per pose, in the order of their names",
        )
    return found[chosen]


def _pictures(folder: Path, name: str) -> list[Path]:
    place = folder / name
    return [
        picture_path(folder, f"{name}/{file}", where=place)
        for file in folder_entries(place)
        if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
    ]


def _camera(capture: PosesBounds, source: PictureFormat, path: Path) -> Intrinsics:
    ratio = (capture.width * source.height) / (capture.height * source.width)
    if abs(ratio - 1) > ASPECT_TOLERANCE:
        raise SceneError(
            f"describes pictures of {capture.width:g} x {capture.height:g} pixels, but they have "
            f"{source.width} x {source.height}",
            where=path,
            remedy="pictures may be resampled, not cropped or rotated",
        )
    fx = capture.focal * source.width / capture.width
    fy = capture.focal * source.height / capture.height
    return Intrinsics(source.width, source.height, fx, fy, 0.5 * source.width, 0.5 * source.height)
