"""Third-party benchmark programs on a phone, under the same conditions and settings as the own runner.

The user provides the program, built for Android, and the model in the program's format. The program is
pushed, restricted to the fast cores, run and removed like the own runner; `device.tool_output` parses its
output. Only latencies are measured: the images of the model are not checked.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from device.adb import PHONE_FOLDER, AdbPhone, read_identity
from device.adb_output import fast_cores, parse_cpu_list
from device.onnx_inputs import whole_graph
from device.phone_settings import measurement_settings
from device.thermal import (
    ThermalConfig,
    read_frequencies,
    read_state,
    require_screen,
    throttling_signs,
    wait_until_cool,
)
from device.tool_output import (
    ToolFigures,
    ToolKind,
    parse_benchmark_model,
    parse_executor_runner,
    parse_perf_test,
)
from lightfield.errors import AdbError, ConfigError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import DeviceIdentity
from lightfield.ranges import THREADS, Range, check_ranges

RESULTS = "results.csv"


@dataclass(frozen=True)
class ToolConfig:
    """A third-party benchmark program, and its arguments."""

    kind: ToolKind
    """Kind of the benchmark program."""
    program: Path
    """Path of the program, built for 64-bit Arm Android."""
    model: Path
    """Path of the model in the program's format: .onnx, .tflite or .pte."""
    libraries: Path | None = None
    """Folder of shared libraries (*.so) that the program loads."""
    runs: Annotated[int, Range(1, 1_000_000)] = 50
    """Number of measured runs."""
    warmup: Annotated[int, Range(0, 1_000_000)] = 5
    """Number of warm-up runs before the measured runs, if the program supports warm-up runs."""
    threads: Annotated[int, THREADS] = 1
    """Number of threads that the program may use."""
    arguments: str = ""
    """Additional arguments for the program, in one word: `--arguments='-e xnnpack'`."""
    timeout_seconds: Annotated[int, Range(1, 86_400)] = 600
    """Time limit of the program in seconds; the measurement fails if the program takes longer."""

    def __post_init__(self) -> None:
        check_ranges(self, "tool")
        try:
            shlex.split(self.arguments)
        except ValueError as reason:
            raise ConfigError(
                f"the text cannot be split into words ({reason})", where="arguments"
            ) from None

    def words(self, folder: str, scratch: str) -> list[str]:
        """The program's command line on the phone."""
        program, model = f"{folder}/{self.kind}", f"{folder}/model{self.model.suffix}"
        additional = shlex.split(self.arguments)
        if self.kind == "onnxruntime_perf_test":
            counts = ["-m", "times", "-r", str(self.runs), "-x", str(self.threads)]
            return [program, *counts, "-I", "-s", *additional, model, f"{scratch}/{RESULTS}"]
        if self.kind == "benchmark_model":
            counts = [f"--num_runs={self.runs}", f"--warmup_runs={self.warmup}"]
            options = [*counts, f"--num_threads={self.threads}", "--max_secs=3600"]
            return [program, f"--graph={model}", *options, *additional]
        counts = [f"--num_executions={self.warmup + self.runs}", f"--cpu_threads={self.threads}"]
        return [program, f"--model_path={model}", *counts, *additional]


@dataclass(frozen=True)
class ToolMeasurement:
    """Results of a benchmark program on a phone, with the conditions of the phone."""

    figures: ToolFigures
    device: DeviceIdentity
    model: str
    model_sha256: str
    program_sha256: str
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The measurement as plain data."""
        return {**asdict(self), "figures": self.figures.to_json()}


def measure_with_tool(
    phone: AdbPhone,
    config: ToolConfig,
    thermal: ThermalConfig = ThermalConfig(),  # noqa: B008 -- frozen
) -> ToolMeasurement:
    """Run a benchmark program on a phone.

    Raises:
        DeviceError: when a file is missing, the phone does not meet the thermal conditions, or the
            program fails or prints no result.
    """
    about = read_identity(phone)
    cpus = parse_cpu_list(phone.attempt(["cat", "/sys/devices/system/cpu/possible"]).stdout)
    cores = fast_cores(read_frequencies(phone, cpus, "cpuinfo_max_freq"), config.threads)
    scratch = f"{PHONE_FOLDER}/tool-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="nelf-graph-") as name:
        folder = phone.push_files(_files(config, Path(name)))
    try:
        before = wait_until_cool(lambda: read_state(phone, cpus), thermal)
        phone.shell(["mkdir", "-p", scratch])
        with measurement_settings(phone, about.api) as settings:
            require_screen(read_state(phone, cpus), thermal)
            pinning = _pinning(phone, cores)
            figures = _run(phone, config, [*pinning, "env", f"LD_LIBRARY_PATH={folder}"],
                           folder, scratch)  # fmt: skip
            after = read_state(phone, cpus)
    finally:
        with contextlib.suppress(AdbError):
            phone.remove([folder, scratch])
    signs = throttling_signs([after], [figures.samples_ms], {})
    arguments = config.arguments or "default of the program"
    return ToolMeasurement(
        figures,
        DeviceIdentity(
            "phone", about.name, about.system, config.kind, arguments, config.threads,
            about.emulated, about.unit,
        ),
        config.model.name,
        sha256_of(config.model),
        sha256_of(config.program),
        {
            "before": before.to_json(),
            "after": after.to_json(),
            "throttled": bool(signs),
            "throttling": signs,
            "settings": settings,
            "cpu_affinity": pinning[1] if pinning else None,
        },
    )  # fmt: skip


def _files(config: ToolConfig, scratch: Path) -> dict[str, Path]:
    """Files to push, by name on the phone; `scratch` is for a graph that must be rewritten."""
    files = {config.kind: config.program, f"model{config.model.suffix}": config.model}
    if config.libraries is not None:
        files |= {path.name: path for path in sorted(config.libraries.glob("*.so"))}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise DeviceError("file is missing", where=missing[0])
    if config.model.suffix == ".onnx":
        files[f"model{config.model.suffix}"] = whole_graph(config.model, scratch)
    return files


def _pinning(phone: AdbPhone, cores: Sequence[int]) -> list[str]:
    words = ["taskset", f"{sum(1 << core for core in cores):x}"]
    return words if cores and phone.attempt([*words, "true"]).exit_code == 0 else []


def _run(
    phone: AdbPhone, config: ToolConfig, before: Sequence[str], folder: str, scratch: str
) -> ToolFigures:
    since = phone.attempt(["date", "+%m-%d %H:%M:%S.000"]).stdout.strip()
    words = [*before, *config.words(folder, scratch)]
    done = phone.attempt(words, timeout_seconds=config.timeout_seconds)
    output = f"{done.stdout}\n{done.stderr}"
    if done.exit_code != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
        raise DeviceError(
            f"the program ended with exit code {done.exit_code} ({lines[-1][:200]})",
            where=config.kind,
        )
    if config.kind == "onnxruntime_perf_test":
        return parse_perf_test(output, phone.attempt(["cat", f"{scratch}/{RESULTS}"]).stdout)
    if config.kind == "benchmark_model":
        return parse_benchmark_model(output)
    # Android builds log instead of printing
    log = phone.attempt(["logcat", "-d", "-s", "ExecuTorch:I", "-T", since]).stdout
    return parse_executor_runner(
        output if "Iteration " in output else f"{output}\n{log}", config.warmup
    )
