"""A Lens Studio project: models, controller script and the scene around them, ready to open.

The project is text in Lens Studio 5.15.4's own form, filled in from the files of `lens_template`;
newer versions migrate it. What a reader should know of its shape:

- The MLComponents are made by the script at run time, as Snap's own samples do; the scene holds none.
- The image is the clear texture of the render target. An Image would need a material, whose shader
  graph is a binary only the editor writes. The script prefers an Image when the user adds one.
- A plugin for the editor puts the same scene together from the assets: it can add the Image, and it is
  the way out when the editor does not take the text.
- Every uuid follows from the scene's name and the thing's role (`export.lens_places`), so generating
  twice gives the same bytes and references survive. Cache, Support and Workspaces are the editor's to
  make.

A project may be generated again over itself. Files are written, never deleted: an asset that the user
moved or renamed is written where it lies now, and a generated file that was edited since is kept, while
its new version goes under `Regenerated/`, which the editor ignores.
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

from export.lens_lint import PLUGINS, SCENE_PREFIX, lens_findings, lint_lens_project
from export.lens_models import (
    LARGEST_BYTES,
    LensModel,
    Size,
    imported_bytes,
    lens_models,
    model_faults,
    scales_by_255,
)
from export.lens_places import (
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
    "lens_findings",
    "lens_scene_from",
    "lint_lens_project",
    "write_lens_project",
]

REGENERATED = "Regenerated"
MANIFEST_VERSION = 1
EDITOR_MADE = "Cache"
"""The folder of a project that Lens Studio makes again when it opens the project."""
STAGE_FILES = {run.MANIFEST, run.KEY}
"""What lies beside the project and is the stage's own."""


@dataclass(frozen=True)
class WrittenLens:
    """The generated files of a project, as they now stand."""

    files: list[Path]
    kept_edits: list[Path]
    """Those of them that stand under `Regenerated/`, beside a version of the user's."""
    restored: list[Path]
    """Those of them that the user had deleted, and that are there again."""


def write_lens_project(
    folder: Path, lens: LensScene, sampler: Path, embedder: Path, student: Path
) -> WrittenLens:
    """Write a project that opens in Lens Studio 5.15.4 or newer.

    Nothing is written unless all three models fit the lens and Snap's limits.

    Raises:
        ExportError: when a model is missing, does not fit, or is too large; when the folder holds
            another project; when files cannot be written.
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
                f"not a {model.role} this lens can use: {faults[0]}",
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
    places = {name: moved.get(name, name) for name in contents}
    gone = [name for name, place in places.items() if name in known and _is_free(folder / place)]

    def place(name: str) -> Path:
        return _place(folder, places[name], contents[name], known.get(name))

    try:
        written = {name: place(name) for name in sorted(contents) if name != project}
        write_json(folder / MANIFEST, listing)
        written[project] = place(project)  # last, so that a folder that can be opened is whole
    except OSError as reason:
        raise ExportError(
            f"cannot be written ({reason.strerror})", where=reason.filename or folder
        ) from reason
    return WrittenLens(
        [*written.values(), folder / MANIFEST],
        [path for name, path in written.items() if path != folder / places[name]],
        [written[name] for name in sorted(gone)],
    )


def carry_lens_projects(earlier: Path, folder: Path) -> None:
    """Copy what an earlier lens stage holds into the folder where the stage is written again.

    All that a user did comes along, in the project and beside it. Links stay links.

    Raises:
        ExportError: when it cannot be copied.
    """
    if not earlier.is_dir():
        return
    for path in folder.iterdir():  # of an earlier attempt
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in STAGE_FILES:
            path.unlink()

    def left_out(parent: str, names: list[str]) -> set[str]:
        place = Path(parent)
        if place == earlier:
            return STAGE_FILES & set(names)
        cache = place / EDITOR_MADE
        is_project = place.parent == earlier and any(name.endswith(".esproj") for name in names)
        return {EDITOR_MADE} if is_project and cache.is_dir() and not cache.is_symlink() else set()

    failures: list[OSError] = []

    def copy(source: str, target: str) -> None:
        try:
            shutil.copy2(source, target, follow_symlinks=False)
        except OSError as reason:  # of which copytree keeps no more than the words
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
            remedy="prune the student further, or train a narrower one",
        )


def generated_hashes(folder: Path, lens: LensScene) -> dict[str, str]:
    """Hashes of the files of a project as they were last generated; none where there is no project.

    Raises:
        ExportError: when the folder holds something else, or the project of another scene.
    """
    manifest = folder / MANIFEST
    if folder.is_symlink():
        raise ExportError("is a link, not a folder", where=folder, remedy="put the folder there")
    if not manifest.exists():
        if folder.is_file():
            raise ExportError("is a file, not a folder", where=folder)
        if strangers := sorted(folder.glob("*.esproj")):
            raise ExportError(
                f"the folder holds the project {strangers[0].name}, which was not generated here",
                where=folder,
                remedy="move it away, or choose another folder",
            )
        return {}
    data = read_json(manifest, ExportError)
    try:
        scene, files = data["scene"], {k: str(v) for k, v in data["files"].items()}
        if data["version"] != MANIFEST_VERSION:
            raise ExportError(
                "comes from another version of this tool",
                where=manifest,
                remedy="move it away, or choose another folder",
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ExportError(
            f"not a list of generated files ({error})",
            where=manifest,
            remedy="move it away, or choose another folder",
        ) from error
    if scene != lens.scene_name:
        raise ExportError(
            f"the folder holds the lens of scene {scene!r}, not {lens.scene_name!r}",
            where=folder,
            remedy="move it away, or choose another folder",
        )
    return files


def _place(folder: Path, name: str, data: bytes, known: str | None) -> Path:
    """Write one file at the first of its places where nothing of the user's is."""
    new = _sha256(data)
    for path in (root / name for root in _roots(folder)):
        if not _is_ours(path, folder, {known, new}):
            continue
        if _is_free(path) or _sha256(path.read_bytes()) != new:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        return path
    raise AssertionError("there is always another place")


def _roots(folder: Path) -> Iterator[Path]:
    """The project, `Regenerated` within it, and further ones should that hold a file of the user's."""
    yield folder
    yield folder / REGENERATED
    for number in itertools.count(2):
        yield folder / f"{REGENERATED}-{number}"


def _is_ours(path: Path, folder: Path, hashes: set[str | None]) -> bool:
    """Whether a place is free or holds what was generated, and is not reached through a link."""
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
    """All text files of a project by their path within it."""
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
    # One normalization per channel: value * scale + bias.
    channel = f"          - scale: {scale:.6f}\n            bias: 0.000000"
    channels = "\n".join([channel] * size[2])
    text = _filled(lens, f"model_{kind}.part", name=name, x=x, y=y, z=z, normalizations=channels)
    return text.rstrip("\n")
