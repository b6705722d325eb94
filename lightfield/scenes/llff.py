"""Loader of LLFF captures: `poses_bounds.npy` beside folders of images.

Each of the n rows of `poses_bounds.npy` holds a 3 x 5 matrix, row by row, and two depths. The
matrix is [R | t | (height, width, focal)] of the full-resolution image, where R's columns are the
camera's axes (down, right, back). The depths bound the part of the scene that the camera sees.

The rows belong to the images in the alphabetical order of their names, as LLFF writes them. Every
8th view, from the first, is a test view. The loader converts the axes to (right, up, back).

Captures whose cameras face forward are converted as in NeRF. Lengths are divided by 0.75 of the
nearest depth, so that the whole scene is beyond the near plane z = -1. Poses are expressed in the
frame of the mean camera, and fields are queried in NDC. Views whose depth bounds are impossible, or
far nearer than those of most views, do not set the nearest depth. A capture whose cameras surround
an object (nerf_real_360) is loaded as an object, and its depths are not used.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lightfield.arrays import read_array
from lightfield.camera import Intrinsics, rigid_poses
from lightfield.errors import SceneError
from lightfield.files import sha256_of
from lightfield.scenes.capture import Capture, CaptureKind
from lightfield.scenes.decoding import SUFFIXES, UNREAD_SUFFIXES
from lightfield.scenes.frames import HELD_OUT_EVERY, Frames
from lightfield.scenes.image_files import ImageFinder, folder_entries, kind_of
from lightfield.scenes.images import ImageFormat, Resolution, is_same_aspect, read_image_format
from lightfield.transform import SceneTransform

POSES_FILE = "poses_bounds.npy"
IMAGE_FOLDERS = ("images_8", "images_4", "images_2", "images")
"""Folders of images, from the smallest images to the largest."""
DEFAULT_FOLDER = "images_4"
BOUND_FACTOR = 0.75
OUTLIER_RATIO = 0.2
"""A view whose nearest depth is below this fraction of the median is an outlier."""
OUTLIER_FRACTION = 0.1
"""Largest fraction of the views that can be outliers; when more views are near, all of them
count."""
FORWARD_ANGLE = math.radians(30)
"""Largest angle to the mean viewing axis of cameras that face forward."""
FORWARD_FRACTION = 0.8
"""Fraction of the cameras that must be within the angle. A few damaged poses thus do not turn a
forward-facing capture into an object; `bounds.forward_bounds` refuses these poses by their
frusta."""


@dataclass(frozen=True)
class PosesBounds:
    """The contents of `poses_bounds.npy`, in the project's axes and the file's units (float64)."""

    poses: Float[np.ndarray, "n 3 4"]
    depths: Float[np.ndarray, "n 2"]
    height: float
    width: float
    focal: float
    notes: tuple[str, ...] = ()


def read_llff(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a capture folder.

    The images come from the smallest image folder that has at least the resolution. Without a
    resolution they come from `images_4` when it exists, else from the smallest folder.

    Raises:
        SceneError: when a file in the folder is missing, damaged or invalid.
    """
    path = folder / POSES_FILE
    rows = read_poses_bounds(path)
    finder = ImageFinder(folder)
    images = _chosen_images(finder, folder, resolution, len(rows.poses))
    image_format = read_image_format(images, (rows.width, rows.height))
    train, test = Frames(tuple(images), rows.poses).held_out()
    if not len(train):
        raise SceneError(
            "no images are left for training, because the only one is held out for testing",
            where=path,
            remedy="add at least one image and its pose",
        )
    kind = capture_kind(rows.poses)
    frame, unit_rule, notes = SceneTransform(), {}, ()
    if kind == "forward":
        nearest, notes = nearest_depth(rows.depths, path)
        frame = mean_camera_frame(rows.poses, BOUND_FACTOR * nearest)
        unit_rule = {"unit_rule": f"{BOUND_FACTOR} of the nearest depth is 1"}
    else:
        notes = (
            "the cameras do not all face forward, so the capture is loaded as an object that the "
            "cameras surround",
        )
    return Capture(
        source="llff",
        kind=kind,
        folder=folder,
        where=path,
        splits={"train": train, "val": train.at([]), "test": test},
        image_format=image_format,
        camera=_camera(rows, image_format, path),
        forward_frame=frame,
        described_by=(path,),
        notes=(*rows.notes, *notes, *_order_notes(images), *finder.notes(), *image_format.notes),
        provenance={
            "poses": "converted from axes (down, right, back) to (right, up, back)"
            + ("; expressed in the frame of the mean camera" if kind == "forward" else ""),
            **unit_rule,
            "images": images[0].parent.name,
            "test_views": f"every {HELD_OUT_EVERY}th view is held out",
            "poses_sha256": sha256_of(path),
        },
    )


