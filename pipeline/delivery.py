"""The stages that hand a student over: exported graphs, a lens project, measurements."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import asdict
from pathlib import Path

import torch

from device.benchmark import BenchmarkConfig, benchmark
from device.target import Target
from export.bundle import write_bundle
from export.exported_graph import ExportedGraph
from export.lens_studio import lens_scene_from, lint_lens_project, write_lens_project
from export.student_graph import write_student_onnx
from lightfield.errors import CheckpointError, ExportError
from lightfield.files import write_json
from lightfield.light_field import LightField, ray_grid
from lightfield.run import Artifact, Run, StageWriter
from pipeline.console import Console
from pipeline.students import load_light_field
from pipeline.training import ingredient, scene_of

PARITY_VIEWS = 4
GRAPHS, LATENCIES = "graphs.json", "latencies.json"
CPU = torch.device("cpu")


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
    return text if text and text[0].isalpha() else f"Scene{text}"


def make_export(run: Run, console: Console) -> Artifact:
    """Write every graph of the newest student, each compared with PyTorch on test poses."""
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    settings = {"student": stage_name, "parity_views": PARITY_VIEWS}

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        with console.progress("export") as progress:
            graphs = write_bundle(
                field,
                scene.test.poses[:PARITY_VIEWS],
                scene_file_name(scene.name),
                stage.path,
                progress=progress,
            )
        write_json(stage.path / GRAPHS, [graph.to_json() for graph in graphs])
        stage.metrics |= _summary(graphs)
        stage.details["student"] = stage_name

    return run.perform("export", settings, {"scene": source, stage_name: student}, work)[0]


def _summary(graphs: list[ExportedGraph]) -> dict[str, float | int | list[str]]:
    fidelity = [graph.psnr_db for graph in graphs if graph.psnr_db is not None]
    return {
        "graphs": len(graphs),
        "lowest_parity_db": min(fidelity),
        "unavailable": [graph.path.name for graph in graphs if not graph.available],
    }


def make_lens(run: Run, console: Console) -> Artifact:
    """Write the Lens Studio project of the exported graphs, and lint it."""
    source, scene = scene_of(run)
    stage_name, student = newest_student(run)
    graphs = newest_export(run)

    def work(stage: StageWriter) -> None:
        field = load_light_field(student, CPU)
        name = scene_file_name(scene.name)
        lens = lens_scene_from(field, scene.train.poses, name)
        models = [_only(graphs, form) for form in ("Sampler.onnx", "Embedder.onnx", "*_Snap*.onnx")]
        files = write_lens_project(stage.path / name, lens, *models)
        if faults := lint_lens_project(stage.path / name):
            raise ExportError(
                f"the generated lens project has {len(faults)} faults, the first: {faults[0]}",
                where=stage.path,
            )
        stage.metrics |= {
            "files": len(files),
            "size_bytes": sum(path.stat().st_size for path in files),
        }
        stage.details["project"] = name

    console.say("lens: writing the Lens Studio project")
    inputs = {"scene": source, stage_name: student, "export": graphs}
    return run.perform("lens", {}, inputs, work)[0]


def _only(graphs: Artifact, form: str) -> Path:
    """The one exported file whose name has this form."""
    names = fnmatch.filter(graphs.manifest["files"], form)
    if len(names) != 1:
        raise ExportError(f"{len(names)} exported graphs are called {form}", where=graphs.path)
    return graphs.file(names[0])


def make_bench(run: Run, config: BenchmarkConfig, target: Target, console: Console) -> Artifact:
    """Measure the dense student, the newest one, and the whole way from pose to picture."""
    graphs, dense = newest_export(run), ingredient(run, "student")
    settings = {"bench": _measurement_settings(config), "target": asdict(target.identity)}

    def work(stage: StageWriter) -> None:
        field = load_light_field(dense, CPU)
        graph_files = _measured_graphs(field, graphs, stage.path)
        with console.progress("bench") as progress:
            records = benchmark(target, graph_files, config, progress)
        write_json(stage.path / LATENCIES, {name: r.to_json() for name, r in records.items()})
        stage.metrics |= {f"{name}_p50_ms": record.p50_ms for name, record in records.items()}
        stage.details["device"] = asdict(target.identity)

    inputs = {"export": graphs, "student": dense}
    return run.perform("bench", settings, inputs, work)[0]


def _measurement_settings(config: BenchmarkConfig) -> dict[str, int]:
    return {"runs": config.runs, "warmup": config.warmup, "threads": config.threads}


def _measured_graphs(field: LightField, graphs: Artifact, folder: Path) -> dict[str, Path]:
    """Named graphs to measure; the dense student is written here, beside the results."""
    rays = ray_grid(field.intrinsics, field.student.spec)
    fused = _only(graphs, "*_fused.onnx")
    newest = graphs.file(fused.name.replace("_fused", ""))
    files = {"student": newest, "pose_to_picture": fused}
    if "student" in graphs.manifest["inputs"]:
        return files
    dense = write_student_onnx(field.student, rays.height, rays.width, folder / "dense.onnx")
    return {"dense_student": dense, **files}
