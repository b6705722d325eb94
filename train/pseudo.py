"""Pseudo images: the teacher's images of random poses, on which students train.

The images are rendered into GPU memory if they fit, otherwise into the files of `train.posed_images`.
Several ranks render shards of the poses. The poses depend on the seed and the number of images alone,
so the images are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError
from lightfield.progress import Progress
from lightfield.ranges import SEED, Range, check_ranges
from lightfield.rays import RaySpace
from lightfield.viewpoints import sample_forward, sample_orbit
from train.distributed import ALONE, Ranks
from train.posed_images import PosedImages, image_shard, write_images

Keep = Literal["auto", "disk", "gpu"]
BatchRenderer = Callable[[Float[Tensor, "n 3 4"]], UInt8[Tensor, "n h w 3"]]
"""Function from poses to images, on the device of the renderer."""

PIXELS_AT_ONCE = 1 << 23
"""Largest number of pixels of a batch of images."""
GPU_MEMORY_FRACTION = 0.5
"""Fraction of the GPU's free memory that images may take; the student needs the rest."""


@dataclass(frozen=True)
class PseudoConfig:
    """Settings of the pseudo images."""

    images: Annotated[int, Range(1, 1_000_000)] = 400
    """Number of images to render. The MobileR2L paper uses 10,000 of 800x800 pixels."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random poses."""
    keep: Keep = "auto"
    """Where the images are kept. `disk` writes files. `gpu` writes no files: each later command renders
    the images into GPU memory again. `auto` uses the GPU if its kernels support the teacher and its
    memory is large enough, because the kernels render faster than a disk reads."""

    def __post_init__(self) -> None:
        check_ranges(self, "pseudo")
        if self.keep not in get_args(Keep):
            raise ConfigError(f"{self.keep!r} is not one of {get_args(Keep)}", where="pseudo.keep")


def pseudo_poses(
    poses: Float[np.ndarray, "n 3 4"], space: RaySpace, count: int, *, seed: int
) -> Float[np.ndarray, "{count} 3 4"]:
    """Random poses inside the viewing range of the photographs' poses."""
    sample = sample_forward if space.kind == "ndc" else sample_orbit
    return sample(poses, count, seed=seed)


def render_pseudo(
    render: Callable[[Tensor], Tensor],
    poses: Float[np.ndarray, "n 3 4"],
    height: int,
    width: int,
    folder: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> UInt8[np.ndarray, "n {height} {width} 3"]:
    """Render every pose into `folder` by `render`, from [3, 4] to [H, W, 3] with values in [0, 1].

    Returns a memory map of all images (`train.posed_images.write_images`). Each rank's `progress` counts
    its own shard, and all ranks return together.

    Raises:
        OSError: when the disk has no room for all images; earlier files of the folder stay unchanged.
    """

    def render_one(pose: Tensor) -> Tensor:
        return (render(pose[0]) * 255).round().clamp(0, 255).to(torch.uint8)[None]

    return render_pseudo_in_batches(
        render_one, poses, height, width, folder, progress, ranks, images_at_once=1
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
    images_at_once: int | None = None,
) -> UInt8[np.ndarray, "n {height} {width} 3"]:
    """Render poses into `folder` in batches; a batch is copied while the next one is rendered.

    Returns a memory map of all images (`train.posed_images.write_images`). Each rank's `progress` counts
    its own shard, and all ranks return together.

    Raises:
        OSError: when the disk has no room for all images; earlier files of the folder stay unchanged.
    """

    def images(start: int, stop: int) -> Tensor:
        return render(torch.from_numpy(poses[start:stop]))

    at_once = images_at_once or max(1, PIXELS_AT_ONCE // (height * width))
    return write_images(
        images, poses, (len(poses), height, width, 3), folder, progress, at_once, ranks
    )


def render_pseudo_on_device(
    render: BatchRenderer,
    poses: Float[np.ndarray, "n 3 4"],
    intrinsics: Intrinsics,
    space: RaySpace,
    device: torch.device,
    progress: Progress,
    *,
    ranks: Ranks = ALONE,
    windows: int | None = None,
    images_at_once: int | None = None,
) -> PosedImages:
    """Render this rank's shard of the images of all poses into the memory of `device`.

    The shard has the images that the rank's windows can show (`train.posed_images.image_shard`).

    Raises:
        ConfigError: when the images do not fit (see `fits_on_device`), or when there are fewer windows
            than ranks.
    """
    shard = image_shard(len(poses), ranks, windows)
    count, height, width = shard.stop - shard.start, intrinsics.height, intrinsics.width
    at_once = images_at_once or max(1, PIXELS_AT_ONCE // (height * width))
    try:
        images = torch.empty((count, height, width, 3), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{count} images of {width}x{height} do not fit into the memory of {device}",
            where="pseudo.images",
            remedy="render them into a folder",
        ) from None
    own_poses = torch.from_numpy(poses[shard])
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        images[start:stop] = render(own_poses[start:stop])
        if device.type == "cuda":  # otherwise progress would count launches instead of images
            torch.cuda.current_stream(device).synchronize()
        progress(stop, count)
    return PosedImages(poses, images, intrinsics, space, shard.start)


def fits_on_device(count: int, height: int, width: int, device: torch.device) -> bool:
    """Whether `device` is a GPU with enough free memory for `count` images."""
    if device.type != "cuda":
        return False
    return 3 * count * height * width <= GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
