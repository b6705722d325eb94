"""Images of one camera with their poses: one container in memory, and its files.

The files are `poses.npy` float32 [n, 3, 4] and `images.npy` uint8 [n, H, W, 3], which is memory-mapped.
Several processes can write one set of files, and an interrupted writer resumes. Each process writes its
shard of the images, and counts the finished ones in a file of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.lib import format as npy
from torch import Tensor

from lightfield.arrays import read_array
from lightfield.camera import Intrinsics
from lightfield.errors import CheckpointError, ConfigError
from lightfield.files import atomic_path, read_json, write_json
from lightfield.progress import Progress
from lightfield.rays import RaySpace
from train.distributed import ALONE, Ranks

POSES, IMAGES, DONE = "poses.npy", "images.npy", "done.json"
FLUSH_EVERY_S = 5.0


@dataclass(frozen=True)
class PosedImages:
    """Images of one camera with their poses, as rays of `space`: a whole set, or one rank's shard of it.

    A shard has the poses of the whole set, because windows are drawn over the whole set on every rank.
    """

    poses: Float[np.ndarray, "n 3 4"]
    images: UInt8[np.ndarray, "m h w 3"] | UInt8[Tensor, "m h w 3"]
    """Images `first` to `first + m` of the set: an array, a memory map, or a tensor on the GPU."""
    intrinsics: Intrinsics
    space: RaySpace
    first: int = 0

    def __post_init__(self) -> None:
        height, width = self.images.shape[1:3]
        if (height, width) != (self.intrinsics.height, self.intrinsics.width):
            raise ConfigError(
                f"images of {width}x{height} pixels for a camera of "
                f"{self.intrinsics.width}x{self.intrinsics.height}",
                where="posed images",
            )

    def __len__(self) -> int:
        """Images of the whole set."""
        return len(self.poses)

    def shard(self, ranks: Ranks, windows: int | None = None) -> PosedImages:
        """The images that this rank's windows can show (`image_shard`), without a copy."""
        part = image_shard(len(self), ranks, windows)
        start, stop = part.start - self.first, part.stop - self.first
        assert 0 <= start <= stop <= len(self.images), "another rank's shard"
        return replace(self, images=self.images[start:stop], first=part.start)


