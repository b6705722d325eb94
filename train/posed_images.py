"""Images with their poses as two files, written by any number of processes in any number of goes.

`poses.npy` float32 [n, 3, 4] and `images.npy` uint8 [n, H, W, 3], memory-mapped: a quarter of the bytes
of the published float32 folders, and no copy in memory. Each process writes its share of the images,
and how many of them are done into a file of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.lib import format as npy
from torch import Tensor

from lightfield.arrays import read_array
from lightfield.errors import CheckpointError
from lightfield.files import atomic_path, read_json, write_json
from lightfield.progress import Progress
from train.distributed import ALONE, Ranks

POSES, IMAGES, DONE = "poses.npy", "images.npy", "done.json"
FLUSH_EVERY_S = 5.0


@dataclass(frozen=True)
class PosedImages:
    """Images with their poses; `images` may be a memory map."""

    poses: Float[np.ndarray, "n 3 4"]
    images: UInt8[np.ndarray, "n h w 3"]

    def __len__(self) -> int:
        return len(self.poses)


def share_of(count: int, rank: int, ranks: int) -> slice:
    """The poses of process `rank`, a run of `count` poses that are dealt as evenly as can be."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def write_images(
    render: Callable[[int, int], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    shape: tuple[int, ...],
    folder: Path,
    progress: Progress,
    at_once: int,
    ranks: Ranks = ALONE,
) -> PosedImages:
    """Write `render(start, stop)`, uint8, of all poses, from where an earlier call stopped.

    Several processes write their shares into one file.

    Raises:
        OSError: when the disk has no room for all images; what the folder held is as it was.
    """
    share, done_file = share_of(len(poses), ranks.rank, ranks.count), folder / done_name(ranks)
    if ranks.leads and _images_done(done_file, poses, shape) == 0:
        _begin(folder, poses, shape)
    ranks.wait()
    first, count = share.start, share.stop - share.start
    done = min(_images_done(done_file, poses, shape), count)
    images = npy.open_memmap(folder / IMAGES, "r+")
    flushed = time.monotonic()
    starts = range(first + done, share.stop, at_once)
    for start, batch in _on_host(render, starts, share.stop):
        stop = start + len(batch)
        images[start:stop] = batch
        if time.monotonic() - flushed > FLUSH_EVERY_S or stop == share.stop:
            images.flush()
            write_json(done_file, {"images": stop - first})
            flushed = time.monotonic()
        progress(stop - first, count)
    ranks.wait()
    return PosedImages(poses, images)


def done_name(ranks: Ranks) -> str:
    """The file that says how many images of a process's share are done."""
    return DONE if ranks.count == 1 else f"done-{ranks.rank}-of-{ranks.count}.json"


def save_poses(poses: Float[np.ndarray, "n 3 4"], folder: Path) -> None:
    """Write the poses alone, of images that are rendered when they are needed."""
    with atomic_path(folder / POSES) as temporary:
        np.save(temporary, poses)


def load_poses(folder: Path) -> Float[np.ndarray, "n 3 4"]:
    """Read the poses alone.

    Raises:
        CheckpointError: when the file is missing, truncated or foreign.
    """
    poses = np.array(read_array(folder / POSES, np.float32, (None, 3, 4)))
    if not np.isfinite(poses).all():
        raise CheckpointError("holds NaN or infinity", where=folder / POSES)
    return poses


def load_images(folder: Path) -> PosedImages:
    """Read what `write_images` wrote, the images as a memory map.

    Raises:
        CheckpointError: when a file is missing, truncated or foreign.
    """
    poses = load_poses(folder)
    images = read_array(folder / IMAGES, np.uint8, (len(poses), None, None, 3))
    return PosedImages(poses, images)


def _on_host(
    render: Callable[[int, int], Tensor], starts: range, count: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "n h w 3"]]]:
    """Batches in host memory; of a GPU, each while the next is already being rendered."""
    buffers: dict[int, Tensor] = {}
    waiting: tuple[int, Tensor, torch.cuda.Event] | None = None
    for turn, start in enumerate(starts):
        batch = render(start, min(start + starts.step, count))
        if batch.device.type != "cuda":
            yield start, batch.numpy()
            continue
        side = turn % 2
        if side not in buffers:
            buffers[side] = torch.empty(batch.shape, dtype=torch.uint8, pin_memory=True)
        host = buffers[side][: len(batch)]
        host.copy_(batch, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if waiting is not None:
            yield _finished(waiting)
        waiting = start, host, copied
    if waiting is not None:
        yield _finished(waiting)


def _finished(
    waiting: tuple[int, Tensor, torch.cuda.Event],
) -> tuple[int, UInt8[np.ndarray, "n h w 3"]]:
    start, host, copied = waiting
    copied.synchronize()
    return start, host.numpy()


def _begin(folder: Path, poses: np.ndarray, shape: tuple[int, ...]) -> None:
    """Write the poses, and black images whose place on the disk is sure.

    A memory map that runs into a full disk ends the process with SIGBUS instead of an error.
    """
    with atomic_path(folder / IMAGES) as temporary:
        npy.open_memmap(temporary, "w+", np.uint8, shape)
        _reserve(temporary)
        for counted in folder.glob("done*.json"):  # images of the file replaced next
            counted.unlink()
    save_poses(poses, folder)


def _reserve(path: Path) -> None:
    """Give every byte of a sparse file its place on the disk."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return
        while block := file.read(1 << 20):  # macOS: write what it holds
            file.seek(-len(block), os.SEEK_CUR)
            file.write(block)


def _images_done(done_file: Path, poses: np.ndarray, shape: tuple[int, ...]) -> int:
    try:
        done = int(read_json(done_file, CheckpointError)["images"])
        earlier = load_images(done_file.parent)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0
    same = earlier.images.shape == shape and np.array_equal(earlier.poses, poses)
    return max(0, min(done, len(poses))) if same else 0