def read_poses_bounds(path: Path) -> PosesBounds:
    """Read `poses_bounds.npy`.

    Raises:
        SceneError: when it is missing, damaged, or holds impossible poses.
    """
    rows = read_array(path, error=SceneError)
    if rows.ndim != 2 or rows.shape[1] != 17:
        raise SceneError(
            f"the array has shape {rows.shape}, not one row of 17 numbers per view",
            where=path,
            remedy="give the file that LLFF's imgs2poses.py writes",
        )
    if not len(rows) or rows.dtype.kind != "f":
        raise SceneError(
            f"the array holds {len(rows)} rows of type {rows.dtype}, but it must hold at least one "
            "row of floating-point numbers",
            where=path,
        )
    values = np.array(rows, dtype=np.float64)
    matrix, depths = values[:, :15].reshape(-1, 3, 5), values[:, 15:]
    down, right, back, position, size = np.moveaxis(matrix, 2, 0)
    poses, notes = rigid_poses(np.stack([right, -down, back, position], axis=-1), where=path)
    if (
        not np.isfinite(size).all()
        or (size <= 0).any()
        or not np.allclose(size, size[0], rtol=1e-3)
    ):
        raise SceneError(
            "the views do not all have the same positive size and focal length",
            where=path,
            remedy="resample the images to one common camera",
        )
    height, width, focal = (float(value) for value in size[0])
    return PosesBounds(poses, depths, height, width, focal, tuple(notes))


def capture_kind(poses: Float[np.ndarray, "n 3 4"]) -> CaptureKind:
    """Whether the cameras face forward or surround an object.

    They face forward when at least 80 % of the viewing axes are within 30 degrees of their mean.
    """
    backs = poses[:, :, 2]
    mean = backs.mean(0)
    cosines = backs @ mean / max(float(np.linalg.norm(mean)), 1e-12)
    angle = np.quantile(np.arccos(np.clip(cosines, -1, 1)), FORWARD_FRACTION)
    return "forward" if angle <= FORWARD_ANGLE else "object"


def nearest_depth(depths: Float[np.ndarray, "n 2"], path: Path) -> tuple[float, tuple[str, ...]]:
    """The nearest depth of all views except outliers, and notes for the user.

    Raises:
        SceneError: when the bounds of at least half of the views are impossible.
    """
    valid = np.isfinite(depths).all(1) & (depths[:, 0] > 0)
    if 2 * valid.sum() <= len(depths):
        raise SceneError(
            f"the depth bounds of {(~valid).sum()} of {len(depths)} views are not positive finite "
            "numbers",
            where=path,
            remedy="estimate the poses again",
        )
    near = depths[valid, 0]
    outlier = near < OUTLIER_RATIO * np.median(near)
    if outlier.sum() > max(1, OUTLIER_FRACTION * len(near)):
        outlier[:] = False
    left_out = int((~valid).sum() + outlier.sum())
    notes = (
        f"the depth bounds of {left_out} of {len(depths)} views are ignored, because they are "
        "impossible or far nearer than those of most views",
    )
    return float(near[~outlier].min()), notes if left_out else ()


