"""Which form a scene folder has, told by the files in it."""

from __future__ import annotations

from pathlib import Path

from lightfield.errors import SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes.blender import TRAIN_JSON, load_blender
from lightfield.scenes.frames import folder_entries
from lightfield.scenes.llff import POSES_FILE, load_llff
from lightfield.scenes.pictures import Resolution
from lightfield.scenes.scene import Scene

LOADERS = {TRAIN_JSON: load_blender, POSES_FILE: load_llff}
KNOWN = f"{TRAIN_JSON} (Blender) or {POSES_FILE} (LLFF)"
SHOWN = 6


def load_scene_folder(
    folder: Path,
    *,
    name: str | None = None,
    resolution: Resolution = None,
    multiple: int = 1,
    test_every: int = 1,
    progress: Progress = silent,
) -> Scene:
    """Read a scene folder of any known form; see `load_blender` and `load_llff`.

    Raises:
        SceneError: when the folder is missing, of no known form, or damaged.
        ConfigError: when the resolution is impossible.
    """
    found = folder_entries(folder)
    for marker, load in LOADERS.items():
        if marker in found:
            return load(
                folder,
                name=name,
                resolution=resolution,
                multiple=multiple,
                test_every=test_every,
                progress=progress,
            )
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
