"""What can be checked of a Lens Studio project without the editor.

The text files among themselves (`export.lens_yaml`), the controller script's numbers against the
ONNX files, and the ONNX files against their `.meta`, which tells SnapML how to read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import yaml

from export.lens_models import (
    COLOUR_SCALE,
    LARGEST_BYTES,
    LensModel,
    Size,
    imported_bytes,
    lens_models,
    model_faults,
    scales_by_255,
)
from export.lens_yaml import ProjectFiles, compose, entry, holds_items, items, scalar
from lightfield.errors import ExportError

SCENE_PREFIX = "const SCENE = "
"""Starts the one line of the controller script that holds the scene's numbers, as JSON."""
SCRIPT = "Assets/NeuralLightField.js"
MODELS = "Assets/Models"
PLUGINS = "Plugins"
"""Lens Studio loads every plugin in here together with the project."""


def lint_lens_project(folder: Path) -> list[str]:
    """Everything found wrong with a project, one line each; empty when it is clean.

    Raises:
        ExportError: when the folder holds no project.
    """
    projects = sorted(folder.glob("*.esproj"))
    if not projects:
        raise ExportError("no .esproj file", where=folder, remedy="generate the lens first")
    files = ProjectFiles(folder)
    if len(projects) > 1:
        files.faults.append(f"more than one project: {', '.join(p.name for p in projects)}")
    for path in sorted((folder / "Assets").rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            _read_asset(path, files)
    _read_project(projects[0], files)
    if not (folder / "Packages").exists():  # packages are archives; what they define is not seen
        files.check_references()
    return files.faults + list(_plugin_faults(folder)) + list(_chain_faults(folder))


def _read_asset(path: Path, files: ProjectFiles) -> None:
    place = path.relative_to(files.folder).as_posix()
    if path.suffix == ".meta":
        if not path.with_suffix("").exists():
            files.faults.append(f"{place}: describes a file that is not there")
        files.read(path)
        return
    if not path.with_name(f"{path.name}.meta").exists():
        files.faults.append(f"{place}: has no .meta")
    if holds_items(path):
        files.read(path)


def _read_project(path: Path, files: ProjectFiles) -> None:
    try:
        root = compose(path)
    except ExportError as error:
        files.faults.append(str(error))
        return
    meta = entry(root, "metaInfo")
    if not isinstance(root, yaml.MappingNode) or not isinstance(meta, yaml.MappingNode):
        files.faults.append(f"{path.name}: not a project description")
        return
    files.check_keys(root, "esproj", path.name)
    files.check_keys(meta, "esproj/metaInfo", path.name)
    if files.types.get(scalar(entry(root, "sceneId"))) != "Scene":
        files.faults.append(f"{path.name}: sceneId is not a scene of this project")


def _plugin_faults(folder: Path) -> Iterator[str]:
    """What keeps the editor from loading a plugin."""
    for plugin in sorted(path for path in (folder / PLUGINS).glob("*") if path.is_dir()):
        place = plugin.relative_to(folder).as_posix()
        try:
            main = json.loads((plugin / "module.json").read_text(encoding="utf-8"))["main"]
            if not (plugin / main).is_file():
                yield f"{place}/module.json: {main} is not there"
        except (OSError, KeyError, TypeError, ValueError) as error:
            yield f"{place}/module.json: names no main file ({error})"


def _chain_faults(folder: Path) -> Iterator[str]:
    """What keeps script, models and their descriptions from working together."""
    try:
        models = _models_of_script(folder / SCRIPT)
    except ExportError as error:
        yield str(error)
        return
    total_bytes = 0
    for model in models:
        path = folder / MODELS / model.file_name
        try:
            for fault in model_faults(path, model):
                yield f"{path.name}: {fault}"
            total_bytes += imported_bytes(path)
            meta = compose(path.with_name(f"{path.name}.meta"))
            yield from _meta_faults(meta, path, model)
        except ExportError as error:
            yield str(error)
    if total_bytes > LARGEST_BYTES:
        yield f"the models take {total_bytes / 1e6:.1f} MB, Snap allows {LARGEST_BYTES / 1e6:.0f} MB"


def _models_of_script(path: Path) -> tuple[LensModel, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(SCENE_PREFIX))
        scene = json.loads(line.removeprefix(SCENE_PREFIX).rstrip().rstrip(";"))
        return lens_models(
            tuple(scene["rays"]), tuple(scene["picture"]), scene["points"], scene["frequencies"]
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"no line {SCENE_PREFIX}{{...}} with the scene's numbers ({error})", where=path
        ) from error


def _meta_faults(meta: yaml.Node | None, path: Path, model: LensModel) -> Iterator[str]:
    """What a model's .meta says that the model does not."""
    settings = entry(items(meta)[0], "ImporterSettings") if items(meta) else None
    for kind, expected in (("Inputs", model.inputs), ("Outputs", model.outputs)):
        tensors = {scalar(entry(node, "Name")): node for node in items(entry(settings, kind))}
        place = f"{path.name}.meta: {kind[:-1].lower()}"
        if tensors.keys() != expected.keys():
            yield f"{place}s {sorted(tensors)} instead of {sorted(expected)}"
            continue
        for name, size in expected.items():
            yield from _tensor_faults(tensors[name], size, f"{place} {name}")
    if model.role == "student":
        outputs = items(entry(settings, "Outputs"))
        in_meta = any(
            scale == COLOUR_SCALE for node in outputs for scale, _ in normalizations(node)
        )
        if in_meta + scales_by_255(path) != 1:
            yield f"{path.name}: colours must be scaled by 255 once, by the graph or its .meta"


def _tensor_faults(node: yaml.Node, size: Size, place: str) -> Iterator[str]:
    shape = [scalar(entry(node, "Shape", axis)) for axis in "xyz"]
    if shape != [f"{count:.6f}" for count in size]:
        yield f"{place}: shape {', '.join(shape)} instead of {', '.join(map(str, size))}"
    channels = normalizations(node)
    if len(channels) != size[2]:
        yield f"{place}: {len(channels)} normalisations for {size[2]} channels"
    if len(set(channels)) > 1:
        yield f"{place}: channels are scaled differently"
    allowed = {1.0, COLOUR_SCALE} if place.endswith("output output") else {1.0}
    for scale, bias in sorted(set(channels)):
        if scale not in allowed or bias != 0:
            yield f"{place}: values would become {scale:g} x + {bias:g}"


def normalizations(tensor: yaml.Node) -> list[tuple[float, float]]:
    """Scale and bias of each channel of a tensor in a .meta; NaN for what is no number."""
    return [
        (_number(entry(node, "scale")), _number(entry(node, "bias")))
        for node in items(entry(tensor, "Normalizations"))
    ]


def _number(node: yaml.Node | None) -> float:
    try:
        return float(scalar(node))
    except ValueError:
        return math.nan
