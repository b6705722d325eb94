"""Pseudo pictures: what the teacher sees from random poses, the student's training data.

In GPU memory where there is room, else two .npy files, `poses.npy` float32 [n, 3, 4] and `images.npy`
uint8 [n, H, W, 3], memory-mapped: a quarter of the bytes of the published float32 folders, and no copy
in memory.

Several processes share the work by `share_of` the poses, which depend on the seed and their number
alone: whatever the number of processes, the pictures together are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

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
from train.distributed import ALONE, Ranks

Keep = Literal["auto", "disk", "gpu"]
BatchRenderer = Callable[[Float[Tensor, "n 3 4"]], UInt8[Tensor, "n h w 3"]]
"""Poses to pictures, on whatever device they are rendered."""

POSES, IMAGES, DONE = "poses.npy", "images.npy", "done.json"
FLUSH_EVERY_S = 5.0
PIXELS_AT_ONCE = 1 << 23
"""Pixels of a batch of pictures."""
ROOM_SHARE = 0.5
"""Share of a GPU's free memory that pictures may take; the student needs some too."""


@dataclass(frozen=True)
class PseudoConfig:
    """How many pseudo pictures, and from where."""

    pictures: int = 400
    """Pictures to render; the paper uses 10,000 at 800x800."""
    seed: int = 0
    """Seed of the random poses."""
    keep: Keep = "auto"
    """Where the pictures are: files on the disk, or in the GPU's memory, into which they are rendered
    anew by whoever needs them; auto is the GPU where its kernels can render and its memory has room."""

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ConfigError("at least one pseudo picture is needed", where="pseudo.pictures")
        if self.keep not in get_args(Keep):
            raise ConfigError(f"{self.keep!r} is none of {get_args(Keep)}", where="pseudo.keep")


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


def share_of(count: int, rank: int, ranks: int) -> slice:
    """The poses of process `rank`, a run of `count` poses that are dealt as evenly as can be."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def render_pseudo(
    render: Callable[[Tensor], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    height: int,
    width: int,
    folder: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> PosedPictures:
    """Render every pose with `render` ([3, 4] -> [H, W, 3] in [0, 1]) into `folder`.

    Goes on where an interrupted call with the same poses and size stopped. Several processes render
    their shares into one file, each progress being of its own, and end together.

    Raises:
        OSError: when the disk has no room for all pictures; what the folder held is as it was.
    """

    def render_one(pose: Tensor) -> Tensor:
        return (render(pose[0]) * 255).round().clamp(0, 255).to(torch.uint8)[None]

    return render_pseudo_in_batches(
        render_one, poses, height, width, folder, progress, ranks, pictures_at_once=1
    )


def render_pseudo_in_batches(
    render: BatchRenderer,
    poses: Float[np.ndarray, "n 3 4"],
    height: int,
    width: int,
    folder: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
    *,
    pictures_at_once: int | None = None,
) -> PosedPictures:
    """Render poses into `folder`, batch after batch; a batch is copied while the next is rendered.

    Goes on where an interrupted call with the same poses and size stopped. Several processes render
    their shares into one file, each progress being of its own, and end together.

    Raises:
        OSError: when the disk has no room for all pictures; what the folder held is as it was.
    """

    def pictures(start: int, stop: int) -> Tensor:
        return render(torch.from_numpy(poses[start:stop]))

    at_once = pictures_at_once or max(1, PIXELS_AT_ONCE // (height * width))
    return write_pictures(
        pictures, poses, (len(poses), height, width, 3), folder, progress, at_once, ranks
    )


def render_pseudo_on_device(
    render: BatchRenderer,
    poses: Float[np.ndarray, "n 3 4"],
    height: int,
    width: int,
    device: torch.device,
    progress: Progress,
    *,
    pictures_at_once: int | None = None,
) -> UInt8[Tensor, "n {height} {width} 3"]:
    """Render poses into the memory of `device`, without a file.

    Raises:
        ConfigError: when there is no room (ask `fits_on_device` before).
    """
    count = len(poses)
    at_once = pictures_at_once or max(1, PIXELS_AT_ONCE // (height * width))
    try:
        images = torch.empty((count, height, width, 3), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{count} pictures of {width}x{height} do not fit into the memory of {device}",
            where="pseudo.pictures",
            remedy="render them into a folder",
        ) from None
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        images[start:stop] = render(torch.from_numpy(poses[start:stop]))
        if device.type == "cuda":  # progress tells what is done, not what is asked for
            torch.cuda.current_stream(device).synchronize()
        progress(stop, count)
    return images


def fits_on_device(count: int, height: int, width: int, device: torch.device) -> bool:
    """Whether so many pictures are best kept in the memory of `device`: a GPU with room for them."""
    if device.type != "cuda":
        return False
    return 3 * count * height * width <= ROOM_SHARE * torch.cuda.mem_get_info(device)[0]


def save_pseudo(
    images: UInt8[Tensor, "n h w 3"],
    poses: Float[np.ndarray, "n 3 4"],
    folder: Path,
    progress: Progress,
) -> PosedPictures:
    """Write pictures that were rendered on a device, as `render_pseudo_in_batches` would have.

    Raises:
        OSError: when the disk has no room for all pictures; what the folder held is as it was.
    """
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[1] * images.shape[2]))
    return write_pictures(
        lambda start, stop: images[start:stop],
        poses,
        tuple(images.shape),
        folder,
        progress,
        at_once,
    )


def write_pictures(
    pictures: Callable[[int, int], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    shape: tuple[int, ...],
    folder: Path,
    progress: Progress,
    at_once: int,
    ranks: Ranks = ALONE,
) -> PosedPictures:
    """Write `pictures(start, stop)`, uint8, of all poses, from where an earlier call stopped.

    Several processes write their shares into one file.

    Raises:
        OSError: when the disk has no room for all pictures; what the folder held is as it was.
    """
    share, done_file = share_of(len(poses), ranks.rank, ranks.count), folder / done_name(ranks)
    if ranks.leads and _pictures_done(done_file, poses, shape) == 0:
        _begin(folder, poses, shape)
    ranks.wait()
    first, count = share.start, share.stop - share.start
    done = min(_pictures_done(done_file, poses, shape), count)
    images = npy.open_memmap(folder / IMAGES, "r+")
    flushed = time.monotonic()
    starts = range(first + done, share.stop, at_once)
    for start, batch in _on_host(pictures, starts, share.stop):
        stop = start + len(batch)
        images[start:stop] = batch
        if time.monotonic() - flushed > FLUSH_EVERY_S or stop == share.stop:
            images.flush()
            write_json(done_file, {"pictures": stop - first})
            flushed = time.monotonic()
        progress(stop - first, count)
    ranks.wait()
    return PosedPictures(poses, images)


def done_name(ranks: Ranks) -> str:
    """The file that says how many pictures of a process's share are done."""
    return DONE if ranks.count == 1 else f"done-{ranks.rank}-of-{ranks.count}.json"


