"""Captures in the LLFF form: `poses_bounds.npy` beside folders of images.

Each of the n rows of `poses_bounds.npy` holds a 3 x 5 matrix, row by row, and two depths. The matrix
is [R | t | (height, width, focal)] of the full-resolution image, where R's columns are the
camera's axes (down, right, back); the depths bound what the camera sees.

Views belong to the rows in the alphabetical order of their names, as LLFF writes them. Every 8th view,
from the first, is a test view. Axes become (right, up, back).

Where the cameras face forward, the conversion is NeRF's: lengths are divided by 0.75 of the nearest
depth, so that everything lies beyond the near plane z = -1; poses are expressed in their mean camera;
fields are queried in NDC. Views whose depth bounds are impossible, or far nearer than those of all
others, do not count there. Cameras around an object (nerf_real_360) make an object's scene, and their
depths are not used.
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
from lightfield.scenes.image_files import ImageFiles, folder_entries, kind_of
from lightfield.scenes.images import ImageFormat, Resolution, has_shape, image_format_of
from lightfield.transform import SceneTransform

POSES_FILE = "poses_bounds.npy"
IMAGE_FOLDERS = ("images_8", "images_4", "images_2", "images")  # smallest first
USUAL_FOLDER = "images_4"
BOUND_FACTOR = 0.75
STRAY_FACTOR = 0.2
"""Share of the median nearest depth. A view that is nearer is a stray, unless many views are."""
STRAY_SHARE = 0.1
"""Share of the views that can be strays."""
FORWARD_ANGLE = math.radians(30)
"""Largest angle to the mean viewing axis of cameras that face forward: a spread of 60 degrees."""
FORWARD_SHARE = 0.8
"""Share of the cameras that decides; a few with damaged poses are then refused by their frusta."""


@dataclass(frozen=True)
class PosesBounds:
    """What `poses_bounds.npy` holds, in the project's axes but its own lengths (float64)."""

    poses: Float[np.ndarray, "n 3 4"]
    depths: Float[np.ndarray, "n 2"]
    height: float
    width: float
    focal: float
    notes: tuple[str, ...] = ()


