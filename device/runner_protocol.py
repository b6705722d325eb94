"""Protocol of the runners: command-line arguments as input, one line of JSON as output.

A runner is a program that only runs graphs: `device/runner/nelf_runner.c` on a phone,
`device/host_runner.py` on this machine. Both take these arguments:

    --threads N --warmup N --runs N --limit SECONDS
    [--seconds N] [--provider NAME (--option KEY=VALUE)...] [--profile PREFIX] (--watch FILE)...
    --model PATH --inputs FOLDER [--outputs FOLDER]         once per graph, in this order

A runner loads every graph and runs each graph `--warmup` times. Then it runs all graphs round-robin (A B
C A B C ...), at least `--runs` times each and for at least `--seconds`, so that whatever slows the
device down slows all graphs. Input i of a graph is the raw row-major file `FOLDER/i.bin`; output i of
the last run is written to a file in the same format. Without a graph, a runner only loads ONNX Runtime
(the hello check). Every half second, between runs, the runner reads the first number of each watched
file; these are frequencies and temperatures in /sys. With `--profile`, which allows one graph only, ONNX
Runtime writes a trace to a file with that prefix. The last line of the output is the report:

    {"runtime": "1.31.1", "providers": ["CPUExecutionProvider"], "growth_kb": 9000,
     "profile": "PREFIX_2025.json", "watched": [at_us, value, value, at_us, ...],
     "models": [{"load_us": ..., "at_us": [...], "wall_us": [...], "cpu_us": [...],
     "outputs": [{"name": ..., "element": "float32", "shape": [...]}]}]}

or, with exit code 3, {"error": "...", "at": "..."}. `at_us` is the start of a run, relative to the first
run. `cpu_us` is the CPU time of the runner (all threads) during a run; other programs do not change it.
The value of a watched file that cannot be read is -1. After `--limit` seconds, SIGALRM ends the runner,
so that no runner hangs. The runner also ends when its caller is killed: by adbd's SIGHUP on a phone, by
the end of its standard input on this machine (`--tied`).
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from device.onnx_inputs import ELEMENT_TYPES, TensorSpec
from lightfield.errors import DeviceError

FAILURE_EXIT_CODE = 3

Provider = Literal["cpu", "xnnpack", "nnapi", "qnn"]
PROVIDER_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
"""Names of the execution providers in ONNX Runtime."""


@dataclass(frozen=True)
class Job:
    """A graph to run, with paths on this machine."""

    model: Path
    inputs: Path
    outputs: Path | None = None


@dataclass(frozen=True)
class Schedule:
    """How a runner runs its graphs: number of runs, threads, execution provider, time limit."""

    threads: int
    warmup: int
    runs: int
    limit_seconds: int
    seconds: int = 0
    """Minimum duration of the measured runs; more than `runs` runs are made if needed."""
    provider: Provider = "cpu"
    options: tuple[tuple[str, str], ...] = ()
    """Options of the execution provider."""
    watch: tuple[str, ...] = ()
    """Files on the device whose first number is read between runs."""
    profile: Path | None = None
    """Path on this machine for ONNX Runtime's trace of the graph; None for no trace."""


@dataclass(frozen=True)
class ModelTimes:
    """Times of one graph from a runner's report; one value per run."""

    load_ms: float
    at_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class RunnerReport:
    """Report of a runner."""

    runtime: str
    """Version of ONNX Runtime."""
    growth_bytes: int | None
    """Growth of the resident memory: its peak minus its size before the graphs were loaded."""
    models: tuple[ModelTimes, ...]
    providers: tuple[str, ...] = ()
    """Execution providers that the library was built with."""
    profile: str | None = None
    """Path of the trace on the device."""
    watched: tuple[tuple[float, ...], ...] = ()
    """Rows of milliseconds since the first run, followed by one value per watched file."""


def runner_arguments(
    jobs: Sequence[tuple[str, str, str | None]],
    schedule: Schedule,
    *,
    profile_prefix: str | None = None,
) -> list[str]:
    """The runner's command-line arguments. All paths are paths on the device.

    Args:
        jobs: (model, inputs, outputs) of each graph.
        schedule: see `Schedule`.
        profile_prefix: prefix of the trace's path.
    """
    arguments = ["--threads", str(schedule.threads), "--warmup", str(schedule.warmup)]
    arguments += ["--runs", str(schedule.runs), "--limit", str(schedule.limit_seconds)]
    if schedule.seconds:
        arguments += ["--seconds", str(schedule.seconds)]
    if schedule.provider != "cpu":
        arguments += ["--provider", schedule.provider]
        for key, value in schedule.options:
            arguments += ["--option", f"{key}={value}"]
    if profile_prefix is not None:
        arguments += ["--profile", profile_prefix]
    for path in schedule.watch:
        arguments += ["--watch", path]
    for model, inputs, outputs in jobs:
        arguments += ["--model", model, "--inputs", inputs]
        arguments += ["--outputs", outputs] if outputs is not None else []
    return arguments


