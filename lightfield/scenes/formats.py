"""Detection of a scene folder's format by the files in it, and loading of scenes in any format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightfield.errors import SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes.assembly import SceneChoice, scene_from
from lightfield.scenes.capture import Capture, CaptureKind, Loader
from lightfield.scenes.image_files import folder_entries
from lightfield.scenes.images import Resolution
from lightfield.scenes.llff import POSES_FILE, capture_kind, read_llff, read_poses_bounds
from lightfield.scenes.scene import Scene
from lightfield.scenes.transforms_json import (
    SINGLE_JSON,
    TRAIN_JSON,
    read_blender,
    read_single_json,
)

LOADERS: dict[str, Loader] = {
    TRAIN_JSON: read_blender,
    POSES_FILE: read_llff,
    SINGLE_JSON: read_single_json,
}
"""Loaders by the file that marks their format; the first file that exists is read."""
KNOWN = f"{TRAIN_JSON} or {SINGLE_JSON} (Blender, nerfstudio, instant-ngp) or {POSES_FILE} (LLFF)"
SHOWN = 6


def load_scene_folder(
    folder: Path, choice: SceneChoice | None = None, progress: Progress = silent
) -> Scene:
    """Load a scene folder of any known format; see `transforms_json`, `llff` and `scene_from`.

    Raises:
        SceneError: when the folder is missing, damaged, or of no known format.
        ConfigError: when the resolution or the bounds are impossible.
    """
    choice = choice or SceneChoice()
    return scene_from(read_capture(folder, choice.resolution), choice, progress)


def read_capture(folder: Path, resolution: Resolution = None) -> Capture:
    """Read the poses and image headers of a scene folder of any known format.

    Raises:
        SceneError: when the folder is missing, damaged, or of no known format.
    """
    found = folder_entries(folder)
    markers = [marker for marker in LOADERS if marker in found]
    if markers:
        capture = LOADERS[markers[0]](folder, resolution)
        unused = [f"{other} is not used, because {markers[0]} exists" for other in markers[1:]]
        return replace(capture, notes=(*capture.notes, *unused))
    inside = [entry for entry in found if _is_scene(folder / entry)]
    if inside:
        raise SceneError(
            f"the folder is not a scene, but it contains scenes: {', '.join(inside[:SHOWN])}",
            where=folder,
            remedy=f"give one of them, for example {folder / inside[0]}",
        )
    content = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    raise SceneError(
        f"the folder is not a scene folder: expected {KNOWN}, found {content or 'nothing'}",
        where=folder,
    )


def folder_kind(folder: Path) -> CaptureKind:
    """The kind of capture that a folder holds, determined from its poses alone.

    A folder that cannot be read counts as an object; `read_capture` raises the error.
    """
    try:
        marker = next((name for name in LOADERS if (folder / name).exists()), None)
        if marker == POSES_FILE:
            return capture_kind(read_poses_bounds(folder / POSES_FILE).poses)
    except (SceneError, OSError):
        return "object"
    return "object"


def _is_scene(folder: Path) -> bool:
    try:
        return any((folder / marker).is_file() for marker in LOADERS)
    except OSError:
        return False
