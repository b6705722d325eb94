"""Pseudo pictures: what the teacher sees from random poses, the student's training data.

Kept as two .npy files, `poses.npy` float32 [n, 3, 4] and `images.npy` uint8 [n, H, W, 3], memory-mapped:
a tenth of the bytes of the published float32 folders, and no copy in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.lib import format as npy
from torch import Tensor

from lightfield.errors import CheckpointError, ConfigError
from lightfield.files import atomic_path, read_json, write_json
from lightfield.progress import Progress
from lightfield.rays import RaySpace
from lightfield.viewpoints import sample_forward, sample_orbit

POSES, IMAGES, DONE = "poses.npy", "images.npy", "done.json"
FLUSH_EVERY_S = 5.0


@dataclass(frozen=True)
class PseudoConfig:
    """How many pseudo pictures, and from where."""

    pictures: int = 400
    """Pictures to render; the paper uses 10,000 at 800x800."""
    seed: int = 0
    """Seed of the random poses."""

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ConfigError("at least one pseudo picture is needed", where="pseudo.pictures")


@dataclass(frozen=True)
class PosedPictures:
    """Pictures with their poses; `images` may be a memory map."""

    poses: Float[np.ndarray, "n 3 4"]
    images: UInt8[np.ndarray, "n h w 3"]

    def __len__(self) -> int:
        return len(self.poses)


def pseudo_poses(
    poses: Float[np.ndarray, "n 3 4"], space: RaySpace, count: int, *, seed: int
) -> Float[np.ndarray, "{count} 3 4"]:
    """Random poses inside the viewing range of real ones."""
    sample = sample_forward if space.kind == "ndc" else sample_orbit
    return sample(poses, count, seed=seed)


def render_pseudo(
    render: Callable[[Tensor], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    height: int,
    width: int,
    folder: Path,
    progress: Progress,
) -> PosedPictures:
    """Render every pose with `render` ([3, 4] -> [H, W, 3] in [0, 1]) into `folder`.

    Goes on where an interrupted call with the same poses and size stopped.

    Raises:
        OSError: when the disk has no room for all pictures; what the folder held is as it was.
    """
    count, shape = len(poses), (len(poses), height, width, 3)
    start = _pictures_done(folder, poses, shape)
    if start == 0:
        _begin(folder, poses, shape)
    images = npy.open_memmap(folder / IMAGES, "r+")
    flushed = time.monotonic()
    for index in range(start, count):
        picture = render(torch.from_numpy(poses[index]))
        images[index] = (picture * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        if time.monotonic() - flushed > FLUSH_EVERY_S or index == count - 1:
            images.flush()
            write_json(folder / DONE, {"pictures": index + 1})
            flushed = time.monotonic()
        progress(index + 1, count)
    return PosedPictures(poses, images)


def load_pseudo(folder: Path) -> PosedPictures:
    """Read what `render_pseudo` wrote, pictures as a memory map.

    Raises:
        CheckpointError: when a file is missing, truncated or foreign.
    """
    try:
        poses = np.array(npy.open_memmap(folder / POSES, mode="r"))
        images = npy.open_memmap(folder / IMAGES, mode="r")
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"not readable pseudo pictures ({reason})", where=folder) from reason
    pictures = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not pictures or poses.dtype != np.float32 or poses.shape != (len(images), 3, 4):
        raise CheckpointError("arrays are not posed uint8 pictures", where=folder)
    return PosedPictures(poses, images)


def _begin(folder: Path, poses: np.ndarray, shape: tuple[int, ...]) -> None:
    """Write the poses, and black pictures whose place on the disk is sure.

    A memory map that runs into a full disk ends the process with SIGBUS instead of an error.
    """
    with atomic_path(folder / IMAGES) as temporary:
        npy.open_memmap(temporary, "w+", np.uint8, shape)
        _reserve(temporary)
        (folder / DONE).unlink(missing_ok=True)  # it counts pictures of the file replaced next
    with atomic_path(folder / POSES) as temporary:
        np.save(temporary, poses)


def _reserve(path: Path) -> None:
    """Give every byte of a sparse file its place on the disk."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return
        while block := file.read(1 << 20):  # macOS: write what it holds
            file.seek(-len(block), os.SEEK_CUR)
            file.write(block)


def _pictures_done(folder: Path, poses: np.ndarray, shape: tuple[int, ...]) -> int:
    try:
        done = int(read_json(folder / DONE, CheckpointError)["pictures"])
        earlier = load_pseudo(folder)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0
    same = earlier.images.shape == shape and np.array_equal(earlier.poses, poses)
    return max(0, min(done, len(poses))) if same else 0
