"""The bench stage: measures a run's exported graphs on one or several devices.

Every finished graph is saved at once, so a lost phone or an interruption costs one graph, and the next
attempt continues there.
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
from device.choice import run_concurrently
from device.fidelity import GraphPrecision
from device.onnx_inputs import TensorSpec, input_specs
from device.target import RunnerTarget
from export.student_graph import write_student_onnx
from lightfield.errors import DeviceError
from lightfield.files import parse_json, read_text, write_text
from lightfield.light_field import LightField, ray_grid
from lightfield.names import printable
from lightfield.progress import Progress
from lightfield.run import Artifact, Run, StageWriter
from pipeline.console import Console
from pipeline.delivery import CPU, LATENCIES, exported_fused, newest_export, newest_student
from pipeline.report.bench_page import PAGE, bench_page
from pipeline.students import load_light_field
from pipeline.training import ingredient, scene_of

PRECISIONS: tuple[GraphPrecision, ...] = ("fp16", "int8")
"""Precisions that are measured besides fp32, if the export has such files."""


def make_bench(
    run: Run,
    config: BenchmarkConfig,
    targets: Sequence[RunnerTarget],
    failures: Sequence[str],
    console: Console,
    *,
    again: bool = False,
) -> Artifact:
    """Measure the dense student, the newest student, and its pose-to-image graph on each device.

    Args:
        failures: errors of devices that could not be attached; the record includes them.
        again: measure even if nothing has changed.

    Raises:
        DeviceError: when no device could be measured.
    """
    graphs, dense = newest_export(run), ingredient(run, "student")
    newest = newest_student(run)[1]
    poses = scene_of(run)[1].test.poses[: config.poses]
    identities = [asdict(target.identity) for target in targets]
    protocol = {**config.protocol(), **targets[0].config.protocol()}
    settings = {"bench": protocol, "targets": identities, "failed": list(failures)}

    def work(stage: StageWriter) -> None:
        fields = load_light_field(dense, CPU), load_light_field(newest, CPU)
        bench_graphs = graphs_to_measure(*fields, graphs, np.asarray(poses), stage.path)
        with console.progress("bench") as progress:
            benches, lost = _benchmark_all(targets, bench_graphs, config, stage, progress)
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
    """Write the JSON record and the HTML page."""
    devices = [bench.to_json() for bench in benches]
    # without indentation, because a sustained pass has tens of thousands of runs
    write_text(folder / LATENCIES, json.dumps({"devices": devices, "failed": list(failed)}) + "\n")
    write_text(folder / PAGE, bench_page(title, benches, failed))


def _benchmark_all(
    targets: Sequence[RunnerTarget],
    graphs: Sequence[BenchGraph],
    config: BenchmarkConfig,
    stage: StageWriter,
    progress: Progress,
) -> tuple[list[DeviceBench], list[str]]:
    """Benchmark all devices concurrently; return their records, and the errors of lost devices."""
    progress_of = _combined_progress(progress, len(targets))

    def benchmark_device(number: int) -> DeviceBench | DeviceError:
        target = targets[number]
        path = stage.path / f"measured-{target.identity.unit or target.identity.kind}.jsonl"
        stage.discard.add(path.name)
        try:
            return benchmark(
                target,
                graphs,
                config,
                progress_of(number),
                on_result=lambda result: _append(path, result),
                finished=_finished_results(path),
            )
        except DeviceError as error:
            return error

    outcomes = run_concurrently(
        benchmark_device, range(len(targets)), lambda number: targets[number].abort()
    )
    errors = [outcome for outcome in outcomes if isinstance(outcome, DeviceError)]
    benches = [outcome for outcome in outcomes if isinstance(outcome, DeviceBench)]
    if not benches:
        raise errors[0]
    return benches, [str(error) for error in errors]


def _combined_progress(progress: Progress, devices: int) -> Callable[[int], Progress]:
    """Split one progress bar among several devices; it shows the sum of their progress."""
    lock, done, totals = threading.Lock(), [0] * devices, [0] * devices

    def progress_of(number: int) -> Progress:
        def report(finished: int, total: int, /, **figures: float) -> None:
            with lock:
                done[number], totals[number] = finished, total
                progress(sum(done), sum(totals), **figures)

        return report

    return progress_of


def _append(path: Path, result: GraphBench) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result.to_json()) + "\n")


def _finished_results(path: Path) -> dict[tuple[str, str], GraphBench]:
    """Results of an interrupted benchmark; graphs without a latency are left out and tried again."""
    if not path.exists():
        return {}
    finished: dict[tuple[str, str], GraphBench] = {}
    for line in read_text(path, DeviceError).splitlines():
        with contextlib.suppress(ValueError, DeviceError):  # an incomplete last line
            result = GraphBench.from_json(parse_json(line))
            if not result.refused:
                finished[result.name, result.precision] = result
    return finished


def graphs_to_measure(
    dense: LightField, newest: LightField, graphs: Artifact, poses: np.ndarray, folder: Path
) -> list[BenchGraph]:
    """The graphs to measure, with real inputs; the dense student's graph is written into `folder`."""
    fused = exported_fused(graphs)
    student = graphs.file(fused.name.replace("_fused", ""))
    full_precision = [
        _bench_graph("student", student, newest, poses, sustained=True),
        _bench_graph("pose_to_image", fused, newest, poses, sustained=True),
    ]
    selected = list(full_precision)
    for graph in full_precision:
        for precision in PRECISIONS:
            for name in _file_names(graph.model.name, precision):
                if name in graphs.manifest["files"]:
                    selected.append(
                        _bench_graph(
                            graph.name,
                            graphs.file(name),
                            newest,
                            poses,
                            precision=precision,
                            full_precision_model=graph.model,
                        )
                    )
    if "student" in graphs.manifest["inputs"]:
        return selected
    rays = ray_grid(dense.intrinsics, dense.student.spec)
    path = write_student_onnx(dense.student, rays.height, rays.width, folder / "dense.onnx")
    return [_bench_graph("dense_student", path, dense, poses), *selected]


