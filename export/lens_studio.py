"""A Lens Studio project: models, controller script and the scene around them, ready to open.

The project is text in Lens Studio 5.15.4's own form, filled in from the files of `lens_template`;
newer versions migrate it. What a reader should know of its shape:

- The MLComponents are made by the script at run time, as Snap's own samples do; the scene holds none.
- The picture is the clear texture of the render target. An Image would need a material, whose shader
  graph is a binary only the editor writes. The script prefers an Image when the user adds one.
- A plugin for the editor puts the same scene together from the assets: it can add the Image, and it is
  the way out when the editor does not take the text.
- Every uuid follows from the scene's name and the thing's role, so generating twice gives the same
  bytes and references survive. Cache, Support and Workspaces are the editor's to make.

A project may be generated again over itself. Files are written, never deleted; a generated file that
was edited since is kept, and its new version goes under `Regenerated/`, which the editor ignores.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from importlib import resources
from pathlib import Path
from string import Template

from export.lens_lint import MODELS, PLUGINS, SCENE_PREFIX, SCRIPT, lint_lens_project
from export.lens_models import (
    LARGEST_BYTES,
    LensModel,
    Size,
    imported_bytes,
    lens_models,
    model_faults,
    scales_by_255,
)
from export.lens_scene import LensScene, lens_scene_from
from export.lens_yaml import NO_UUID
from lightfield.errors import ExportError
from lightfield.files import atomic_path, read_json, write_json

__all__ = [
    "LensScene",
    "carry_lens_project",
    "is_kept_edit",
    "lens_scene_from",
    "lint_lens_project",
    "write_lens_project",
]

MANIFEST = "nelf-lens.json"
REGENERATED = "Regenerated"
MANIFEST_VERSION = 1
EDITOR_MADE = ("Cache",)
"""Folders that Lens Studio makes again when it opens a project."""
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "nelf/lens")


def write_lens_project(
    folder: Path, lens: LensScene, sampler: Path, embedder: Path, student: Path
) -> list[Path]:
    """Write a project that opens in Lens Studio 5.15.4 or newer.

    Nothing is written unless all three models fit the lens and Snap's limits.

    Returns:
        The generated files as they now stand; one under `Regenerated/` stands beside a version that
        the user edited, which was kept.

    Raises:
        ExportError: when a model is missing, does not fit, or is too large; when the folder holds
            another project; when files cannot be written.
    """
    paths = {"sampler": sampler, "embedder": embedder, "student": student}
    models = lens_models(
        (lens.ray_height, lens.ray_width),
        (lens.picture_height, lens.picture_width),
        lens.points,
        lens.frequencies,
    )
    for model in models:
        if faults := model_faults(paths[model.role], model):
            raise ExportError(
                f"not a {model.role} this lens can use: {faults[0]}",
                where=paths[model.role],
                remedy="export the student again for Lens Studio",
            )
    _check_size(paths)
    known = _known_hashes(folder, lens)
    contents = _texts(lens, models, scaled=scales_by_255(student)) | {
        f"{MODELS}/{model.file_name}": paths[model.role].read_bytes() for model in models
    }
    listing = {
        "version": MANIFEST_VERSION,
        "scene": lens.scene_name,
        "files": {name: _sha256(data) for name, data in sorted(contents.items())},
    }
    project = f"{lens.file_name}.esproj"
    try:
        written = [
            _place(folder, name, data, known.get(name))
            for name, data in sorted(contents.items())
            if name != project
        ]
        write_json(folder / MANIFEST, listing)
        # Last, so that a folder that can be opened is whole.
        written.append(_place(folder, project, contents[project], known.get(project)))
    except OSError as reason:
        raise ExportError(
            f"cannot be written ({reason.strerror})", where=reason.filename or folder
        ) from reason
    return [*written, folder / MANIFEST]


def carry_lens_project(earlier: Path, folder: Path) -> bool:
    """Copy a project to where it will be generated again, with all that its user did to it.

    Returns:
        Whether there was one.

    Raises:
        ExportError: when it cannot be copied.
    """
    if not earlier.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns(*EDITOR_MADE)
    failures: list[OSError] = []

    def copy(source: str, target: str) -> None:
        try:
            shutil.copy2(source, target, follow_symlinks=False)
        except OSError as reason:  # of which copytree keeps no more than the words
            failures.append(reason)
            raise

    try:
        shutil.copytree(earlier, folder, symlinks=True, ignore=ignored, copy_function=copy)
    except (OSError, shutil.Error) as reason:
        first = failures[0] if failures else reason
        raise ExportError(
            f"the earlier project cannot be copied ({first.strerror or first})",
            where=earlier,
            remedy="move it away, or make room on the disk",
        ) from first
    return True


def is_kept_edit(path: Path) -> bool:
    """Whether a generated file was put beside the user's edited version of it."""
    return REGENERATED in path.parts