def mean_camera_frame(poses: Float[np.ndarray, "n 3 4"], unit: float) -> SceneTransform:
    """The transform to the frame of the mean camera: mean position, mean viewing axis, mean up.

    Not defined when the mean viewing axis or the mean up vanishes.
    """
    back = poses[:, :, 2].mean(0)
    back /= np.linalg.norm(back)
    right = np.cross(poses[:, :, 1].mean(0), back)
    right /= np.linalg.norm(right)
    return SceneTransform.of(
        poses[:, :, 3].mean(0), unit, np.stack([right, np.cross(back, right), back])
    )


def _chosen_images(
    finder: ImageFinder, folder: Path, resolution: Resolution, count: int
) -> list[Path]:
    """The files of the smallest image folder that has at least the resolution, one per pose."""
    there = [name for name in IMAGE_FOLDERS if name in folder_entries(folder)]
    found = {name: _named(folder / name, SUFFIXES) for name in there}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise _no_images(folder, there)
    chosen = list(found)[-1]
    if resolution is None:
        chosen = DEFAULT_FOLDER if DEFAULT_FOLDER in found else next(iter(found))
    else:
        wanted = max(resolution) if isinstance(resolution, tuple) else resolution
        for name, files in found.items():
            first = read_image_format(_located(finder, folder, name, files[:1]))
            if wanted <= max(first.width, first.height):
                chosen = name
                break
    if len(found[chosen]) != count:
        unread = _named(folder / chosen, UNREAD_SUFFIXES)
        more = (
            f" (and {len(unread)} {kind_of(unread[0])} files, which are not read)" if unread else ""
        )
        raise SceneError(
            f"the folder holds {len(found[chosen])} images{more}, but {POSES_FILE} holds {count} "
            "poses",
            where=folder / chosen,
            remedy="give one image per pose, in the alphabetical order of their names",
        )
    return _located(finder, folder, chosen, found[chosen])


def _named(place: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files in a folder that have one of the suffixes, except hidden files."""
    return [
        name
        for name in folder_entries(place)
        if Path(name).suffix.lower() in suffixes and not name.startswith(".")
    ]


def _located(finder: ImageFinder, folder: Path, name: str, files: list[str]) -> list[Path]:
    return [finder.find(f"{name}/{file}", where=folder / name) for file in files]


def _no_images(folder: Path, there: list[str]) -> SceneError:
    for name in there:
        if unread := _named(folder / name, UNREAD_SUFFIXES):
            return SceneError(
                f"the folder holds {len(unread)} {kind_of(unread[0])} files, such as {unread[0]}, "
                "which are not read",
                where=folder / name,
                remedy="convert them to PNG or JPEG",
            )
    return SceneError(
        f"there are no images in {', '.join(IMAGE_FOLDERS)}",
        where=folder,
        remedy="put one image per pose into one of these folders",
    )


def _order_notes(images: list[Path]) -> list[str]:
    """A note for images whose alphabetical order is not the order of the numbers in their names."""
    names = [image.name for image in images]
    counted = sorted(names, key=_by_numbers)
    changed = next(((a, b) for a, b in zip(names, counted, strict=True) if a != b), None)
    if changed is None:
        return []
    return [
        "images are assigned to poses in the alphabetical order of their names, as LLFF writes "
        f"them, so {changed[0]} comes before {changed[1]}"
    ]


def _by_numbers(name: str) -> list[str | int]:
    """Sort key that orders names by the numbers in them: view_3 before view_10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _camera(rows: PosesBounds, source: ImageFormat, path: Path) -> Intrinsics:
    if not is_same_aspect(source.width, source.height, rows.width, rows.height):
        raise SceneError(
            f"the poses describe images of {rows.width:g} x {rows.height:g} pixels, but the "
            f"images have {source.width} x {source.height} pixels, which is another aspect ratio",
            where=path,
            remedy="give images that are resampled, but neither cropped nor rotated",
        )
    fx = rows.focal * source.width / rows.width
    fy = rows.focal * source.height / rows.height
    center = (0.5 * source.width, 0.5 * source.height)
    try:
        return Intrinsics(source.width, source.height, fx, fy, *center).checked_view()
    except SceneError as reason:
        raise SceneError(reason.what, where=path, remedy="correct the focal lengths") from reason