def image_shard(count: int, ranks: Ranks, windows: int | None = None) -> slice:
    """Images, of `count`, that the windows of this rank can show.

    Steps have `windows` windows over all ranks (by default one per rank), or a multiple of the ranks.

    Raises:
        ConfigError: when there are fewer windows than ranks.
    """
    windows = windows or ranks.world_size
    first = window_shard(windows, ranks).start * count // windows
    return slice(first, -(-(ranks.rank + 1) * count // ranks.world_size))


def window_shard(windows: int, ranks: Ranks) -> slice:
    """Windows, of a step's `windows`, that this rank draws; two ranks differ by at most one window.

    Raises:
        ConfigError: when there are fewer windows than ranks.
    """
    if windows < ranks.world_size:
        raise ConfigError(
            f"{windows} windows cannot be distributed over {ranks.world_size} processes",
            where="distill.windows",
            remedy=f"choose at least {ranks.world_size}, or start fewer processes",
        )
    return ranks.shard(windows)


def write_images(
    render: Callable[[int, int], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    shape: tuple[int, ...],
    folder: Path,
    progress: Progress,
    at_once: int,
    ranks: Ranks = ALONE,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Write `render(start, stop)`, uint8, of all poses; returns a memory map of all images.

    The call resumes where an interrupted call with the same poses and shape stopped. `at_once` images
    are rendered per call of `render`. Several ranks write their shards into one file.

    Raises:
        OSError: when the disk has no room for all images; earlier files of the folder stay unchanged.
    """
    shard, done_file = ranks.shard(len(poses)), folder / done_name(ranks)
    if ranks.is_first and _images_done(done_file, poses, shape) == 0:
        _begin(folder, poses, shape)
    ranks.barrier()
    first, count = shard.start, shard.stop - shard.start
    done = min(_images_done(done_file, poses, shape), count)
    images = npy.open_memmap(folder / IMAGES, "r+")
    flushed = time.monotonic()
    starts = range(first + done, shard.stop, at_once)
    for start, batch in _on_host(render, starts, shard.stop):
        stop = start + len(batch)
        images[start:stop] = batch
        if time.monotonic() - flushed > FLUSH_EVERY_S or stop == shard.stop:
            images.flush()
            write_json(done_file, {"images": stop - first})
            flushed = time.monotonic()
        progress(stop - first, count)
    ranks.barrier()
    return images


def done_name(ranks: Ranks) -> str:
    """Name of the file with the number of finished images of this rank's shard."""
    return DONE if ranks.world_size == 1 else f"done-{ranks.rank}-of-{ranks.world_size}.json"


def save_poses(poses: Float[np.ndarray, "n 3 4"], folder: Path) -> None:
    """Write poses without images, for images that are rendered on demand."""
    with atomic_path(folder / POSES) as temporary:
        np.save(temporary, poses)


def load_poses(folder: Path) -> Float[np.ndarray, "n 3 4"]:
    """Read the poses.

    Raises:
        CheckpointError: when the file is missing, damaged or incompatible.
    """
    poses = np.array(read_array(folder / POSES, np.float32, (None, 3, 4)))
    if not np.isfinite(poses).all():
        raise CheckpointError("the poses contain NaN or infinity", where=folder / POSES)
    return poses


def load_images(folder: Path, intrinsics: Intrinsics, space: RaySpace) -> PosedImages:
    """Read the files that `write_images` wrote, the images as a memory map.

    Raises:
        CheckpointError: when a file is missing, damaged or incompatible.
        ConfigError: when the images are not of the size of `intrinsics`.
    """
    return PosedImages(*_read(folder), intrinsics, space)


def _read(folder: Path) -> tuple[Float[np.ndarray, "n 3 4"], UInt8[np.ndarray, "n h w 3"]]:
    poses = load_poses(folder)
    return poses, read_array(folder / IMAGES, np.uint8, (len(poses), None, None, 3))


def _on_host(
    render: Callable[[int, int], Tensor], starts: range, count: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "n h w 3"]]]:
    """Batches in host memory with their starts; a GPU renders the next batch during the copy of one."""
    buffers: dict[int, Tensor] = {}
    pending: tuple[int, Tensor, torch.cuda.Event] | None = None
    for number, start in enumerate(starts):
        batch = render(start, min(start + starts.step, count))
        if batch.device.type != "cuda":
            yield start, batch.numpy()
            continue
        side = number % 2
        if side not in buffers:
            buffers[side] = torch.empty(batch.shape, dtype=torch.uint8, pin_memory=True)
        host = buffers[side][: len(batch)]
        host.copy_(batch, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if pending is not None:
            yield _finished(pending)
        pending = start, host, copied
    if pending is not None:
        yield _finished(pending)


def _finished(
    pending: tuple[int, Tensor, torch.cuda.Event],
) -> tuple[int, UInt8[np.ndarray, "n h w 3"]]:
    start, host, copied = pending
    copied.synchronize()
    return start, host.numpy()


def _begin(folder: Path, poses: np.ndarray, shape: tuple[int, ...]) -> None:
    """Write the poses, and black images with all their disk blocks allocated.

    Writing to a memory map on a full disk would end the process by SIGBUS instead of an error.
    """
    with atomic_path(folder / IMAGES) as temporary:
        npy.open_memmap(temporary, "w+", np.uint8, shape)
        _reserve(temporary)
        for counted in folder.glob("done*.json"):  # they count images of the file replaced below
            counted.unlink()
    save_poses(poses, folder)


def _reserve(path: Path) -> None:
    """Allocate disk blocks for all bytes of a sparse file."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return
        while block := file.read(1 << 20):  # macOS: write every byte
            file.seek(-len(block), os.SEEK_CUR)
            file.write(block)


def _images_done(done_file: Path, poses: np.ndarray, shape: tuple[int, ...]) -> int:
    """Finished images of earlier calls, or 0 when the files have other poses or another shape."""
    try:
        done = int(read_json(done_file, CheckpointError)["images"])
        earlier_poses, earlier_images = _read(done_file.parent)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0
    same = earlier_images.shape == shape and np.array_equal(earlier_poses, poses)
    return max(0, min(done, len(poses))) if same else 0