def _file_names(name: str, precision: GraphPrecision) -> list[str]:
    """Possible names of a file in another precision: `Lego_fp16.onnx`, `Lego_fp16_fused.onnx`."""
    names = [re.sub(r"\.onnx$", f"_{precision}.onnx", name)]
    return names + [name.replace("_fused", f"_{precision}_fused")] * ("_fused" in name)


def _bench_graph(
    name: str,
    model: Path,
    field: LightField,
    poses: np.ndarray,
    *,
    precision: GraphPrecision = "fp32",
    full_precision_model: Path | None = None,
    sustained: bool = False,
) -> BenchGraph:
    (spec,) = input_specs(model)
    inputs = [_real_input(spec, field, pose) for pose in poses]
    return BenchGraph(name, model, precision, full_precision_model, inputs, sustained)


def _real_input(spec: TensorSpec, field: LightField, pose: np.ndarray) -> dict[str, np.ndarray]:
    """The graph's input for a pose: the pose itself, or the encoded rays of that pose."""
    view = torch.as_tensor(pose, dtype=torch.float32)
    value = view[None] if spec.shape == (1, 3, 4) else field.encoded_rays(view)
    return {spec.name: value.numpy().astype(spec.element)}


def bench_metrics(bench: DeviceBench) -> dict[str, Any]:
    """Metrics of one device for the manifest: median latency and frames per second of each graph."""
    metrics: dict[str, Any] = {}
    for graph in bench.graphs:
        name = graph.name if graph.precision == "fp32" else f"{graph.name}_{graph.precision}"
        if graph.latency is not None:
            metrics |= {f"{name}_p50_ms": graph.latency.p50_ms, f"{name}_fps": graph.latency.fps}
        if graph.sustained_fps is not None:
            metrics[f"{name}_sustained_fps"] = graph.sustained_fps
    return metrics


def print_bench(artifact: Artifact, console: Console) -> None:
    """Print the table of every device, and the path of the page.

    Raises:
        DeviceError: when a device was lost, or a full-precision graph has no latency. All other results
            have been saved.
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
        raise DeviceError(f"{missing[0]}{more}", remedy=f"all other results are in {artifact.path}")


def bench_table(bench: DeviceBench) -> list[str]:
    """The results of one device as lines of text; an emulated device's latencies are not shown."""
    device = bench.device
    lines = [f"{device.name}{f', unit {device.unit}' if device.unit else ''}, {device.provider}"]
    if device.emulated:
        lines.append("  emulated device: latencies are meaningless and not shown")
    else:
        columns = ("p50 ms", "p90 ms", "p99 ms", "FPS", "sustained")
        lines.append(f"  {'graph':24}" + "".join(f"{c:>10}" for c in columns) + "      PSNR dB")
    return lines + [f"  {_row(graph, emulated=device.emulated)}" for graph in bench.graphs]


def _row(graph: GraphBench, *, emulated: bool) -> str:
    name = f"{graph.name} {graph.precision}"
    if graph.latency is None:
        return f"{name:24}no latency: {graph.refused}"
    psnr_db = "not compared"
    if graph.fidelity is not None:
        psnr_db = "equal" if graph.fidelity.psnr_db is None else f"{graph.fidelity.psnr_db:.1f}"
    if emulated:
        return f"{name:24}PSNR of the images against the host's, dB: {psnr_db}"
    figures = graph.latency.statistics()
    cells = [f"{figures[key]:10.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
    cells += [f"{figures['fps']:10.1f}"]
    cells += [f"{graph.sustained_fps:10.1f}" if graph.sustained_fps else f"{'-':>10}"]
    throttled = "  throttled" if graph.latency.conditions.get("throttled") else ""
    return f"{name:24}{''.join(cells)}{psnr_db:>13}{throttled}"
