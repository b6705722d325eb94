"""The runner of this machine: ONNX Runtime in a process of its own, which does nothing else.

Arguments, files and the answer are those of `device/runner_protocol.py`. Neither the threads nor the
memory of the process that trains can touch a measurement made here.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from device.runner_protocol import FAILURE_EXIT_CODE

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

    def __init__(self, model: Path, inputs: Path, threads: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        start_ns = time.perf_counter_ns()
        try:
            self.session = ort.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as reason:  # the binding raises many unrelated types
            raise _RunError("load the graph", reason) from reason
        self.load_us = (time.perf_counter_ns() - start_ns) / 1e3
        self.feed = {
            value.name: np.fromfile(inputs / f"{i}.bin", _ELEMENTS[value.type]).reshape(value.shape)
            for i, value in enumerate(self.session.get_inputs())
        }
        self.names = [value.name for value in self.session.get_outputs()]
        self.outputs: Sequence[Any] = []
        self.wall_us: list[float] = []
        self.cpu_us: list[float] = []

    def turn(self, *, timed: bool) -> None:
        """Run once."""
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        try:
            self.outputs = self.session.run(self.names, self.feed)
        except Exception as reason:
            raise _RunError("run the graph", reason) from reason
        cpu_us = (time.process_time_ns() - cpu_ns) / 1e3
        wall_us = (time.perf_counter_ns() - wall_ns) / 1e3
        if timed:
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
            "wall_us": self.wall_us,
            "cpu_us": self.cpu_us,
            "outputs": outputs,
        }


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
    models = [_LoadedModel(job[0], job[1], arguments.threads) for job in jobs]
    for model in models:
        for _ in range(arguments.warmup):
            model.turn(timed=False)
    for _ in range(arguments.turns):
        for model in models:
            model.turn(timed=True)
    for model, job in zip(models, jobs, strict=True):
        if len(job) > 2:
            model.write_outputs(job[2])
    growth_kb = max(_status_kb("VmHWM:") - before_kb, 0)
    return {
        "runtime": ort.__version__,
        "growth_kb": growth_kb,
        "models": [model.report() for model in models],
    }


def main() -> int:
    """Run the graphs of the command line, print the answer."""
    arguments = _arguments()
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
