"""Comparison of two students on one device: interleaved runs, the latency ratio and its interval."""

from __future__ import annotations

from pathlib import Path

from device.benchmark import BenchmarkConfig
from device.comparison import Comparison, compare
from device.fidelity import compare_images, floor_db
from device.host import HostTarget
from device.onnx_inputs import fixed_inputs
from device.target import RunnerTarget
from lightfield.errors import ConfigError, DeviceError
from lightfield.files import write_json, write_text
from lightfield.run import Run, tool_versions
from pipeline.artifacts import newest_export
from pipeline.console import Console
from pipeline.report.bench_page import comparison_page
from pipeline.stages.export import exported_fused

RECORD, PAGE = "comparison.json", "comparison.html"


def compare_students(
    pair: tuple[Path, Path],
    config: BenchmarkConfig,
    target: RunnerTarget,
    folder: Path,
    console: Console,
) -> Comparison:
    """Measure two students in interleaved runs, and write the record and its page.

    Args:
        pair: two runs with exported students, or two ONNX files, or one of each.
        config: settings of the measurement.
        target: the device.
        folder: gets the record and the page.
        console: shows the result.

    Raises:
        DeviceError: when a graph cannot be measured, or its image differs from the host's.
    """
    first, second = (student_graph(path) for path in pair)
    for model in (first, second):
        _require_images(model, target)
    found = compare(target, first, second, rounds=config.runs, warmup=config.warmup)
    signs = found.candidate.conditions.get("throttling") or []
    if config.refuse_throttled and signs:
        raise DeviceError(f"the device throttled: {'; '.join(signs)}", where=target.identity.name)
    names = (str(pair[0]), str(pair[1]))
    protocol = {**config.protocol(), **target.config.protocol()}
    record = {"protocol": protocol, "versions": tool_versions(), **found.to_json()}
    write_json(folder / RECORD, record)
    write_text(folder / PAGE, comparison_page(distinct_names(pair), found))
    _say(found, names, folder, console)
    return found


def distinct_names(pair: tuple[Path, Path]) -> tuple[str, str]:
    """Short names of two paths: as many of the last folders as are needed to tell them apart."""
    first, second = (path.resolve().parts for path in pair)
    for length in range(1, max(len(first), len(second)) + 1):
        names = "/".join(first[-length:]), "/".join(second[-length:])
        if names[0] != names[1]:
            return names
    return f"{pair[0].name} (1)", f"{pair[1].name} (2)"  # both paths are the same


def _say(found: Comparison, names: tuple[str, str], folder: Path, console: Console) -> None:
    between = found.interval
    if found.candidate.device.emulated:
        console.say(f"{found.candidate.device.name} is emulated: its latencies are meaningless")
    else:
        for name, record in zip(names, (found.candidate, found.reference), strict=True):
            console.say(f"{record.p50_ms:10.3f} ms  {record.fps:8.1f} FPS  {name}")
        console.say(
            f"ratio {between.ratio:.4f}, {between.confidence:.0%} interval {between.low:.4f} to "
            f"{between.high:.4f} over {between.rounds} rounds: {names[0]} is {between.verdict}"
        )
        for sign in found.candidate.conditions.get("throttling") or []:
            console.say(f"throttled: {sign}")
    console.say(f"comparison: {folder / PAGE}")


def student_graph(path: Path) -> Path:
    """The graph of a run's student, or the given ONNX file.

    Raises:
        ConfigError: when the path is neither a run nor an ONNX file.
    """
    if path.is_file() and path.suffix == ".onnx":
        return path
    if not path.is_dir():
        raise ConfigError("is neither a run nor an ONNX file", where=path)
    graphs = newest_export(Run(path))
    return graphs.file(exported_fused(graphs).name.replace("_fused", ""))


def _require_images(model: Path, target: RunnerTarget) -> None:
    inputs = [fixed_inputs(model)]
    near = compare_images(
        target.run_many(model, inputs),
        HostTarget().run_many(model, inputs),
        floor_db("fp32", target.config.provider),
    )
    if not near.holds:
        raise DeviceError(
            f"its image on the device has a PSNR of {near.psnr_db:.1f} dB relative to the host's, "
            f"below {near.floor_db:.0f} dB",
            where=model,
            remedy="latencies of a wrong image are not reported; try the provider cpu",
        )
