"""The one language of all runners: command-line arguments in, one line of JSON out.

A runner is a program that does nothing but run graphs: `device/runner/nelf_runner.c` on a phone,
`device/host_runner.py` on this machine. Both take

    --threads N --warmup N --turns N --limit SECONDS
    [--seconds N] [--provider NAME (--option KEY=VALUE)...] [--profile PREFIX] (--watch FILE)...
    --model PATH --inputs FOLDER [--outputs FOLDER]         once per graph, in this order

load every graph, run each `warmup` times, then run all of them round-robin, `turns` times each (A B C
A B C ...) and on until N seconds have passed, so that whatever slows the device down slows all of them.
Input i of a graph is the raw row-major file `FOLDER/i.bin`; output i of the last turn is written
likewise. Without a graph a runner only loads ONNX Runtime: the hello check. Between turns, every half
second, the first number of each watched file is read: frequencies and temperatures of /sys. With a
profile prefix, of one graph alone, ONNX Runtime writes its trace to a file of that prefix. The last
line of the output is the report,

    {"runtime": "1.31.1", "providers": ["CPUExecutionProvider"], "growth_kb": 9000,
     "profile": "PREFIX_2025.json", "watched": [at_us, value, value, at_us, ...],
     "models": [{"load_us": ..., "at_us": [...], "wall_us": [...], "cpu_us": [...],
     "outputs": [{"name": ..., "element": "float32", "shape": [...]}]}]}

or, with exit code 3, {"error": "...", "at": "..."}. `at_us` is when a turn began, from the first one;
`cpu_us` is the processor time of the whole runner during it, all threads together: what the turn cost,
whoever else used the processor. A watched file that cannot be read is -1. After SECONDS the runner ends
itself (SIGALRM), so that a hang leaves nothing behind; and it ends when its caller is killed, by adbd's
SIGHUP on a phone, by the end of its standard input on this machine (`--tied`).
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
"""What ONNX Runtime calls them."""


@dataclass(frozen=True)
class Job:
    """One graph for a runner, with paths on this machine."""

    model: Path
    inputs: Path
    outputs: Path | None = None


@dataclass(frozen=True)
class Schedule:
    """How often a runner runs its graphs, and on how many threads."""

    threads: int
    warmup: int
    turns: int
    limit_seconds: int
    seconds: int = 0
    """Go on until so much time has passed, however many turns that takes."""
    provider: Provider = "cpu"
    options: tuple[tuple[str, str], ...] = ()
    """Of the provider."""
    watch: tuple[str, ...] = ()
    """Files on the device whose first number is read between turns."""
    profile: Path | None = None
    """Where, on this machine, ONNX Runtime's trace of the one graph comes to lie."""


@dataclass(frozen=True)
class ModelTimes:
    """What a runner says about one graph; one time per turn."""

    load_ms: float
    at_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class RunnerReport:
    """What a runner says."""

    runtime: str
    """Version of ONNX Runtime."""
    growth_bytes: int | None
    """Peak resident memory above what the runner held before it loaded the graphs."""
    models: tuple[ModelTimes, ...]
    providers: tuple[str, ...] = ()
    """Those that its library was built with."""
    profile: str | None = None
    """File of the trace, as the runner sees it."""
    watched: tuple[tuple[float, ...], ...] = ()
    """Rows of milliseconds since the first turn, and one value per watched file."""


def runner_arguments(
    jobs: Sequence[tuple[str, str, str | None]],
    schedule: Schedule,
    *,
    profile_prefix: str | None = None,
) -> list[str]:
    """The command line after the program's name; a job is (model, inputs, outputs), and the prefix of
    a trace a path, as the runner sees them."""
    arguments = ["--threads", str(schedule.threads), "--warmup", str(schedule.warmup)]
    arguments += ["--turns", str(schedule.turns), "--limit", str(schedule.limit_seconds)]
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
    """Read what a runner wrote, by output name.

    Raises:
        DeviceError: when a file is missing or not of the size that its shape says.
    """
    arrays: dict[str, np.ndarray] = {}
    for index, spec in enumerate(specs):
        path = folder / f"{index}.bin"
        raw = path.read_bytes() if path.exists() else b""
        if len(raw) != spec.size_bytes:
            raise DeviceError(
                f"output '{spec.name}' came back with {len(raw)} bytes instead of {spec.size_bytes}"
            )
        arrays[spec.name] = np.frombuffer(raw, spec.element).reshape(spec.shape).copy()
    return arrays


def parse_report(
    exit_code: int, stdout: str, stderr: str, *, where: str, schedule: Schedule, models: int
) -> RunnerReport:
    """What the runner said, checked against what it was asked.

    Raises:
        DeviceError: when it failed, was killed, or answered something else.
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
            f"the runner's answer makes no sense ({_one_line(stdout)[:200]!r})", where=where
        ) from reason
    counts = {
        len(series) for m in report.models for series in (m.at_ms, m.wall_ms, m.cpu_ms)
    }  # fmt: skip
    fewest, exact = schedule.turns, not schedule.seconds
    wrong = len(counts) > 1 or any(n < fewest or (exact and n > fewest) for n in counts)
    if wrong or len(report.models) != models:
        raise DeviceError(
            f"the runner answered {sorted(counts)} samples of {len(report.models)} graphs, "
            f"not {fewest} of {models}",
            where=where,
        )
    return report


def _rows(values: list[Any], width: int) -> tuple[tuple[float, ...], ...]:
    if len(values) % width or (width == 1 and values):
        raise ValueError("watched values of another number of files")
    numbers = [float(value) for value in values]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a watched value that is no number")
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
        raise ValueError("a time that is none")
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
