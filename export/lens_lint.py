"""Linter for Lens Studio projects, which works without the editor.

It checks that the text files agree with each other (`export.lens_yaml`), that the numbers in the
controller script fit the ONNX files, and that the `.meta` files, by which SnapML reads the ONNX
files, fit them as well.
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
from export.lens_paths import ASSETS, MODELS, SCRIPT, moved_assets, scene_of_project
from export.lens_vocabulary import KNOWN_EDITOR
from export.lens_yaml import ProjectFiles, compose, entry, fault_of, holds_items, items, scalar
from lightfield.errors import ExportError
from lightfield.files import read_json

SCENE_PREFIX = "const SCENE = "
"""Start of the line of the controller script that holds the scene's numbers as JSON."""
MAX_NAMES = 20
"""Largest number of unknown keys that a note lists."""
PLUGINS = "Plugins"
"""Folder of a project from which Lens Studio loads plugins."""


@dataclass(frozen=True)
class LintResult:
    """Faults of a lens project and notes about it, one line each."""

    faults: list[str]
    """Reasons why the lens would not work, and text that Lens Studio would not write."""
    notes: list[str]
    """What could not be checked, because an unknown version of Lens Studio saved the project."""


def lint_lens_project(folder: Path) -> list[str]:
    """The faults of a project, one line each.

    Raises:
        ExportError: when the folder contains no project.
    """
    return lint_result(folder).faults


def lint_result(folder: Path) -> LintResult:
    """The faults of a project, and notes about parts that could not be checked.

    Raises:
        ExportError: when the folder contains no project.
    """
    projects = sorted(folder.glob("*.esproj"))
    if not projects:
        raise ExportError(
            "the folder has no .esproj file", where=folder, remedy="run `nelf lens` first"
        )
    files = ProjectFiles(folder)
    if len(projects) > 1:
        files.faults.append(f"more than one project: {', '.join(p.name for p in projects)}")
    root = _read_project(projects[0], files)
    for path in sorted((folder / ASSETS).rglob("*")):
        if not path.is_dir() and not path.name.startswith("."):
            _read_asset(path, files)
    if root is not None and files.types.get(scalar(entry(root, "sceneId"))) != "Scene":
        files.faults.append(f"{projects[0].name}: sceneId names no scene of this project")
    if not (folder / "Packages").exists():  # packages are archives whose definitions are not read
        files.check_references()
    faults = [*files.faults, *_plugin_faults(folder), *_chain_faults(folder)]
    return LintResult(list(dict.fromkeys(faults)), list(_notes(files)))


def _notes(files: ProjectFiles) -> Iterator[str]:
    if files.unlisted:
        names = sorted(files.unlisted)
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        yield (
            f"saved by Lens Studio {files.other_editor}, whose keys and values are not all known; "
            f"not checked: {', '.join(names[:MAX_NAMES])}{more}"
        )


def _read_asset(path: Path, files: ProjectFiles) -> None:
    name = path.relative_to(files.folder).as_posix()
    if not path.is_file():
        what = "a broken link" if path.is_symlink() else "neither a file nor a folder"
        files.faults.append(f"{name}: {what}")
        return
    if path.suffix == ".meta":
        if not path.with_suffix("").exists():
            files.faults.append(f"{name}: describes a file that does not exist")
        files.read(path)
        return
    if not path.with_name(f"{path.name}.meta").exists():
        files.faults.append(f"{name}: has no .meta")
    if holds_items(path):
        files.read(path)


def _read_project(path: Path, files: ProjectFiles) -> yaml.Node | None:
    """The .esproj file, with its keys and values checked; None when the file is not readable."""
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
    """The Lens Studio version that saved a project; None for `KNOWN_EDITOR`."""
    numbers = [scalar(entry(root, "studioVersion", key)) for key in ("major", "minor", "patch")]
    try:
        version = tuple(int(number) for number in numbers)
    except ValueError:
        return None
    return ".".join(numbers) if version[:2] != KNOWN_EDITOR else None


def _plugin_faults(folder: Path) -> Iterator[str]:
    """Reasons why the editor could not load a plugin."""
    for plugin in sorted(path for path in (folder / PLUGINS).glob("*") if path.is_dir()):
        name = plugin.relative_to(folder).as_posix()
        try:
            if not (plugin / "module.json").is_file():
                raise ExportError("the file does not exist")
            main = read_json(plugin / "module.json", ExportError)["main"]
            if not (plugin / main).is_file():
                yield f"{name}/module.json: {main} does not exist"
        except (ExportError, OSError, KeyError, TypeError, ValueError) as error:
            yield f"{name}/module.json: names no main file ({error})"


