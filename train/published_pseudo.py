"""Converter of pseudo images that MobileR2L's published code rendered.

A published folder has `{H}x{W}_rgb/rendered_rgb_%05d.npy` float32 [H W, 3], `poses/c2w_%05d.npy`, and
`hwf/dataset_info.json` with the camera of the student's rays, which is smaller by an integer factor.

There are three kinds of poses, which `dataset_type` and `ff` identify:
- Blender scenes: camera centers. The cameras look at the origin with z up. The unit is 4.031 / 1.5 of
  the scene's unit and does not depend on `scale`.
- Other orbits: camera centers as above, in the unit 1 / `max_radius`.
- Forward-facing scenes: OpenCV matrices in an OpenCV world, in the unit `scale`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.arrays import read_array
from lightfield.camera import Intrinsics, checked_poses, look_at
from lightfield.errors import CheckpointError, NelfError, quoted
from lightfield.files import read_json
from lightfield.progress import Progress, silent
from lightfield.transform import SceneTransform
from train.posed_images import write_images

BLENDER_UNIT = 4.031128857175551 / 1.5
"""Scene units per published unit: the published teacher maps the cameras' radius 4.031 to 1.5."""
INFO = Path("hwf", "dataset_info.json")
IMAGE = re.compile(r"rendered_rgb_\d{5,}\.npy", re.ASCII)
IMAGES = re.compile(r"(\d{1,5})x(\d{1,5})_rgb")
LARGEST_INFO_BYTES = 1 << 20
FARTHEST = 1e6
"""Upper limit on lengths and scales; float32 is too coarse for larger numbers."""
OPENCV_TO_OPENGL = np.array([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class _Info:
    """The entries of `dataset_info.json` that the conversion uses."""

    height: int
    width: int
    focal: float
    scale: float
    max_radius: float
    forward: bool
    kind: str


def load_published_pseudo(
    folder: Path,
    into: Path,
    *,
    unit: float = 1.0,
    transform: SceneTransform | None = None,
    progress: Progress = silent,
) -> tuple[UInt8[np.ndarray, "n h w 3"], Intrinsics]:
    """Convert a published folder into the files of `train.posed_images`, image by image.

    Returns a memory map of the images, and the camera. The call resumes where an interrupted call
    stopped.

    Args:
        folder: folder that the published code wrote.
        into: existing folder for the converted images, which need a quarter of the published bytes.
        unit: additional factor of the camera centers, if the scene of the student's test views has
            another unit (for forward-facing scenes: the scale of the scene's loader).
        transform: transform from the source's coordinates to those of the test views' scene.
        progress: called with the number of converted images.

    Raises:
        CheckpointError: when a file is missing, damaged or pickled, or has another shape.
        OSError: when the disk has no room.
    """
    info, intrinsics = _read_info(folder / INFO), published_camera(folder)
    images, height, width = _image_folder(folder)
    count = sum(1 for path in images.iterdir() if IMAGE.fullmatch(path.name))
    if not count:
        raise CheckpointError("the folder contains no images", where=images)
    poses = np.stack(
        [_pose(folder / "poses" / f"c2w_{index:05d}.npy", info, unit) for index in range(count)]
    )
    poses = (transform or SceneTransform()).to_scene(poses).astype(np.float32)

    def converted(start: int, stop: int) -> Tensor:
        paths = [images / f"rendered_rgb_{index:05d}.npy" for index in range(start, stop)]
        return torch.from_numpy(np.stack([_image(path, height, width) for path in paths]))

    shape = (count, height, width, 3)
    return write_images(converted, poses, shape, into, progress, 1), intrinsics


def published_camera(folder: Path) -> Intrinsics:
    """The camera of a published folder's images; no image is read.

    Raises:
        CheckpointError: when the description of the camera is missing or damaged.
    """
    info = _read_info(folder / INFO)
    _, height, width = _image_folder(folder)
    return _intrinsics(info, height, width, folder / INFO)


def _read_info(path: Path) -> _Info:
    data: Any = read_json(path, CheckpointError, LARGEST_INFO_BYTES)
    try:
        info = _Info(
            int(data["downscaled_height"]),
            int(data["downscaled_width"]),
            float(data["downscaled_focal"]),
            float(data["scale"]),
            float(data["max_radius"]),
            bool(data["ff"]),
            str(data["dataset_type"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as reason:
        raise CheckpointError(
            f"the file does not describe pseudo images ({quoted(repr(reason))})", where=path
        ) from None
    numbers = (info.height, info.width, info.focal, info.scale, info.max_radius)
    if not all(1 / FARTHEST < number < FARTHEST for number in numbers):
        raise CheckpointError(
            f"sizes, focal length and scales must be positive and below {FARTHEST:g}", where=path
        )
    return info


def _image_folder(folder: Path) -> tuple[Path, int, int]:
    """The folder of the images, and their height and width from the folder's name."""
    found = [path for path in folder.iterdir() if path.is_dir() and IMAGES.fullmatch(path.name)]
    if len(found) != 1:
        raise CheckpointError(
            f"the folder must contain one folder named like 800x800_rgb (found {len(found)})",
            where=folder,
        )
    height, width = (int(side) for side in found[0].name.removesuffix("_rgb").split("x"))
    return found[0], height, width


def _intrinsics(info: _Info, height: int, width: int, path: Path) -> Intrinsics:
    factor = round(height / info.height)
    if factor < 1 or (height // factor, width // factor) != (info.height, info.width):
        raise CheckpointError(
            f"{width}x{height} pixels are not an integer multiple of {info.width}x{info.height} rays",
            where=path,
        )
    focal = factor * info.focal
    return Intrinsics(width, height, focal, focal, width / 2, height / 2).checked_view()


def _pose(path: Path, info: _Info, unit: float) -> Float[np.ndarray, "3 4"]:
    """A camera-to-world matrix in the project's frame."""
    shape = (3, 4) if info.forward else (3,)
    array = np.array(_array(path, shape), dtype=np.float64)
    if not (np.abs(array) < FARTHEST).all():
        raise CheckpointError(
            f"the pose contains NaN, infinity, or a number above {FARTHEST:g}", where=path
        )
    if info.forward:
        pose = OPENCV_TO_OPENGL[:, None] * array
        pose[:, :3] *= OPENCV_TO_OPENGL
        pose[:, 3] *= info.scale * unit
    else:
        own_unit = 1 / info.max_radius if info.kind == "colmap" else BLENDER_UNIT
        if not np.hypot(array[0], array[1]) > 0:
            raise CheckpointError(
                "the camera is on the z axis, so its upright direction is undefined", where=path
            )
        pose = look_at(array * own_unit * unit, np.zeros(3), np.array([0.0, 0.0, 1.0]))
    try:
        return checked_poses(pose[None], where=path)[0]
    except NelfError as reason:
        raise CheckpointError(str(reason.what), where=path) from None


def _image(path: Path, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    colors = np.array(_array(path, (height * width, 3)))
    if not np.isfinite(colors).all():
        raise CheckpointError("the image contains NaN or infinity", where=path)
    return (255 * colors.clip(0, 1)).round().astype(np.uint8).reshape(height, width, 3)


def _array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array, as a memory map."""
    return read_array(path, np.float32, shape)
