"""The lens stage: writes the Lens Studio project of the exported graphs and lints it."""

from __future__ import annotations

from dataclasses import replace

from export.lens_studio import (
    carry_lens_projects,
    generated_hashes,
    lens_scene_from,
    lint_result,
    write_lens_project,
)
from lightfield.errors import ExportError
from lightfield.run import Artifact, Run, StageWriter
from pipeline.artifacts import newest_export, newest_student, scene_of
from pipeline.compute import CPU
from pipeline.console import Console
from pipeline.stages.export import exported_graph, scene_file_name
from pipeline.stages.student import load_light_field

MAX_PRINTED_FAULTS = 20
"""Faults of a lens project that are printed; the others are only counted."""
MODELS = ("Sampler.onnx", "Embedder.onnx", "*_Snap*.onnx")
"""Exported graphs that a project holds, by pattern."""


def make_lens(run: Run, console: Console, drift: float = 0.0) -> Artifact:
    """Write the Lens Studio project of the exported graphs, and lint it.

    The user's changes to an earlier project of the run are kept. `drift` is that of `LensScene`.
    """
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    graphs = newest_export(run)

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        name = scene_file_name(scene.name)
        lens = replace(lens_scene_from(field, scene.train.poses, name), drift=drift)
        models = [exported_graph(graphs, pattern) for pattern in MODELS]
        project = stage.path / name
        # raises before anything is copied, with the path of the project in the run
        generated_hashes(run.path / "lens" / name, lens)
        carry_lens_projects(run.path / "lens", stage.path)
        is_update = project.is_dir()
        written = write_lens_project(project, lens, *models)
        for path in written.kept_edits:
            relative = path.relative_to(stage.path)
            console.say(f"lens: your edit is kept; the new version is lens/{relative}")
        for path in written.restored:
            relative = path.relative_to(stage.path)
            console.say(f"lens: lens/{relative} had been deleted and was written again")
        lint = lint_result(project)
        if lint.faults and not is_update:
            raise ExportError(
                f"the generated lens project has {len(lint.faults)} faults, the first: "
                f"{lint.faults[0]}",
                where=stage.path,
            )
        # faults of an updated project come from edits by the user or by Lens Studio
        for line in (*lint.faults[:MAX_PRINTED_FAULTS], *lint.notes):
            console.say(f"lens: {line}")
        if more := len(lint.faults[MAX_PRINTED_FAULTS:]):
            console.say(f"lens: the project has {more} more faults")
        stage.metrics |= {
            "files": len(written.files),
            "size_bytes": sum(path.stat().st_size for path in written.files),
        }
        stage.details["project"] = name

    console.say("lens: writing the Lens Studio project")
    inputs = {"scene": source, stage_name: student, "export": graphs}
    return run.perform("lens", {"drift": drift}, inputs, work)[0]
