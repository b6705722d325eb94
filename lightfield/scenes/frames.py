"""Frames: posed picture files of a scene folder, before they are read.

Pictures lie inside their scene folder. A name that leads out of it, by `..`, as an absolute path or
through a symbolic link, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lightfield.errors import ConfigError, SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes.pictures import SUFFIXES, Colour, PictureFormat, read_pictures
from lightfield.scenes.scene import Views

HELD_OUT_EVERY = 8  # the field's habit: NeRF, LLFF, Mip-NeRF 360


@dataclass(frozen=True)
class Frames:
    """Picture files and their poses."""

    paths: tuple[Path, ...]
    poses: Float[np.ndarray, "n 3 4"]

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, indices: Sequence[int]) -> Frames:
        """The frames at these indices."""
        paths = tuple(self.paths[i] for i in indices)
        return Frames(paths, self.poses[np.asarray(indices, dtype=int)])

    def every(self, step: int) -> Frames:
        """Every `step`-th frame, from the first."""
        if step < 1:
            raise ConfigError(f"cannot take every {step}-th view", where="test_every")
        return self.at(range(0, len(self), step))

    def held_out(self) -> tuple[Frames, Frames]:
        """(kept, held out): every 8th frame, from the first, is held out."""
        indices = range(len(self))
        kept = [i for i in indices if i % HELD_OUT_EVERY]
        return self.at(kept), self.every(HELD_OUT_EVERY)


def folder_entries(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted.

    Raises:
        SceneError: when it is missing or cannot be listed.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise SceneError("no such folder", where=folder, remedy="give a scene's folder") from None
    except OSError as reason:
        raise SceneError(f"not a readable folder ({reason.strerror})", where=folder) from reason


def picture_path(folder: Path, name: str, *, where: object) -> Path:
    """The file a scene calls `name`, with or without its suffix.

    Raises:
        SceneError: when it leads out of `folder`, or is missing.
    """
    try:
        root = folder.resolve()
        wanted = root / name.replace("\\", "/")  # as Blender writes it on Windows
        candidates = [wanted]
        if wanted.suffix.lower() not in SUFFIXES:
            candidates = [
                wanted.with_name(wanted.name + suffix)
                for suffix in (*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
            ]
        for candidate in candidates:
            if not candidate.resolve().is_relative_to(root):
                raise SceneError(
                    f"picture {name!r} lies outside the scene folder",
                    where=str(where),
                    remedy="move the picture into the scene folder and correct its name",
                )
            if candidate.is_file():
                return candidate
    except (OSError, ValueError, RuntimeError) as reason:
        raise SceneError(
            f"picture {name!r} cannot be opened ({reason})", where=str(where)
        ) from None
    raise SceneError(
        f"picture {name!r} is missing",
        where=str(where),
        remedy=f"put {candidates[0]} back, or remove the frame",
    )


def read_views(
    folder: Path,
    splits: dict[str, Frames],
    source: PictureFormat,
    size: tuple[int, int],
    background: Colour,
    progress: Progress = silent,
) -> tuple[dict[str, Views], str]:
    """Views of all splits, read in one go, and the SHA-256 over all pictures.

    Raises:
        SceneError: when a picture is damaged.
    """
    root = folder.resolve()
    paths = [path for frames in splits.values() for path in frames.paths]
    pictures = read_pictures(paths, source, size, background, progress)
    views, start = {}, 0
    for split, frames in splits.items():
        span = slice(start, start + len(frames))
        names = tuple(path.relative_to(root).as_posix() for path in frames.paths)
        alpha = None if pictures.alpha is None else pictures.alpha[span]
        views[split] = Views(names, frames.poses, pictures.images[span], alpha)
        start += len(frames)
    return views, pictures.sha256
