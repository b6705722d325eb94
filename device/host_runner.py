"""The runner of this machine: ONNX Runtime in a process of its own, which does nothing else.

Arguments, files and the answer are those of `device/runner_protocol.py`. Neither the threads nor the
memory of the process that trains can touch a measurement made here. With `--tied` the runner ends as
soon as its standard input does, which its caller holds open: when that is killed, nothing measures on.
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
    """ONNX Runtime refused; carries what was being done."""

    def __init__(self, at: str, reason: Exception | str):
        super().__init__(str(reason))
        self.at = at


class _LoadedModel:
    """A session with its inputs bound, ready to be timed."""

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
        except Exception as reason:  # the binding raises many unrelated types
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

    def turn(self, since_ns: int | None = None) -> None:
        """Run once; the times are kept when they count, from `since_ns` on."""
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
        """This graph's entry in the answer."""
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
    """For a session: the provider asked for, then the CPU, which takes what it leaves over."""
    known: dict[str, str] = {**PROVIDER_NAMES}
    if known[name] not in ort.get_available_providers():
        raise _RunError(f"add the provider {name}", "this library was built without it")
    chosen = (known[name], dict(pair.split("=", 1) for pair in pairs))
    return [chosen[0]] if name == "cpu" else [chosen, known["cpu"]]


def _number_in(path: str) -> float:
    """The first number of a file, -1 when there is none."""
    try:
        return float(Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return -1.0


def _status_kb(key: str) -> int:
    """A line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_runner")
    for name in ("--threads", "--warmup", "--turns", "--limit"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--provider", choices=PROVIDER_NAMES, default="cpu")
    parser.add_argument("--profile")
    parser.add_argument("--tied", action="store_true")
    for name in ("--option", "--watch"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--model", dest="jobs", action="append", type=lambda path: [path])
    for name in ("--inputs", "--outputs"):
        parser.add_argument(name, action=_OfTheLastModel)
    return parser.parse_args()


class _OfTheLastModel(argparse.Action):
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
            model.turn()
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
    """All models in turns, often enough and long enough; what the watched files said meanwhile."""
    watched: list[float] = []
    start_ns = time.perf_counter_ns()

    def read_watched() -> None:
        if arguments.watch:
            watched.append((time.perf_counter_ns() - start_ns) / 1e3)
            watched.extend(_number_in(path) for path in arguments.watch)

    turns, seconds, read_at = 0, 0.0, 0.0
    while turns < arguments.turns or seconds < arguments.seconds:
        if seconds >= read_at:
            read_watched()
            read_at = seconds + _WATCH_SECONDS
        for model in models:
            model.turn(start_ns)
        turns, seconds = turns + 1, (time.perf_counter_ns() - start_ns) / 1e9
    read_watched()
    return watched


def _end_with_input() -> None:
    """Wait, without a share of the processor, for the end of standard input."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(FAILURE_EXIT_CODE)


def main() -> int:
    """Run the graphs of the command line, print the answer."""
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