def save_poses(poses: Float[np.ndarray, "n 3 4"], folder: Path) -> None:
    """Write the poses alone, of pictures that are rendered when they are needed."""
    with atomic_path(folder / POSES) as temporary:
        np.save(temporary, poses)


def load_poses(folder: Path) -> Float[np.ndarray, "n 3 4"]:
    """Read the poses of pseudo pictures.

    Raises:
        CheckpointError: when the file is missing, truncated or foreign.
    """
    try:
        poses = np.array(npy.open_memmap(folder / POSES, mode="r"))
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"not readable pseudo pictures ({reason})", where=folder) from reason
    if poses.dtype != np.float32 or poses.ndim != 3 or poses.shape[1:] != (3, 4):
        raise CheckpointError("arrays are not posed uint8 pictures", where=folder)
    return poses


def load_pseudo(folder: Path) -> PosedPictures:
    """Read what `render_pseudo` wrote, pictures as a memory map.

    Raises:
        CheckpointError: when a file is missing, truncated or foreign.
    """
    poses = load_poses(folder)
    try:
        images = npy.open_memmap(folder / IMAGES, mode="r")
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"not readable pseudo pictures ({reason})", where=folder) from reason
    pictures = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not pictures or len(poses) != len(images):
        raise CheckpointError("arrays are not posed uint8 pictures", where=folder)
    return PosedPictures(poses, images)


def _on_host(
    pictures: Callable[[int, int], Tensor], starts: range, count: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "n h w 3"]]]:
    """Batches in host memory; of a GPU, each while the next is already being rendered."""
    buffers: dict[int, Tensor] = {}
    waiting: tuple[int, Tensor, torch.cuda.Event] | None = None
    for turn, start in enumerate(starts):
        batch = pictures(start, min(start + starts.step, count))
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
    """Write the poses, and black pictures whose place on the disk is sure.

    A memory map that runs into a full disk ends the process with SIGBUS instead of an error.
    """
    with atomic_path(folder / IMAGES) as temporary:
        npy.open_memmap(temporary, "w+", np.uint8, shape)
        _reserve(temporary)
        for counted in folder.glob("done*.json"):  # pictures of the file replaced next
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


def _pictures_done(done_file: Path, poses: np.ndarray, shape: tuple[int, ...]) -> int:
    try:
        done = int(read_json(done_file, CheckpointError)["pictures"])
        earlier = load_pseudo(done_file.parent)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0
    same = earlier.images.shape == shape and np.array_equal(earlier.poses, poses)
    return max(0, min(done, len(poses))) if same else 0
