"""The stages that hand a student over: exported graphs, a lens project, measurements."""

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
    lens_findings,
    lens_scene_from,
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
EXPORT_FORMS = 2
"""Counts up when the export writes other files, so that an older run's are written again."""
GRAPHS, LATENCIES = "graphs.json", "latencies.json"
CPU = torch.device("cpu")
MOST_FAULTS = 20
"""Of a lens project; how many are told."""
PORTS = ("COM", "LPT")
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in PORTS for n in range(10))}
"""Names of devices, which no file may have on Windows."""


def newest_student(run: Run) -> tuple[str, Artifact]:
    """The pruned student when there is one, else the dense one, with the stage's name.

    Raises:
        CheckpointError: when neither has been made, or that one is older than what it was made from.
    """
    stage = "student" if run.find("prune") is None else "prune"
    return stage, ingredient(run, stage)


def newest_export(run: Run) -> Artifact:
    """The exported graphs of the newest student.

    Raises:
        CheckpointError: when there are none, or they are older than the student.
    """
    graphs, newest = ingredient(run, "export"), newest_student(run)[0]
    if graphs.manifest["inputs"].keys() != {"scene", newest}:
        raise CheckpointError(
            f"these graphs are not those of the run's newest student, that of `nelf {newest}`",
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
    """Write every graph of the newest student, each compared with PyTorch on test poses."""
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    settings = {"student": stage_name, "parity_views": PARITY_VIEWS, "forms": EXPORT_FORMS}

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
    """Training views, evenly spread."""
    last = len(scene.train) - 1
    chosen = np.linspace(0, last, min(CALIBRATION_VIEWS, last + 1)).round().astype(int).tolist()
    return Calibration(scene.train.poses[chosen], _images(scene.train, chosen))


def _summary(graphs: list[ExportedGraph]) -> dict[str, float | int | list[str]]:
    """int8 is left out of the lowest parity: it is judged by what it loses, not by a floor."""
    held = [graph for graph in graphs if graph.precision != "int8"]
    return {
        "graphs": len(graphs),
        "lowest_parity_db": min(graph.psnr_db for graph in held if graph.psnr_db is not None),
        "unavailable": [graph.path.name for graph in graphs if not graph.available],
        "unfit": [graph.path.name for graph in graphs if graph.fit is False],
    }


def make_lens(run: Run, console: Console, drift: float = 0.0) -> Artifact:
    """Write the Lens Studio project of the exported graphs, and lint it.

    What a user did in an earlier project of the run stays. `drift` is that of `LensScene`.
    """
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    graphs = newest_export(run)

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        name = scene_file_name(scene.name)
        lens = replace(lens_scene_from(field, scene.train.poses, name), drift=drift)
        models = [_only(graphs, form) for form in ("Sampler.onnx", "Embedder.onnx", "*_Snap*.onnx")]
        project = stage.path / name
        generated_hashes(run.path / "lens" / name, lens)  # refuses what is not ours where it lies
        carry_lens_projects(run.path / "lens", stage.path)
        carried = project.is_dir()
        written = write_lens_project(project, lens, *models)
        for path in written.kept_edits:
            place = path.relative_to(stage.path)
            console.say(f"lens: your edit is kept; the new version is lens/{place}")
        for path in written.restored:
            place = path.relative_to(stage.path)
            console.say(f"lens: lens/{place} was deleted and is there again")
        findings = lens_findings(project)
        if findings.faults and not carried:
            raise ExportError(
                f"the generated lens project has {len(findings.faults)} faults, the first: "
                f"{findings.faults[0]}",
                where=stage.path,
            )
        # the user's or the editor's making
        for finding in (*findings.faults[:MOST_FAULTS], *findings.notes):
            console.say(f"lens: {finding}")
        if more := len(findings.faults[MOST_FAULTS:]):
            console.say(f"lens: and {more} more faults of the project")
        stage.metrics |= {
            "files": len(written.files),
            "size_bytes": sum(path.stat().st_size for path in written.files),
        }
        stage.details["project"] = name

    console.say("lens: writing the Lens Studio project")
    inputs = {"scene": source, stage_name: student, "export": graphs}
    return run.perform("lens", {"drift": drift}, inputs, work)[0]


def _only(graphs: Artifact, form: str) -> Path:
    """The one exported file whose name has this form."""
    names = fnmatch.filter(graphs.manifest["files"], form)
    if len(names) != 1:
        raise ExportError(f"{len(names)} exported graphs are called {form}", where=graphs.path)
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
            f"{len(names)} exported graphs are called *_fused.onnx", where=graphs.path
        )
    return graphs.file(names[0])