def read_llff(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a capture folder, from the smallest of its image folders that is large enough.

    Without a resolution it is `images_4`, where there is one.

    Raises:
        SceneError: when anything in the folder is missing, damaged, or makes no sense.
    """
    path = folder / POSES_FILE
    rows = read_poses_bounds(path)
    finder = ImageFiles(folder)
    images = _chosen_images(finder, folder, resolution, len(rows.poses))
    image_format = image_format_of(images, (rows.width, rows.height))
    train, test = Frames(tuple(images), rows.poses).held_out()
    if not len(train):
        raise SceneError("one view cannot both train and test", where=path)
    kind = capture_kind(rows.poses)
    frame, placing, notes = SceneTransform(), {}, ()
    if kind == "forward":
        nearest, notes = nearest_depth(rows.depths, path)
        frame = mean_camera_frame(rows.poses, BOUND_FACTOR * nearest)
        placing = {"unit_rule": f"{BOUND_FACTOR} of the nearest depth is 1"}
    else:
        notes = (
            "the cameras do not all face forward, so they are taken to stand around an object",
        )
    return Capture(
        source="llff",
        kind=kind,
        folder=folder,
        where=path,
        splits={"train": train, "val": train.at([]), "test": test},
        format=image_format,
        camera=_camera(rows, image_format, path),
        forward_frame=frame,
        described_by=(path,),
        notes=(*rows.notes, *notes, *_order_notes(images), *finder.notes(), *image_format.notes),
        provenance={
            "poses": "axes (down, right, back) to (right, up, back)"
            + ("; then in the mean camera" if kind == "forward" else ""),
            **placing,
            "images": images[0].parent.name,
            "test_views": f"1 in {HELD_OUT_EVERY} held out",
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
        raise SceneError(f"is {rows.shape}, not one row of 17 numbers per view", where=path)
    if not len(rows) or rows.dtype.kind != "f":
        raise SceneError(f"holds {len(rows)} views of type {rows.dtype}", where=path)
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
            "views differ in size or focal length, or have none",
            where=path,
            remedy="all views of a scene must share one camera",
        )
    height, width, focal = (float(value) for value in size[0])
    return PosesBounds(poses, depths, height, width, focal, tuple(notes))


def capture_kind(poses: Float[np.ndarray, "n 3 4"]) -> CaptureKind:
    """Whether the cameras face forward, or stand around something.

    They face forward when nearly all viewing axes are within 30 degrees of their mean.
    """
    backs = poses[:, :, 2]
    mean = backs.mean(0)
    cosines = backs @ mean / max(float(np.linalg.norm(mean)), 1e-12)
    angle = np.quantile(np.arccos(np.clip(cosines, -1, 1)), FORWARD_SHARE)
    return "forward" if angle <= FORWARD_ANGLE else "object"


def nearest_depth(depths: Float[np.ndarray, "n 2"], path: Path) -> tuple[float, tuple[str, ...]]:
    """The nearest depth that any view has, but for strays, and what to say about them.

    Raises:
        SceneError: when the bounds of most views are impossible.
    """
    valid = np.isfinite(depths).all(1) & (depths[:, 0] > 0)
    if 2 * valid.sum() <= len(depths):
        raise SceneError(
            "depth bounds are not all positive numbers",
            where=path,
            remedy="estimate the poses again",
        )
    near = depths[valid, 0]
    stray = near < STRAY_FACTOR * np.median(near)
    if stray.sum() > max(1, STRAY_SHARE * len(near)):
        stray[:] = False
    left_out = int((~valid).sum() + stray.sum())
    notes = (
        f"the depth bounds of {left_out} of {len(depths)} views are impossible or far nearer than all "
        "others, and do not set the unit",
    )
    return float(near[~stray].min()), notes if left_out else ()


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


def _chosen_images(
    finder: ImageFiles, folder: Path, resolution: Resolution, count: int
) -> list[Path]:
    """The files of the smallest image folder that need not be enlarged, one per pose."""
    there = [name for name in IMAGE_FOLDERS if name in folder_entries(folder)]
    found = {name: _named(folder / name, SUFFIXES) for name in there}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise _no_images(folder, there)
    chosen = list(found)[-1]
    if resolution is None:
        chosen = USUAL_FOLDER if USUAL_FOLDER in found else next(iter(found))
    else:
        wanted = max(resolution) if isinstance(resolution, tuple) else resolution
        for name, files in found.items():
            first = image_format_of(_located(finder, folder, name, files[:1]))
            if wanted <= max(first.width, first.height):
                chosen = name
                break
    if len(found[chosen]) != count:
        unread = _named(folder / chosen, UNREAD_SUFFIXES)
        more = (
            f" (and {len(unread)} {kind_of(unread[0])} files, which are not read)" if unread else ""
        )
        raise SceneError(
            f"{len(found[chosen])} images{more} but {count} poses in {POSES_FILE}",
            where=folder / chosen,
            remedy="there must be one image per pose, in the order of their names",
        )
    return _located(finder, folder, chosen, found[chosen])


def _named(place: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of a folder's files that have one of the suffixes."""
    return [
        name
        for name in folder_entries(place)
        if Path(name).suffix.lower() in suffixes and not name.startswith(".")
    ]


def _located(finder: ImageFiles, folder: Path, name: str, files: list[str]) -> list[Path]:
    return [finder.find(f"{name}/{file}", where=folder / name) for file in files]


def _no_images(folder: Path, there: list[str]) -> SceneError:
    for name in there:
        if unread := _named(folder / name, UNREAD_SUFFIXES):
            return SceneError(
                f"holds {len(unread)} {kind_of(unread[0])} files, such as {unread[0]}, which are not "
                "read",
                where=folder / name,
                remedy="convert them to PNG or JPEG",
            )
    return SceneError(
        f"no images in {', '.join(IMAGE_FOLDERS)}",
        where=folder,
        remedy="put one image per pose into one of these folders",
    )


def _order_notes(images: list[Path]) -> list[str]:
    """What to say where counting would order the images otherwise than their names do."""
    names = [image.name for image in images]
    counted = sorted(names, key=_by_numbers)
    changed = next(((a, b) for a, b in zip(names, counted, strict=True) if a != b), None)
    if changed is None:
        return []
    return [
        "images belong to poses in the alphabetical order of their names, as LLFF writes them: "
        f"{changed[0]} comes before {changed[1]}"
    ]


def _by_numbers(name: str) -> list[str | int]:
    """Sorts names as people count: view_3 before view_10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _camera(capture: PosesBounds, source: ImageFormat, path: Path) -> Intrinsics:
    if not has_shape(source.width, source.height, capture.width, capture.height):
        raise SceneError(
            f"describes images of {capture.width:g} x {capture.height:g} pixels, but they have "
            f"{source.width} x {source.height}",
            where=path,
            remedy="images may be resampled, not cropped or rotated",
        )
    fx = capture.focal * source.width / capture.width
    fy = capture.focal * source.height / capture.height
    center = (0.5 * source.width, 0.5 * source.height)
    try:
        return Intrinsics(source.width, source.height, fx, fy, *center).checked_view()
    except SceneError as reason:
        raise SceneError(reason.what, where=path, remedy="correct the focal lengths") from reason
