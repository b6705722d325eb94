"""The stage that measures: graphs of the run, real poses to check their images on, one device or many.

A device's record is kept graph by graph while it is made, so a lost phone or an interruption costs one
graph; the next attempt goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.bench_record import DeviceBench, GraphBench, read_benches
from device.benchmark import BenchGraph, BenchmarkConfig, benchmark
from device.choice import together
from device.fidelity import Precision
from device.onnx_inputs import TensorSpec, input_specs
from device.target import RunnerTarget
from export.student_graph import write_student_onnx
from lightfield.errors import DeviceError
from lightfield.files import parse_json, read_text, write_text
from lightfield.light_field import LightField, ray_grid
from lightfield.names import printable
from lightfield.progress import Progress
from lightfield.run import Artifact, Run, StageWriter
from pipeline.artifacts import (
    LATENCIES,
    newest_export,
    newest_student,
    require_artifact,
    scene_of,
)
from pipeline.compute import CPU
from pipeline.console import Console
from pipeline.report.bench_page import PAGE, bench_page
from pipeline.stages.export import exported_fused
from pipeline.stages.student import load_light_field

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")
"""Besides fp32; measured where the export holds such files."""


def make_bench(
    run: Run,
    config: BenchmarkConfig,
    targets: Sequence[RunnerTarget],
    failures: Sequence[str],
    console: Console,
    *,
    again: bool = False,
) -> Artifact:
    """Measure the dense student, the newest one, and the whole way from pose to image, on each device.

    Args:
        failures: why other devices could not be attached; they become part of the record.
        again: measure although nothing has changed.

    Raises:
        DeviceError: when no device could be measured.
    """
    graphs, dense = newest_export(run), require_artifact(run, "student")
    newest = newest_student(run)[1]
    poses = scene_of(run)[1].test.poses[: config.poses]
    identities = [asdict(target.identity) for target in targets]
    settings = {"bench": config.protocol(), "targets": identities, "failed": list(failures)}

    def work(stage: StageWriter) -> None:
        fields = load_light_field(dense, CPU), load_light_field(newest, CPU)
        measured = measured_graphs(*fields, graphs, np.asarray(poses), stage.path)
        with console.progress("bench") as progress:
            benches, lost = _on_every_target(targets, measured, config, stage, progress)
        write_records(
            stage.path, benches, [*failures, *lost], title=printable(run.path.resolve().name)
        )
        stage.metrics |= bench_metrics(benches[0])
        stage.details |= {
            "device": asdict(benches[0].device),
            "devices": [asdict(bench.device) for bench in benches],
        }

    inputs = {"export": graphs, "student": dense}
    return run.perform("bench", settings, inputs, work, force=again)[0]


def write_records(
    folder: Path, benches: Sequence[DeviceBench], failed: Sequence[str], *, title: str
) -> None:
    """The JSON record and its page."""
    devices = [bench.to_json() for bench in benches]
    # in one line: a sustained pass has tens of thousands of runs
    write_text(folder / LATENCIES, json.dumps({"devices": devices, "failed": list(failed)}) + "\n")
    write_text(folder / PAGE, bench_page(title, benches, failed))


def _on_every_target(
    targets: Sequence[RunnerTarget],
    graphs: Sequence[BenchGraph],
    config: BenchmarkConfig,
    stage: StageWriter,
    progress: Progress,
) -> tuple[list[DeviceBench], list[str]]:
    """The records of all devices, measured side by side, and what became of those that were lost."""
    show = _summed(progress, len(targets))

    def measure(number: int) -> DeviceBench | DeviceError:
        target = targets[number]
        path = stage.path / f"measured-{target.identity.unit or target.identity.kind}.jsonl"
        stage.discard.add(path.name)
        try:
            return benchmark(
                target, graphs, config, show(number),
                keep=lambda graph: _append(path, graph), kept=_kept(path),
            )  # fmt: skip
        except DeviceError as error:
            return error

    found = together(measure, range(len(targets)), lambda number: targets[number].abort())
    errors = [each for each in found if isinstance(each, DeviceError)]
    benches = [each for each in found if isinstance(each, DeviceBench)]
    if not benches:
        raise errors[0]
    return benches, [str(error) for error in errors]


def _summed(progress: Progress, devices: int) -> Callable[[int], Progress]:
    """One bar for work that goes on on several devices."""
    lock, done, totals = threading.Lock(), [0] * devices, [0] * devices

    def show(number: int) -> Progress:
        def report(finished: int, total: int, /, **figures: float) -> None:
            with lock:
                done[number], totals[number] = finished, total
                progress(sum(done), sum(totals), **figures)

        return report

    return show


def _append(path: Path, graph: GraphBench) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(graph.to_json()) + "\n")


def _kept(path: Path) -> dict[tuple[str, str], GraphBench]:
    """What an interrupted measurement has left; a refusal is tried again."""
    if not path.exists():
        return {}
    kept: dict[tuple[str, str], GraphBench] = {}
    for line in read_text(path, DeviceError).splitlines():
        with contextlib.suppress(ValueError, DeviceError):  # a line that was cut
            graph = GraphBench.from_json(parse_json(line))
            if not graph.refused:
                kept[graph.name, graph.precision] = graph
    return kept


def measured_graphs(
    dense: LightField, newest: LightField, graphs: Artifact, poses: np.ndarray, folder: Path
) -> list[BenchGraph]:
    """The graphs to measure, with real inputs; a dense student is written into `folder`."""
    fused = exported_fused(graphs)
    student = graphs.file(fused.name.replace("_fused", ""))
    found = [
        _graph("student", student, newest, poses, sustained=True),
        _graph("pose_to_image", fused, newest, poses, sustained=True),
    ]
    names = graphs.manifest["files"]
    for whole in list(found):
        for precision in PRECISIONS:
            for name in _names_in(precision, whole.model.name):
                if name in names:
                    found.append(
                        _graph(whole.name, graphs.file(name), newest, poses,
                               precision=precision, reference=whole.model)
                    )  # fmt: skip
    if "student" in graphs.manifest["inputs"]:
        return found
    rays = ray_grid(dense.intrinsics, dense.student.spec)
    path = write_student_onnx(dense.student, rays.height, rays.width, folder / "dense.onnx")
    return [_graph("dense_student", path, dense, poses), *found]


def _names_in(precision: Precision, name: str) -> list[str]:
    """What a file may be called in another precision: `Lego_fp16.onnx`, `Lego_fp16_fused.onnx`."""
    names = [re.sub(r"\.onnx$", f"_{precision}.onnx", name)]
    return names + [name.replace("_fused", f"_{precision}_fused")] * ("_fused" in name)


def _graph(
    name: str,
    model: Path,
    field: LightField,
    poses: np.ndarray,
    *,
    precision: Precision = "fp32",
    reference: Path | None = None,
    sustained: bool = False,
) -> BenchGraph:
    (spec,) = input_specs(model)
    inputs = [_real_input(spec, field, pose) for pose in poses]
    return BenchGraph(name, model, precision, reference, inputs, sustained)


def _real_input(spec: TensorSpec, field: LightField, pose: np.ndarray) -> dict[str, np.ndarray]:
    """What the graph takes for a pose: itself, or its encoded rays."""
    view = torch.as_tensor(pose, dtype=torch.float32)
    value = view[None] if spec.shape == (1, 3, 4) else field.encoded_rays(view)
    return {spec.name: value.numpy().astype(spec.element)}


def bench_metrics(bench: DeviceBench) -> dict[str, Any]:
    """Figures for a manifest, of the first device: medians and frames per second by graph."""
    metrics: dict[str, Any] = {}
    for graph in bench.graphs:
        name = graph.name if graph.precision == "fp32" else f"{graph.name}_{graph.precision}"
        if graph.latency is not None:
            metrics |= {f"{name}_p50_ms": graph.latency.p50_ms, f"{name}_fps": graph.latency.fps}
        if graph.sustained_fps is not None:
            metrics[f"{name}_sustained_fps"] = graph.sustained_fps
    return metrics


def print_bench(artifact: Artifact, console: Console) -> None:
    """The table of every device, then the page's address.

    Raises:
        DeviceError: when a device was lost or a graph in full precision has no speed; what else was
            measured has been kept.
    """
    benches, failed = read_benches(artifact.file(LATENCIES))
    for bench in benches:
        for line in bench_table(bench):
            console.say(line)
    console.say(f"bench: {artifact.path / PAGE}")
    refused = [
        f"{bench.device.name}: {graph.model}: {graph.refused}"
        for bench in benches
        for graph in bench.graphs
        if graph.refused and graph.precision == "fp32"
    ]
    if missing := [*failed, *refused]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DeviceError(
            f"{missing[0]}{more}", remedy=f"what else was measured is in {artifact.path}"
        )


def bench_table(bench: DeviceBench) -> list[str]:
    """Lines for a terminal; of an emulated device, no time."""
    device = bench.device
    lines = [f"{device.name}{f', unit {device.unit}' if device.unit else ''}, {device.provider}"]
    if device.emulated:
        lines.append("  an emulated device: its times mean nothing and are not shown")
    else:
        columns = ("p50 ms", "p90 ms", "p99 ms", "FPS", "sustained")
        lines.append(f"  {'graph':24}" + "".join(f"{c:>10}" for c in columns) + "      PSNR dB")
    return lines + [f"  {_row(graph, emulated=device.emulated)}" for graph in bench.graphs]


def _row(graph: GraphBench, *, emulated: bool) -> str:
    name = f"{graph.name} {graph.precision}"
    if graph.latency is None:
        return f"{name:24}no speed: {graph.refused}"
    near = "not compared"
    if graph.fidelity is not None:
        near = "equal" if graph.fidelity.psnr_db is None else f"{graph.fidelity.psnr_db:.1f}"
    if emulated:
        return f"{name:24}images against the host's, PSNR dB: {near}"
    figures = graph.latency.statistics()
    cells = [f"{figures[key]:10.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
    cells += [f"{figures['fps']:10.1f}"]
    cells += [f"{graph.sustained_fps:10.1f}" if graph.sustained_fps else f"{'-':>10}"]
    throttled = "  throttled" if graph.latency.conditions.get("throttled") else ""
    return f"{name:24}{''.join(cells)}{near:>13}{throttled}"
