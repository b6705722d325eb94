"""What the generated assets of a lens are called, and where they lie.

Every uuid follows from the scene's name and the thing's role, so generating twice gives the same ones.
When a user moves or renames an asset in Lens Studio, its file and its `.meta` go together, and the id in
the `.meta` stays: that is how an asset is found again.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from export.lens_yaml import compose, entry, imported_assets, scalar
from lightfield.errors import ExportError
from lightfield.files import read_json

MANIFEST = "nelf-lens.json"
"""Lists what was generated, with the hash of each file."""
ASSETS = "Assets"
MODELS = f"{ASSETS}/Models"
SCRIPT = f"{ASSETS}/NeuralLightField.js"
SCENE = f"{ASSETS}/Scene.scene"
RENDER_TARGET = f"{ASSETS}/RenderTarget.renderTarget"
ROLES = {
    SCENE: "scene",
    RENDER_TARGET: "render_target",
    SCRIPT: "script",
    f"{MODELS}/Sampler.onnx": "sampler",
    f"{MODELS}/Embedder.onnx": "embedder",
    f"{MODELS}/Student.onnx": "student",
}
"""The generated assets by the paths at which they are generated."""
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "nelf/lens")


def lens_uuid(scene_name: str, role: str) -> str:
    """The uuid of a thing in the lens of a scene."""
    return str(uuid.uuid5(NAMESPACE, f"{scene_name}/{role}"))


def scene_of_project(folder: Path) -> str:
    """The scene whose lens a folder holds; empty when its list of files does not say."""
    try:
        return str(read_json(folder / MANIFEST, ExportError)["scene"])
    except (ExportError, KeyError, TypeError):
        return ""


def moved_assets(folder: Path, scene_name: str) -> dict[str, str]:
    """Where assets and their .meta lie that are no longer where they were generated.

    Both paths are relative to the project. An asset whose id is found nowhere is not among them.
    """
    sought = {lens_uuid(scene_name, role): name for name, role in ROLES.items()}
    found: dict[str, list[str]] = {}
    for meta in sorted((folder / ASSETS).rglob("*.meta")):
        for name in {sought[each] for each in _asset_ids(meta) if each in sought}:
            found.setdefault(name, []).append(
                meta.relative_to(folder).as_posix().removesuffix(".meta")
            )
    moved = {name: places[0] for name, places in found.items() if name not in places}
    return moved | {f"{name}.meta": f"{place}.meta" for name, place in moved.items()}


def moved_project(folder: Path, scene_name: str, name: str) -> dict[str, str]:
    """Where the project's own file lies when it was renamed; found by its documents' ids."""
    document = lens_uuid(scene_name, "document")
    for path in () if (folder / name).exists() else sorted(folder.glob("*.esproj")):
        try:
            meta = entry(compose(path), "metaInfo")
        except ExportError:
            continue
        if document in (scalar(entry(meta, key)) for key in ("documentId", "originalDocumentId")):
            return {name: path.name}
    return {}


def _asset_ids(meta: Path) -> set[str]:
    try:
        return set(imported_assets(compose(meta)))
    except ExportError:  # the linter says what is wrong with it
        return set()
