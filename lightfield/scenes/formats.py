"""Which form a scene folder has, told by the files in it."""

from __future__ import annotations

from pathlib import Path

from lightfield.errors import SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes.assembly import SceneChoice, scene_from
from lightfield.scenes.blender import TRAIN_JSON, read_blender
from lightfield.scenes.capture import Capture, Loader
from lightfield.scenes.frames import folder_entries
from lightfield.scenes.llff import POSES_FILE, read_llff
from lightfield.scenes.pictures import Resolution
from lightfield.scenes.scene import Scene

LOADERS: dict[str, Loader] = {TRAIN_JSON: read_blender, POSES_FILE: read_llff}
KNOWN = f"{TRAIN_JSON} (Blender) or {POSES_FILE} (LLFF)"
SHOWN = 6


def load_scene_folder(
    folder: Path, choice: SceneChoice | None = None, progress: Progress = silent
) -> Scene:
    """Read a scene folder of any known form; see `read_blender`, `read_llff` and `scene_from`.

    Raises:
        SceneError: when the folder is missing, of no known form, or damaged.
        ConfigError: when the resolution or the bounds are impossible.
    """
    choice = choice or SceneChoice()
    return scene_from(read_capture(folder, choice.resolution), choice, progress)


def read_capture(folder: Path, resolution: Resolution = None) -> Capture:
    """Read the poses and image headers of a scene folder of any known form.

    Raises:
        SceneError: when the folder is missing, of no known form, or damaged.
    """
    found = folder_entries(folder)
    for marker, read in LOADERS.items():
        if marker in found:
            return read(folder, resolution)
    inside = [entry for entry in found if _is_scene(folder / entry)]
    if inside:
        raise SceneError(
            f"not a scene itself, but holds {', '.join(inside[:SHOWN])}",
            where=folder,
            remedy=f"name one of them, for example {folder / inside[0]}",
        )
    content = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    raise SceneError(
        f"not a scene folder: expected {KNOWN}, found {content or 'nothing'}", where=folder
    )


def _is_scene(folder: Path) -> bool:
    try:
        return any((folder / marker).is_file() for marker in LOADERS)
    except OSError:
        return False
