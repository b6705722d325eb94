"""What can be checked of a Lens Studio project without the editor.

The text files among themselves (`export.lens_yaml`), the controller script's numbers against the
ONNX files, and the ONNX files against their `.meta`, which tells SnapML how to read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from export.lens_models import (
    COLOR_SCALE,
    LARGEST_BYTES,
    LensModel,
    Size,
    imported_bytes,
    lens_models,
    model_faults,
    scales_by_255,
)
from export.lens_places import ASSETS, MODELS, SCRIPT, moved_assets, scene_of_project
from export.lens_vocabulary import KNOWN_EDITOR
from export.lens_yaml import ProjectFiles, compose, entry, fault_of, holds_items, items, scalar
from lightfield.errors import ExportError
from lightfield.files import read_json

SCENE_PREFIX = "const SCENE = "
"""Starts the one line of the controller script that holds the scene's numbers, as JSON."""
MOST_NAMES = 20
"""How many keys of another editor are named."""
PLUGINS = "Plugins"
"""Lens Studio loads every plugin in here together with the project."""


@dataclass(frozen=True)
class LensFindings:
    """What was found in a project, one line each."""

    faults: list[str]
    """What keeps the lens from working, or is nothing that Lens Studio writes."""
    notes: list[str]
    """What could not be checked, because another editor than the one known here saved the project."""


def lint_lens_project(folder: Path) -> list[str]:
    """Everything found wrong with a project, one line each; empty when it is clean.

    Raises:
        ExportError: when the folder holds no project.
    """
    return lens_findings(folder).faults


def lens_findings(folder: Path) -> LensFindings:
    """Faults of a project, and what of it was not checked.

    Raises:
        ExportError: when the folder holds no project.
    """
    projects = sorted(folder.glob("*.esproj"))
    if not projects:
        raise ExportError("no .esproj file", where=folder, remedy="generate the lens first")
    files = ProjectFiles(folder)
    if len(projects) > 1:
        files.faults.append(f"more than one project: {', '.join(p.name for p in projects)}")
    root = _read_project(projects[0], files)
    for path in sorted((folder / ASSETS).rglob("*")):
        if not path.is_dir() and not path.name.startswith("."):
            _read_asset(path, files)
    if root is not None and files.types.get(scalar(entry(root, "sceneId"))) != "Scene":
        files.faults.append(f"{projects[0].name}: sceneId is not a scene of this project")
    if not (folder / "Packages").exists():  # packages are archives; what they define is not seen
        files.check_references()
    faults = [*files.faults, *_plugin_faults(folder), *_chain_faults(folder)]
    return LensFindings(list(dict.fromkeys(faults)), list(_notes(files)))


def _notes(files: ProjectFiles) -> Iterator[str]:
    if files.novelties:
        names = sorted(files.novelties)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        yield (
            f"saved by Lens Studio {files.other_editor}; what it writes beyond what is known of it was "
            f"not checked: {', '.join(names[:MOST_NAMES])}{more}"
        )


def _read_asset(path: Path, files: ProjectFiles) -> None:
    place = path.relative_to(files.folder).as_posix()
    if not path.is_file():
        what = "a link that leads nowhere" if path.is_symlink() else "neither a file nor a folder"
        files.faults.append(f"{place}: {what}")
        return
    if path.suffix == ".meta":
        if not path.with_suffix("").exists():
            files.faults.append(f"{place}: describes a file that is not there")
        files.read(path)
        return
    if not path.with_name(f"{path.name}.meta").exists():
        files.faults.append(f"{place}: has no .meta")
    if holds_items(path):
        files.read(path)


def _read_project(path: Path, files: ProjectFiles) -> yaml.Node | None:
    """The project's own file, with its keys and values checked; None when it is not readable."""
    try:
        root = compose(path)
    except ExportError as error:
        files.faults.append(fault_of(error, files.folder))
        return None
    if not isinstance(entry(root, "metaInfo"), yaml.MappingNode) or root is None:
        files.faults.append(f"{path.name}: not a project description")
        return None
    files.other_editor = _other_editor(root)
    files.check_maps(root, "esproj", path.name)
    return root


def _other_editor(root: yaml.Node) -> str | None:
    """The version that saved a project, when it is not the one whose keys are known in full."""
    numbers = [scalar(entry(root, "studioVersion", key)) for key in ("major", "minor", "patch")]
    try:
        version = tuple(int(number) for number in numbers)
    except ValueError:
        return None
    return ".".join(numbers) if version[:2] != KNOWN_EDITOR else None


def _plugin_faults(folder: Path) -> Iterator[str]:
    """What keeps the editor from loading a plugin."""
    for plugin in sorted(path for path in (folder / PLUGINS).glob("*") if path.is_dir()):
        place = plugin.relative_to(folder).as_posix()
        try:
            if not (plugin / "module.json").is_file():
                raise ExportError("there is no such file")
            main = read_json(plugin / "module.json", ExportError)["main"]
            if not (plugin / main).is_file():
                yield f"{place}/module.json: {main} is not there"
        except (ExportError, OSError, KeyError, TypeError, ValueError) as error:
            yield f"{place}/module.json: names no main file ({error})"


def _chain_faults(folder: Path) -> Iterator[str]:
    """What keeps script, models and their descriptions from working together."""
    moved = moved_assets(folder, scene_of_project(folder))
    try:
        models = _models_of_script(folder / moved.get(SCRIPT, SCRIPT))
    except ExportError as error:
        yield fault_of(error, folder)
        return
    total_bytes = 0
    for model in models:
        name = f"{MODELS}/{model.file_name}"
        path = folder / moved.get(name, name)
        try:
            for fault in model_faults(path, model):
                yield f"{path.name}: {fault}"
            total_bytes += imported_bytes(path)
            meta = compose(path.with_name(f"{path.name}.meta"))
            yield from _meta_faults(meta, path, model)
        except ExportError as error:
            yield fault_of(error, folder)
    if total_bytes > LARGEST_BYTES:
        yield f"the models take {total_bytes / 1e6:.1f} MB, Snap allows {LARGEST_BYTES / 1e6:.0f} MB"


def _models_of_script(path: Path) -> tuple[LensModel, ...]:
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        lines = path.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(SCENE_PREFIX))
        scene = json.loads(line.removeprefix(SCENE_PREFIX).rstrip().rstrip(";"))
        sizes = (*scene["rays"], *scene["image"], scene["points"], scene["frequencies"])
        if not all(isinstance(size, int) and 0 < size < 1_000_000 for size in sizes):
            raise ValueError("a size is not a positive whole number")
        return lens_models(
            tuple(scene["rays"]), tuple(scene["image"]), scene["points"], scene["frequencies"]
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
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
        in_meta = any(scale == COLOR_SCALE for node in outputs for scale, _ in normalizations(node))
        if in_meta + scales_by_255(path) != 1:
            yield f"{path.name}: colors must be scaled by 255 once, by the graph or its .meta"


def _tensor_faults(node: yaml.Node, size: Size, place: str) -> Iterator[str]:
    shape = [entry(node, "Shape", axis) for axis in "xyz"]
    if tuple(_number(count) for count in shape) != size:
        found = ", ".join(scalar(count)[:60] for count in shape)
        yield f"{place}: shape {found} instead of {', '.join(map(str, size))}"
    channels = normalizations(node)
    if len(channels) != size[2]:
        yield f"{place}: {len(channels)} normalizations for {size[2]} channels"
    if len(set(channels)) > 1:
        yield f"{place}: channels are scaled differently"
    allowed = {1.0, COLOR_SCALE} if place.endswith("output output") else {1.0}
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
