"""Frames: posed image files of a scene folder, and decoding them into views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lightfield.errors import ConfigError
from lightfield.progress import Progress, silent
from lightfield.scenes.images import Color, ImageFormat, read_images
from lightfield.scenes.scene import Views

HELD_OUT_EVERY = 8
"""Every 8th view is a test view, as in NeRF, LLFF and Mip-NeRF 360."""


@dataclass(frozen=True)
class Frames:
    """Image files and their poses."""

    paths: tuple[Path, ...]
    poses: Float[np.ndarray, "n 3 4"]
    masks: tuple[Path, ...] = ()
    """One mask file per image, white where the object is; empty when the images have no masks."""

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, indices: Sequence[int]) -> Frames:
        """The frames at these indices."""
        paths = tuple(self.paths[i] for i in indices)
        masks = tuple(self.masks[i] for i in indices) if self.masks else ()
        return Frames(paths, self.poses[np.asarray(indices, dtype=int)], masks)

    def every(self, step: int) -> Frames:
        """Every `step`-th frame, from the first."""
        if step < 1:
            raise ConfigError(
                f"the step between test views is {step}, which is less than 1", where="test_every"
            )
        return self.at(range(0, len(self), step))

    def held_out(self) -> tuple[Frames, Frames]:
        """(kept, held out): every 8th frame, from the first, is held out."""
        indices = range(len(self))
        kept = [i for i in indices if i % HELD_OUT_EVERY]
        return self.at(kept), self.every(HELD_OUT_EVERY)


def read_views(
    folder: Path,
    splits: dict[str, Frames],
    source: ImageFormat,
    size: tuple[int, int],
    background: Color,
    progress: Progress = silent,
) -> tuple[dict[str, Views], str]:
    """The decoded views of all splits, and the SHA-256 over all images and masks.

    Raises:
        SceneError: when an image is damaged.
    """
    root = folder.resolve()
    paths = [path for frames in splits.values() for path in frames.paths]
    masks = [path for frames in splits.values() for path in frames.masks]
    images, alpha, sha256 = read_images(paths, source, size, background, progress, masks=masks)
    views, start = {}, 0
    for split, frames in splits.items():
        span = slice(start, start + len(frames))
        names = tuple(path.relative_to(root).as_posix() for path in frames.paths)
        coverage = None if alpha is None else alpha[span]
        views[split] = Views(names, frames.poses, images[span], coverage)
        start += len(frames)
    return views, sha256
