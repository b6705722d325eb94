"""The export and lens stages: exported graphs, and a Lens Studio project."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from export.bundle import write_bundle
from export.calibration import Calibration
from export.exported_graph import ExportedGraph
from export.lens_studio import (
    carry_lens_projects,
    generated_hashes,
    lens_scene_from,
    lint_result,
    write_lens_project,
)
from lightfield.errors import CheckpointError, ExportError
from lightfield.files import write_json
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.scene import Scene, Views
from lightfield.scratch import libraries_in_scratch
from pipeline.console import Console
from pipeline.students import load_light_field
from pipeline.training import ingredient, scene_of

PARITY_VIEWS = 4
CALIBRATION_VIEWS = 6
EXPORT_VERSION = 3
"""Version of the exported files. A run with files of an older version exports them again."""
GRAPHS, LATENCIES = "graphs.json", "latencies.json"
CPU = torch.device("cpu")
MAX_FAULTS = 20
"""Largest number of faults of a lens project that are printed."""
PORTS = ("COM", "LPT")
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in PORTS for n in range(10))}
"""Device names, which Windows does not allow for files."""


def newest_student(run: Run) -> tuple[str, Artifact]:
    """The pruned student if the run has one, else the dense student, with the name of its stage.

    Raises:
        CheckpointError: when the run has no student, or the student is older than its inputs.
    """
    stage = "student" if run.find("prune") is None else "prune"
    return stage, ingredient(run, stage)


def newest_export(run: Run) -> Artifact:
    """The exported graphs of the newest student.

    Raises:
        CheckpointError: when the run has no exported graphs, or they are older than the student.
    """
    graphs, newest = ingredient(run, "export"), newest_student(run)[0]
    if graphs.manifest["inputs"].keys() != {"scene", newest}:
        raise CheckpointError(
            f"the graphs were not exported from the newest student, the result of `nelf {newest}`",
            where=graphs.path,
            remedy=f"run `nelf export --run {run.path}` again",
        )
    return graphs


def scene_file_name(name: str) -> str:
    """A scene's name as it appears in file names: `lego` becomes `Lego`."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    text = "".join(word[0].upper() + word[1:] for word in words)
    fits = text[:1].isalpha() and text.upper() not in RESERVED
    return text if fits else f"Scene{text}"


def make_export(run: Run, console: Console) -> Artifact:
    """Export the newest student and compare every graph with PyTorch on test poses."""
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    settings = {"student": stage_name, "parity_views": PARITY_VIEWS, "version": EXPORT_VERSION}

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        with console.progress("export") as progress, libraries_in_scratch("export"):
            graphs = write_bundle(
                field,
                scene.test.poses[:PARITY_VIEWS],
                scene_file_name(scene.name),
                stage.path,
                truth=_images(scene.test, range(min(PARITY_VIEWS, len(scene.test)))),
                calibration=_calibration(scene),
                progress=progress,
            )
        write_json(stage.path / GRAPHS, [graph.to_json() for graph in graphs])
        stage.metrics |= _summary(graphs)
        stage.details |= {"student": stage_name, "transform": scene.transform.to_json()}

    return run.perform("export", settings, {"scene": source, stage_name: student}, work)[0]


def _images(views: Views, indices: Iterable[int]) -> Float[np.ndarray, "n h w 3"]:
    return np.stack([views.image(index) for index in indices])


def _calibration(scene: Scene) -> Calibration:
    """Evenly spaced training views."""
    last = len(scene.train) - 1
    chosen = np.linspace(0, last, min(CALIBRATION_VIEWS, last + 1)).round().astype(int).tolist()
    return Calibration(scene.train.poses[chosen], _images(scene.train, chosen))


def _summary(graphs: list[ExportedGraph]) -> dict[str, float | int | list[str]]:
    """Metrics of the stage. The lowest parity excludes int8 graphs, which have no parity floor."""
    floored = [graph for graph in graphs if graph.precision != "int8"]
    return {
        "graphs": len(graphs),
        "lowest_parity_db": min(graph.psnr_db for graph in floored if graph.psnr_db is not None),
        "unavailable": [graph.path.name for graph in graphs if not graph.available],
        "unfit": [graph.path.name for graph in graphs if graph.fit is False],
    }


def make_lens(run: Run, console: Console, drift: float = 0.0) -> Artifact:
    """Write the Lens Studio project of the exported graphs, and lint the project.

    Changes that the user made to an earlier project of the run are kept. `drift` is that of
    `LensScene`.
    """
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    graphs = newest_export(run)

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        name = scene_file_name(scene.name)
        lens = replace(lens_scene_from(field, scene.train.poses, name), drift=drift)
        patterns = ("Sampler.onnx", "Embedder.onnx", "*_Snap*.onnx")
        models = [_only(graphs, pattern) for pattern in patterns]
        project = stage.path / name
        # An earlier project of the run is replaced only if nelf generated it.
        generated_hashes(run.path / "lens" / name, lens)
        carry_lens_projects(run.path / "lens", stage.path)
        carried = project.is_dir()
        written = write_lens_project(project, lens, *models)
        for path in written.kept_edits:
            file = path.relative_to(stage.path)
            console.say(f"lens: your edit is kept; the new version is lens/{file}")
        for path in written.restored:
            file = path.relative_to(stage.path)
            console.say(f"lens: lens/{file} was deleted and has been written again")
        lint = lint_result(project)
        if lint.faults and not carried:
            raise ExportError(
                f"the generated lens project has {len(lint.faults)} faults, the first: "
                f"{lint.faults[0]}",
                where=stage.path,
            )
        # Faults of an earlier project come from changes by the user or by the editor.
        for line in (*lint.faults[:MAX_FAULTS], *lint.notes):
            console.say(f"lens: {line}")
        if more := len(lint.faults[MAX_FAULTS:]):
            console.say(f"lens: and {more} more faults of the project")
        stage.metrics |= {
            "files": len(written.files),
            "size_bytes": sum(path.stat().st_size for path in written.files),
        }
        stage.details["project"] = name

    console.say("lens: writing the Lens Studio project")
    inputs = {"scene": source, stage_name: student, "export": graphs}
    return run.perform("lens", {"drift": drift}, inputs, work)[0]


def _only(graphs: Artifact, pattern: str) -> Path:
    """The only exported file whose name matches the pattern."""
    names = fnmatch.filter(graphs.manifest["files"], pattern)
    if len(names) != 1:
        raise ExportError(
            f"{len(names)} exported graphs match {pattern}, instead of one", where=graphs.path
        )
    return graphs.file(names[0])


def exported_fused(graphs: Artifact) -> Path:
    """The exported graph from one pose to its image, in full precision."""
    names = [
        name
        for name in fnmatch.filter(graphs.manifest["files"], "*_fused.onnx")
        if not re.search(r"_(fp16|int8)_fused", name)
    ]
    if len(names) != 1:
        raise ExportError(
            f"{len(names)} exported graphs match *_fused.onnx, instead of one", where=graphs.path
        )
    return graphs.file(names[0])