def _check_size(paths: dict[str, Path]) -> None:
    sizes = {role: imported_bytes(path) for role, path in paths.items()}
    if (total := sum(sizes.values())) > LARGEST_BYTES:
        largest = max(sizes, key=lambda role: sizes[role])
        raise ExportError(
            f"the models would take {total / 1e6:.1f} MB in the lens, "
            f"Snap allows {LARGEST_BYTES / 1e6:.0f} MB",
            where=paths[largest],
            remedy="prune the student further, or train a narrower one",
        )


def _known_hashes(folder: Path, lens: LensScene) -> dict[str, str]:
    """Hashes of the files as they were last generated."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        if folder.is_file():
            raise ExportError("is a file, not a folder", where=folder)
        if strangers := sorted(folder.glob("*.esproj")):
            raise ExportError(
                f"the folder holds the project {strangers[0].name}, which was not generated here",
                where=folder,
                remedy="choose another folder",
            )
        return {}
    data = read_json(manifest, ExportError)
    try:
        scene, files = data["scene"], dict(data["files"])
        if data["version"] != MANIFEST_VERSION:
            raise ExportError(
                "comes from another version of this tool",
                where=manifest,
                remedy="choose another folder, or move this one away",
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"not a list of generated files ({error})",
            where=manifest,
            remedy="choose another folder",
        ) from error
    if scene != lens.scene_name:
        raise ExportError(
            f"the folder holds the lens of scene {scene!r}, not {lens.scene_name!r}",
            where=folder,
            remedy="choose another folder",
        )
    return files


def _place(folder: Path, name: str, data: bytes, known: str | None) -> Path:
    """Write one file unless the user has edited it; then write beside it."""
    path = folder / name
    if path.exists():
        present = _sha256(path.read_bytes())
        if present == _sha256(data):
            return path
        if present != known:
            path = folder / REGENERATED / name
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _texts(lens: LensScene, models: tuple[LensModel, ...], *, scaled: bool) -> dict[str, bytes]:
    """All text files of a project by their path within it."""
    texts = {
        f"{lens.file_name}.esproj": _filled(lens, "project.esproj", name=lens.file_name),
        "Assets/Scene.scene": _filled(lens, "Scene.scene"),
        "Assets/Scene.scene.meta": _asset_meta(lens, "Scene", "scene"),
        "Assets/RenderTarget.renderTarget": _filled(lens, "RenderTarget.renderTarget"),
        "Assets/RenderTarget.renderTarget.meta": _asset_meta(lens, "RenderTarget", "render_target"),
        SCRIPT: _controller(lens),
        f"{SCRIPT}.meta": _filled(lens, "script.meta", meta=_uuid(lens, "script.meta")),
    }
    for name in ("module.json", "main.js"):
        texts[f"{PLUGINS}/NeuralLightField/{name}"] = _template(f"plugin/{name}")
    for model in models:
        scale = 1.0 if scaled else model.output_scale
        texts[f"{MODELS}/{model.file_name}.meta"] = _model_meta(lens, model, scale)
    return {path: text.encode() for path, text in texts.items()}


def _uuid(lens: LensScene, role: str) -> str:
    return str(uuid.uuid5(NAMESPACE, f"{lens.scene_name}/{role}"))


def _template(name: str) -> str:
    return resources.files("lens_template").joinpath(name).read_text(encoding="utf-8")


def _filled(lens: LensScene, template: str, **values: str) -> str:
    """A template with the given values; every other name in it is a role and becomes its uuid."""
    text = Template(_template(template))
    roles = set(text.get_identifiers()) - {"none", *values}
    uuids = {role: _uuid(lens, role) for role in roles}
    return text.substitute(uuids, none=NO_UUID, **values)


def _controller(lens: LensScene) -> str:
    lines = _template("NeuralLightField.js").splitlines()
    (index,) = (i for i, line in enumerate(lines) if line.startswith(SCENE_PREFIX))
    lines[index] = f"{SCENE_PREFIX}{json.dumps(lens.script_numbers())};"
    return "\n".join(lines) + "\n"


def _asset_meta(lens: LensScene, slot: str, role: str) -> str:
    meta, asset = _uuid(lens, f"{role}.meta"), _uuid(lens, role)
    return _filled(lens, "asset.meta", slot=slot, meta=meta, asset=asset)


def _model_meta(lens: LensScene, model: LensModel, scale: float) -> str:
    inputs = [_tensor(lens, "input", name, size, 1.0) for name, size in model.inputs.items()]
    outputs = [_tensor(lens, "output", name, size, scale) for name, size in model.outputs.items()]
    return _filled(
        lens,
        "model.meta",
        meta=_uuid(lens, f"{model.role}.meta"),
        asset=_uuid(lens, model.role),
        inputs="\n".join(inputs),
        outputs="\n".join(outputs),
    )


def _tensor(lens: LensScene, kind: str, name: str, size: Size, scale: float) -> str:
    x, y, z = (f"{count:.6f}" for count in size)
    # One normalisation per channel: value * scale + bias.
    channel = f"          - scale: {scale:.6f}\n            bias: 0.000000"
    channels = "\n".join([channel] * size[2])
    text = _filled(lens, f"model_{kind}.part", name=name, x=x, y=y, z=z, normalizations=channels)
    return text.rstrip("\n")
