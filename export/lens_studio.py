"""Generator of Lens Studio projects: models, controller script, scene and editor plugin.

The project is text in the format of Lens Studio 5.15.4, filled in from the files of
`lens_template`; newer versions migrate the project. Its design:

- The scene has no MLComponents. The script creates them at run time, as Snap's own samples do.
- The image is the clear texture of the render target. An Image would need a material with a shader
  graph, which is a binary file that only the editor can write. If the user adds an Image, the
  script uses the Image.
- An editor plugin assembles the same scene from the assets. The plugin can add the Image, and it
  replaces the generated scene if the editor does not accept the text.
- Every uuid is derived from the scene's name and the object's role (`export.lens_paths`), so that a
  second generation gives the same bytes and references stay valid. The editor creates Cache,
  Support and Workspaces.

A project can be generated again in the same folder. No file is deleted. An asset that the user
moved or renamed is written to its new path. A generated file that the user edited is kept; its new
version is written to `Regenerated/`, which the editor ignores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from export.lens_lint import PLUGINS, SCENE_PREFIX, lint_lens_project, lint_result
from export.lens_models import (
    LARGEST_BYTES,
    LensModel,
    Size,
    imported_bytes,
    lens_models,
    model_faults,
    scales_by_255,
)
from export.lens_paths import (
    MANIFEST,
    MODELS,
    RENDER_TARGET,
    SCENE,
    SCRIPT,
    lens_uuid,
    moved_assets,
    moved_project,
)
from export.lens_scene import LensScene, lens_scene_from
from export.lens_yaml import NO_UUID
from lightfield import run
from lightfield.errors import ExportError
from lightfield.files import atomic_path, read_json, write_json

__all__ = [
    "LensScene",
    "WrittenLens",
    "carry_lens_projects",
    "generated_hashes",
    "lens_scene_from",
    "lint_lens_project",
    "lint_result",
    "write_lens_project",
]

REGENERATED = "Regenerated"
MANIFEST_VERSION = 1
EDITOR_MADE = "Cache"
"""The folder of a project that Lens Studio creates whenever it opens the project."""
STAGE_FILES = {run.MANIFEST, run.KEY}
"""Files of the stage itself, next to the project."""


@dataclass(frozen=True)
class WrittenLens:
    """The generated files of a project."""

    files: list[Path]
    kept_edits: list[Path]
    """Files that were written to `Regenerated/`, because the user edited the earlier version."""
    restored: list[Path]
    """Files that the user had deleted and that were written again."""


def write_lens_project(
    folder: Path, lens: LensScene, sampler: Path, embedder: Path, student: Path
) -> WrittenLens:
    """Write a project for Lens Studio 5.15.4 or newer.

    Nothing is written unless all three models fit the lens and Snap's limits.

    Raises:
        ExportError: when a model is missing, does not fit, or is too large; when the folder
            contains another project; when files cannot be written.
    """
    paths = {"sampler": sampler, "embedder": embedder, "student": student}
    models = lens_models(
        (lens.ray_height, lens.ray_width),
        (lens.image_height, lens.image_width),
        lens.points,
        lens.frequencies,
    )
    for model in models:
        if faults := model_faults(paths[model.role], model):
            raise ExportError(
                f"the lens cannot use this {model.role}: {faults[0]}",
                where=paths[model.role],
                remedy="export the student again for Lens Studio",
            )
    _check_size(paths)
    known = generated_hashes(folder, lens)
    contents = _texts(lens, models, scaled=scales_by_255(student)) | {
        f"{MODELS}/{model.file_name}": paths[model.role].read_bytes() for model in models
    }
    listing = {
        "version": MANIFEST_VERSION,
        "scene": lens.scene_name,
        "files": {name: _sha256(data) for name, data in sorted(contents.items())},
    }
    project = f"{lens.file_name}.esproj"
    moved = moved_assets(folder, lens.scene_name)
    moved |= moved_project(folder, lens.scene_name, project)
    paths_now = {name: moved.get(name, name) for name in contents}
    deleted = [name for name, now in paths_now.items() if name in known and _is_free(folder / now)]

    def write(name: str) -> Path:
        return _write_beside_edits(folder, paths_now[name], contents[name], known.get(name))

    try:
        written = {name: write(name) for name in sorted(contents) if name != project}
        write_json(folder / MANIFEST, listing)
        written[project] = write(project)  # last, so that a project that opens is complete
    except OSError as reason:
        raise ExportError(
            f"the file cannot be written ({reason.strerror})", where=reason.filename or folder
        ) from reason
    return WrittenLens(
        [*written.values(), folder / MANIFEST],
        [path for name, path in written.items() if path != folder / paths_now[name]],
        [written[name] for name in sorted(deleted)],
    )


def carry_lens_projects(earlier: Path, folder: Path) -> None:
    """Copy the projects of an earlier lens stage into the folder of a new one.

    The copy includes all changes by the user, in the project and next to it. Links stay links.

    Raises:
        ExportError: when a file cannot be copied.
    """
    if not earlier.is_dir():
        return
    for path in folder.iterdir():  # left by an interrupted stage
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in STAGE_FILES:
            path.unlink()

    def left_out(parent: str, names: list[str]) -> set[str]:
        source_folder = Path(parent)
        if source_folder == earlier:
            return STAGE_FILES & set(names)
        cache = source_folder / EDITOR_MADE
        is_project = source_folder.parent == earlier and any(
            name.endswith(".esproj") for name in names
        )
        return {EDITOR_MADE} if is_project and cache.is_dir() and not cache.is_symlink() else set()

    failures: list[OSError] = []

    def copy(source: str, target: str) -> None:
        try:
            shutil.copy2(source, target, follow_symlinks=False)
        except OSError as reason:  # copytree keeps only the text of the error
            failures.append(reason)
            raise

    try:
        shutil.copytree(
            earlier, folder, symlinks=True, ignore=left_out, copy_function=copy, dirs_exist_ok=True
        )
    except (OSError, shutil.Error) as reason:
        first = failures[0] if failures else reason
        raise ExportError(
            f"the earlier project cannot be copied ({first.strerror or first})",
            where=earlier,
            remedy="move it away, or make room on the disk",
        ) from first


def _check_size(paths: dict[str, Path]) -> None:
    sizes = {role: imported_bytes(path) for role, path in paths.items()}
    if (total := sum(sizes.values())) > LARGEST_BYTES:
        largest = max(sizes, key=lambda role: sizes[role])
        raise ExportError(
            f"the models would take {total / 1e6:.1f} MB in the lens, "
            f"Snap allows {LARGEST_BYTES / 1e6:.0f} MB",
            where=paths[largest],
            remedy="prune the student further, or train a narrower student",
        )


def generated_hashes(folder: Path, lens: LensScene) -> dict[str, str]:
    """Hashes of the files of a project as last generated; empty when there is no project yet.

    Raises:
        ExportError: when the folder contains something else, or the project of another scene.
    """
    manifest = folder / MANIFEST
    if folder.is_symlink():
        raise ExportError(
            "the path is a link, not a folder",
            where=folder,
            remedy="replace the link by the folder",
        )
    if not manifest.exists():
        if folder.is_file():
            raise ExportError("the path is a file, not a folder", where=folder)
        if strangers := sorted(folder.glob("*.esproj")):
            raise ExportError(
                f"the folder contains the project {strangers[0].name}, which nelf did not generate",
                where=folder,
                remedy="move it away, or choose another folder",
            )
        return {}
    data = read_json(manifest, ExportError)
    try:
        scene, files = data["scene"], {k: str(v) for k, v in data["files"].items()}
        if data["version"] != MANIFEST_VERSION:
            raise ExportError(
                "an incompatible version of nelf generated the project",
                where=manifest,
                remedy="move it away, or choose another folder",
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ExportError(
            f"the manifest is not a list of generated files ({error})",
            where=manifest,
            remedy="move it away, or choose another folder",
        ) from error
    if scene != lens.scene_name:
        raise ExportError(
            f"the folder contains the lens of scene {scene!r}, not {lens.scene_name!r}",
            where=folder,
            remedy="move it away, or choose another folder",
        )
    return files


def _write_beside_edits(folder: Path, name: str, data: bytes, known: str | None) -> Path:
    """Write a file under the first root where its path holds nothing by the user."""
    new = _sha256(data)
    for path in (root / name for root in _roots(folder)):
        if not _is_replaceable(path, folder, {known, new}):
            continue
        if _is_free(path) or _sha256(path.read_bytes()) != new:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        return path
    raise AssertionError("_roots never ends")


def _roots(folder: Path) -> Iterator[Path]:
    """The project folder, then `Regenerated`, `Regenerated-2` and so on inside the project."""
    yield folder
    yield folder / REGENERATED
    for number in itertools.count(2):
        yield folder / f"{REGENERATED}-{number}"


def _is_replaceable(path: Path, folder: Path, hashes: set[str | None]) -> bool:
    """Whether a path is free or holds a generated file, and leads through no link."""
    for parent in path.relative_to(folder).parents:
        above = folder / parent
        if above != folder and (above.is_symlink() or (above.exists() and not above.is_dir())):
            return False
    if _is_free(path):
        return True
    return path.is_file() and not path.is_symlink() and _sha256(path.read_bytes()) in hashes


def _is_free(path: Path) -> bool:
    return not path.exists() and not path.is_symlink()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _texts(lens: LensScene, models: tuple[LensModel, ...], *, scaled: bool) -> dict[str, bytes]:
    """All text files of a project by their path in the project."""
    texts = {
        f"{lens.file_name}.esproj": _filled(lens, "project.esproj", name=lens.file_name),
        SCENE: _filled(lens, "Scene.scene"),
        f"{SCENE}.meta": _asset_meta(lens, "Scene", "scene"),
        RENDER_TARGET: _filled(lens, "RenderTarget.renderTarget"),
        f"{RENDER_TARGET}.meta": _asset_meta(lens, "RenderTarget", "render_target"),
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
    return lens_uuid(lens.scene_name, role)


def _template(name: str) -> str:
    return resources.files("lens_template").joinpath(name).read_text(encoding="utf-8")


def _filled(lens: LensScene, template: str, **values: str) -> str:
    """A filled template; every name without a given value is a role and becomes the role's uuid."""
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
    # Each channel has its normalization: value * scale + bias.
    channel = f"          - scale: {scale:.6f}\n            bias: 0.000000"
    channels = "\n".join([channel] * size[2])
    text = _filled(lens, f"model_{kind}.part", name=name, x=x, y=y, z=z, normalizations=channels)
    return text.rstrip("\n")
