"""The export stage: writes the newest student as ONNX and CoreML, and compares with PyTorch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from export.bundle import write_bundle
from export.calibration import Calibration
from export.exported_graph import ExportedGraph
from lightfield.errors import ExportError
from lightfield.files import write_json
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.scene import Scene, Views
from lightfield.scratch import libraries_in_scratch
from pipeline.artifacts import GRAPHS, newest_student, scene_of
from pipeline.compute import CPU
from pipeline.console import Console
from pipeline.stages.student import load_light_field

PARITY_VIEWS = 4
CALIBRATION_VIEWS = 6
EXPORT_VERSION = 3
"""Version of the exported files. A run with files of an older version exports them again."""
PORTS = ("COM", "LPT")
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in PORTS for n in range(10))}
"""Device names, which no file may have on Windows."""


def scene_file_name(name: str) -> str:
    """A scene's name as it appears in file names: `lego` becomes `Lego`."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    text = "".join(word[0].upper() + word[1:] for word in words)
    allowed = text[:1].isalpha() and text.upper() not in RESERVED
    return text if allowed else f"Scene{text}"


def make_export(run: Run, console: Console) -> Artifact:
    """Write every graph of the newest student, each compared with PyTorch on test poses."""
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
    """Evenly spread training views, with which int8 is calibrated."""
    last = len(scene.train) - 1
    chosen = np.linspace(0, last, min(CALIBRATION_VIEWS, last + 1)).round().astype(int).tolist()
    return Calibration(scene.train.poses[chosen], _images(scene.train, chosen))


def _summary(graphs: list[ExportedGraph]) -> dict[str, float | int | list[str]]:
    """The export's metrics. The lowest parity leaves int8 out, which is judged by the quality that
    it loses and has no parity floor."""
    compared = [graph for graph in graphs if graph.precision != "int8"]
    return {
        "graphs": len(graphs),
        "lowest_parity_db": min(graph.psnr_db for graph in compared if graph.psnr_db is not None),
        "unavailable": [graph.path.name for graph in graphs if not graph.available],
        "unfit": [graph.path.name for graph in graphs if graph.fit is False],
    }


def exported_graph(graphs: Artifact, pattern: str) -> Path:
    """The one exported file whose name matches a pattern of `fnmatch`.

    Raises:
        ExportError: when none or several match.
    """
    return _only(graphs, fnmatch.filter(graphs.manifest["files"], pattern), pattern)


def exported_fused(graphs: Artifact) -> Path:
    """The exported graph from one pose to its image, in full precision.

    Raises:
        ExportError: when there is none, or there are several.
    """
    pattern = "*_fused.onnx"
    names = fnmatch.filter(graphs.manifest["files"], pattern)
    return _only(graphs, [n for n in names if not re.search(r"_(fp16|int8)_fused", n)], pattern)


def _only(graphs: Artifact, names: list[str], pattern: str) -> Path:
    if len(names) != 1:
        raise ExportError(
            f"expected one exported graph named {pattern}, found {len(names)}", where=graphs.path
        )
    return graphs.file(names[0])