def _chain_faults(folder: Path) -> Iterator[str]:
    """Contradictions between the script, the models and the .meta files of the models."""
    moved = moved_assets(folder, scene_of_project(folder))
    try:
        models = _models_of_script(folder / moved.get(SCRIPT, SCRIPT))
    except ExportError as error:
        yield fault_of(error, folder)
        return
    total_bytes = 0
    for model in models:
        generated = f"{MODELS}/{model.file_name}"
        path = folder / moved.get(generated, generated)
        try:
            for fault in model_faults(path, model):
                yield f"{path.name}: {fault}"
            total_bytes += imported_bytes(path)
            meta = compose(path.with_name(f"{path.name}.meta"))
            yield from _meta_faults(meta, path, model)
        except ExportError as error:
            yield fault_of(error, folder)
    if total_bytes > LARGEST_BYTES:
        yield (
            f"the models take {total_bytes / 1e6:.1f} MB, Snap allows {LARGEST_BYTES / 1e6:.0f} MB"
        )


def _models_of_script(path: Path) -> tuple[LensModel, ...]:
    try:
        if not path.is_file():
            raise FileNotFoundError("the file does not exist")
        lines = path.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(SCENE_PREFIX))
        scene = json.loads(line.removeprefix(SCENE_PREFIX).rstrip().rstrip(";"))
        sizes = (*scene["rays"], *scene["image"], scene["points"], scene["frequencies"])
        if not all(isinstance(size, int) and 0 < size < 1_000_000 for size in sizes):
            raise ValueError("a size is not a positive integer")
        return lens_models(
            tuple(scene["rays"]), tuple(scene["image"]), scene["points"], scene["frequencies"]
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ExportError(
            f"the script lacks the line {SCENE_PREFIX}{{...}} with the scene's numbers ({error})",
            where=path,
        ) from error


def _meta_faults(meta: yaml.Node | None, path: Path, model: LensModel) -> Iterator[str]:
    """Differences between a model and its .meta."""
    settings = entry(items(meta)[0], "ImporterSettings") if items(meta) else None
    for kind, expected in (("Inputs", model.inputs), ("Outputs", model.outputs)):
        tensors = {scalar(entry(node, "Name")): node for node in items(entry(settings, kind))}
        where = f"{path.name}.meta: {kind[:-1].lower()}"
        if tensors.keys() != expected.keys():
            yield f"{where}s {sorted(tensors)} instead of {sorted(expected)}"
            continue
        for name, size in expected.items():
            yield from _tensor_faults(tensors[name], size, f"{where} {name}")
    if model.role == "student":
        outputs = items(entry(settings, "Outputs"))
        in_meta = any(scale == COLOR_SCALE for node in outputs for scale, _ in normalizations(node))
        if in_meta + scales_by_255(path) != 1:
            yield f"{path.name}: colors must be scaled by 255 once, by the graph or by its .meta"


def _tensor_faults(node: yaml.Node, size: Size, where: str) -> Iterator[str]:
    shape = [entry(node, "Shape", axis) for axis in "xyz"]
    if tuple(_number(count) for count in shape) != size:
        found = ", ".join(scalar(count)[:60] for count in shape)
        yield f"{where}: shape {found} instead of {', '.join(map(str, size))}"
    channels = normalizations(node)
    if len(channels) != size[2]:
        yield f"{where}: {len(channels)} normalizations for {size[2]} channels"
    if len(set(channels)) > 1:
        yield f"{where}: channels are scaled differently"
    allowed = {1.0, COLOR_SCALE} if where.endswith("output output") else {1.0}
    for scale, bias in sorted(set(channels)):
        if scale not in allowed or bias != 0:
            yield f"{where}: values would become {scale:g} x + {bias:g}"


def normalizations(tensor: yaml.Node) -> list[tuple[float, float]]:
    """Scale and bias of each channel of a tensor in a .meta; NaN for text that is not a number."""
    return [
        (_number(entry(node, "scale")), _number(entry(node, "bias")))
        for node in items(entry(tensor, "Normalizations"))
    ]


def _number(node: yaml.Node | None) -> float:
    try:
        return float(scalar(node))
    except ValueError:
        return math.nan
