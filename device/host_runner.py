"""Runner for this machine: a separate process that only runs ONNX Runtime.

`device/runner_protocol.py` describes the arguments, files and report. In a separate process, the threads
and memory of a training process cannot disturb the measurement. With `--tied`, the runner ends when its
standard input ends; the caller holds that input open, so a killed caller leaves no runner behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from device.runner_protocol import FAILURE_EXIT_CODE, PROVIDER_NAMES

_WATCH_SECONDS = 0.5

_ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class _RunError(Exception):
    """An error of ONNX Runtime; `at` is the step that failed."""

    def __init__(self, at: str, reason: Exception | str):
        super().__init__(str(reason))
        self.at = at


class _LoadedModel:
    """An ONNX Runtime session with its inputs and the times of its runs."""

    def __init__(self, model: Path, inputs: Path, arguments: argparse.Namespace):
        options = ort.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        if arguments.profile:
            options.enable_profiling, options.profile_file_prefix = True, arguments.profile
        providers = _providers(arguments.provider, arguments.option)
        start_ns = time.perf_counter_ns()
        try:
            self.session = ort.InferenceSession(str(model), options, providers=providers)
        except Exception as reason:  # ONNX Runtime raises many unrelated types
            raise _RunError("load the graph", reason) from reason
        self.load_us = (time.perf_counter_ns() - start_ns) / 1e3
        self.feed = {
            value.name: np.fromfile(inputs / f"{i}.bin", _ELEMENTS[value.type]).reshape(value.shape)
            for i, value in enumerate(self.session.get_inputs())
        }
        self.names = [value.name for value in self.session.get_outputs()]
        self.outputs: Sequence[Any] = []
        self.at_us: list[float] = []
        self.wall_us: list[float] = []
        self.cpu_us: list[float] = []

    def run_once(self, since_ns: int | None = None) -> None:
        """Run the graph once. If `since_ns` is given, record the times relative to it."""
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        try:
            self.outputs = self.session.run(self.names, self.feed)
        except Exception as reason:
            raise _RunError("run the graph", reason) from reason
        cpu_us = (time.process_time_ns() - cpu_ns) / 1e3
        wall_us = (time.perf_counter_ns() - wall_ns) / 1e3
        if since_ns is not None:
            self.at_us.append((wall_ns - since_ns) / 1e3)
            self.wall_us.append(wall_us)
            self.cpu_us.append(cpu_us)

    def write_outputs(self, folder: Path) -> None:
        """Write output i to `folder/i.bin`."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, array in enumerate(self.outputs):
            (folder / f"{index}.bin").write_bytes(np.ascontiguousarray(array).tobytes())

    def report(self) -> dict[str, Any]:
        """This graph's entry in the report."""
        outputs = [
            {"name": name, "element": str(array.dtype), "shape": list(array.shape)}
            for name, array in zip(self.names, self.outputs, strict=False)
        ]
        return {
            "load_us": self.load_us,
            "at_us": self.at_us,
            "wall_us": self.wall_us,
            "cpu_us": self.cpu_us,
            "outputs": outputs,
        }


def _providers(name: str, pairs: list[str]) -> list[Any]:
    """Providers for a session: the given provider, then the CPU for the nodes it does not support."""
    known: dict[str, str] = {**PROVIDER_NAMES}
    if known[name] not in ort.get_available_providers():
        raise _RunError(f"add the provider {name}", "this library was built without it")
    chosen = (known[name], dict(pair.split("=", 1) for pair in pairs))
    return [chosen[0]] if name == "cpu" else [chosen, known["cpu"]]


def _number_in(path: str) -> float:
    """The first number in a file; -1 if the file has no number."""
    try:
        return float(Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return -1.0


def _status_kb(key: str) -> int:
    """A value in /proc/self/status; 0 if it does not exist."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_runner")
    for name in ("--threads", "--warmup", "--runs", "--limit"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--provider", choices=PROVIDER_NAMES, default="cpu")
    parser.add_argument("--profile")
    parser.add_argument("--tied", action="store_true")
    for name in ("--option", "--watch"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--model", dest="jobs", action="append", type=lambda path: [path])
    for name in ("--inputs", "--outputs"):
        parser.add_argument(name, action=_AppendToLastJob)
    return parser.parse_args()


class _AppendToLastJob(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.jobs[-1].append(values)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    jobs = [[Path(path) for path in job] for job in arguments.jobs or []]
    before_kb = _status_kb("VmRSS:")
    models = [_LoadedModel(job[0], job[1], arguments) for job in jobs]
    for model in models:
        for _ in range(arguments.warmup):
            model.run_once()
    watched = _measure(models, arguments) if models else []
    for model, job in zip(models, jobs, strict=True):
        if len(job) > 2:
            model.write_outputs(job[2])
    growth_kb = max(_status_kb("VmHWM:") - before_kb, 0)
    profile = {"profile": models[0].session.end_profiling()} if arguments.profile else {}
    return {
        "runtime": ort.__version__,
        "providers": ort.get_available_providers(),
        "growth_kb": growth_kb,
        **profile,
        "watched": watched,
        "models": [model.report() for model in models],
    }


def _measure(models: list[_LoadedModel], arguments: argparse.Namespace) -> list[float]:
    """Run all models round-robin, as often and as long as asked; return the watched values."""
    watched: list[float] = []
    start_ns = time.perf_counter_ns()

    def read_watched() -> None:
        if arguments.watch:
            watched.append((time.perf_counter_ns() - start_ns) / 1e3)
            watched.extend(_number_in(path) for path in arguments.watch)

    runs, seconds, read_at = 0, 0.0, 0.0
    while runs < arguments.runs or seconds < arguments.seconds:
        if seconds >= read_at:
            read_watched()
            read_at = seconds + _WATCH_SECONDS
        for model in models:
            model.run_once(start_ns)
        runs, seconds = runs + 1, (time.perf_counter_ns() - start_ns) / 1e9
    read_watched()
    return watched


def _end_with_input() -> None:
    """End this process when standard input ends; waiting for that takes no CPU time."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(FAILURE_EXIT_CODE)


def main() -> int:
    """Run the graphs on the command line and print the report."""
    arguments = _arguments()
    if arguments.tied:
        threading.Thread(target=_end_with_input, daemon=True).start()
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(arguments.limit)
    try:
        answer, code = _run(arguments), 0
    except _RunError as failure:
        answer, code = {"error": str(failure), "at": failure.at}, FAILURE_EXIT_CODE
    print(json.dumps(answer))
    return code


if __name__ == "__main__":
    sys.exit(main())