def write_inputs(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write input i to `folder/i.bin`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(arrays):
        (folder / f"{index}.bin").write_bytes(array.tobytes())


def read_outputs(folder: Path, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Read the outputs that a runner wrote, by output name.

    Raises:
        DeviceError: when a file is missing, or its size does not fit the output's shape.
    """
    arrays: dict[str, np.ndarray] = {}
    for index, spec in enumerate(specs):
        path = folder / f"{index}.bin"
        raw = path.read_bytes() if path.exists() else b""
        if len(raw) != spec.size_bytes:
            raise DeviceError(
                f"output '{spec.name}' has {len(raw)} bytes instead of {spec.size_bytes}"
            )
        arrays[spec.name] = np.frombuffer(raw, spec.element).reshape(spec.shape).copy()
    return arrays


def parse_report(
    exit_code: int, stdout: str, stderr: str, *, where: str, schedule: Schedule, models: int
) -> RunnerReport:
    """Parse a runner's report, and check it against the schedule.

    Raises:
        DeviceError: when the runner failed or was killed, or the report does not fit the schedule.
    """
    data = _last_json_line(stdout)
    if exit_code == FAILURE_EXIT_CODE and "error" in data:
        what = f"ONNX Runtime failed to {data.get('at', 'run')} ({_one_line(str(data['error']))})"
        raise DeviceError(what, where=where)
    if exit_code != 0:
        raise DeviceError(f"the runner {_ending(exit_code)}{_last_words(stderr)}", where=where)
    try:
        growth_kb = int(data["growth_kb"])
        report = RunnerReport(
            runtime=str(data["runtime"]),
            growth_bytes=growth_kb * 1024 if growth_kb > 0 else None,
            models=tuple(_model_times(entry) for entry in data["models"]),
            providers=tuple(str(name) for name in data["providers"]),
            profile=str(data["profile"]) if schedule.profile else None,
            watched=_rows(data["watched"], 1 + len(schedule.watch)),
        )
    except (KeyError, TypeError, ValueError) as reason:
        raise DeviceError(
            f"the runner's report is invalid ({_one_line(stdout)[:200]!r})", where=where
        ) from reason
    counts = {
        len(series) for m in report.models for series in (m.at_ms, m.wall_ms, m.cpu_ms)
    }  # fmt: skip
    minimum, exact = schedule.runs, not schedule.seconds
    wrong = len(counts) > 1 or any(n < minimum or (exact and n > minimum) for n in counts)
    if wrong or len(report.models) != models:
        raise DeviceError(
            f"the runner reported {sorted(counts)} samples of {len(report.models)} graphs "
            f"instead of {minimum} samples of {models} graphs",
            where=where,
        )
    return report


def _rows(values: list[Any], width: int) -> tuple[tuple[float, ...], ...]:
    if len(values) % width or (width == 1 and values):
        raise ValueError("the number of watched values does not fit the number of watched files")
    numbers = [float(value) for value in values]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a watched value is not finite")
    starts = range(0, len(numbers), width)
    return tuple((numbers[i] / 1e3, *numbers[i + 1 : i + width]) for i in starts)


def _model_times(entry: dict[str, Any]) -> ModelTimes:
    outputs = [
        TensorSpec(str(o["name"]), str(o["element"]), tuple(int(n) for n in o["shape"]))
        for o in entry["outputs"]
    ]
    if any(output.element not in ELEMENT_TYPES.values() for output in outputs):
        raise ValueError("unknown element type")
    at_ms, wall_ms, cpu_ms = (
        tuple(round(float(us) / 1e3, 6) for us in entry[key])
        for key in ("at_us", "wall_us", "cpu_us")
    )
    if not all(math.isfinite(ms) and ms >= 0 for ms in at_ms + wall_ms + cpu_ms):
        raise ValueError("a time is negative or not finite")
    return ModelTimes(float(entry["load_us"]) / 1e3, at_ms, wall_ms, cpu_ms, tuple(outputs))


def _last_json_line(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict):
                return data
    return {}


def _ending(exit_code: int) -> str:
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number == signal.SIGALRM:
        return "did not finish within its time limit"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {exit_code}"


def _last_words(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f" ({_one_line(lines[-1])[:200]})" if lines else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
