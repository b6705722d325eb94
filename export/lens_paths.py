"""Paths and uuids of the generated assets of a lens.

Every uuid is derived from the scene's name and the asset's role, so that a second generation gives
the same uuids. When a user moves or renames an asset in Lens Studio, the editor moves its `.meta`
as well and keeps the id in the `.meta`. `moved_assets` finds assets by this id.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from export.lens_yaml import compose, entry, imported_assets, scalar
from lightfield.errors import ExportError
from lightfield.files import read_json

MANIFEST = "nelf-lens.json"
"""The list of generated files with their hashes."""
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
"""Roles of the generated assets by the path at which each is generated."""
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "nelf/lens")


def lens_uuid(scene_name: str, role: str) -> str:
    """The uuid of an object of a scene's lens."""
    return str(uuid.uuid5(NAMESPACE, f"{scene_name}/{role}"))


def scene_of_project(folder: Path) -> str:
    """Name of the scene of a project; empty when the manifest does not state the scene."""
    try:
        return str(read_json(folder / MANIFEST, ExportError)["scene"])
    except (ExportError, KeyError, TypeError):
        return ""


def moved_assets(folder: Path, scene_name: str) -> dict[str, str]:
    """New paths of assets that a user moved, and of their .meta, by generated path.

    All paths are relative to the project. Assets whose id is in no .meta are left out.
    """
    sought = {lens_uuid(scene_name, role): name for name, role in ROLES.items()}
    found: dict[str, list[str]] = {}
    for meta in sorted((folder / ASSETS).rglob("*.meta")):
        for name in {sought[each] for each in _asset_ids(meta) if each in sought}:
            found.setdefault(name, []).append(
                meta.relative_to(folder).as_posix().removesuffix(".meta")
            )
    moved = {name: paths[0] for name, paths in found.items() if name not in paths}
    return moved | {f"{name}.meta": f"{path}.meta" for name, path in moved.items()}


def moved_project(folder: Path, scene_name: str, name: str) -> dict[str, str]:
    """The new name of a renamed .esproj, which is found by its document id."""
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
    except ExportError:  # the linter reports this file
        return set()
