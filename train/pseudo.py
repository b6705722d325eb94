"""Pseudo images: what the teacher sees from random poses, the student's training data.

In GPU memory where there is room, else the files of `train.posed_images`. Several processes share
the work by the poses, which depend on the seed and their number alone: whatever the number of
processes, the images together are the same.
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

from lightfield.errors import ConfigError
from lightfield.progress import Progress
from lightfield.ranges import SEED, Range, check_ranges
from lightfield.rays import RaySpace
from lightfield.viewpoints import sample_forward, sample_orbit
from train.distributed import ALONE, Ranks
from train.posed_images import PosedImages, write_images

Keep = Literal["auto", "disk", "gpu"]
BatchRenderer = Callable[[Float[Tensor, "n 3 4"]], UInt8[Tensor, "n h w 3"]]
"""Poses to images, on whatever device they are rendered."""

PIXELS_AT_ONCE = 1 << 23
"""Pixels of a batch of images."""
ROOM_SHARE = 0.5
"""Share of a GPU's free memory that images may take; the student needs some too."""


@dataclass(frozen=True)
class PseudoConfig:
    """How many pseudo images, and from where."""

    images: Annotated[int, Range(1, 1_000_000)] = 400
    """Images to render; the paper uses 10,000 at 800x800."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random poses."""
    keep: Keep = "auto"
    """Where the images are: files on the disk, or in the GPU's memory, into which they are rendered
    anew by whoever needs them; auto is the GPU where its kernels can render and its memory has room."""

    def __post_init__(self) -> None:
        check_ranges(self, "pseudo")
        if self.keep not in get_args(Keep):
            raise ConfigError(f"{self.keep!r} is none of {get_args(Keep)}", where="pseudo.keep")


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
    ranks: Ranks = ALONE,
) -> PosedImages:
    """Render every pose with `render` ([3, 4] -> [H, W, 3] in [0, 1]) into `folder`.

    Goes on where an interrupted call with the same poses and size stopped. Several processes render
    their shares into one file, each progress being of its own, and end together.

    Raises:
        OSError: when the disk has no room for all images; what the folder held is as it was.
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
) -> PosedImages:
    """Render poses into `folder`, batch after batch; a batch is copied while the next is rendered.

    Goes on where an interrupted call with the same poses and size stopped. Several processes render
    their shares into one file, each progress being of its own, and end together.

    Raises:
        OSError: when the disk has no room for all images; what the folder held is as it was.
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
    height: int,
    width: int,
    device: torch.device,
    progress: Progress,
    *,
    images_at_once: int | None = None,
) -> UInt8[Tensor, "n {height} {width} 3"]:
    """Render poses into the memory of `device`, without a file.

    Raises:
        ConfigError: when there is no room (ask `fits_on_device` before).
    """
    count = len(poses)
    at_once = images_at_once or max(1, PIXELS_AT_ONCE // (height * width))
    try:
        images = torch.empty((count, height, width, 3), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{count} images of {width}x{height} do not fit into the memory of {device}",
            where="pseudo.images",
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
    """Whether so many images are best kept in the memory of `device`: a GPU with room for them."""
    if device.type != "cuda":
        return False
    return 3 * count * height * width <= ROOM_SHARE * torch.cuda.mem_get_info(device)[0]
