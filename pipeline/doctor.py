"""`nelf doctor`: checks the hardware and software of this machine, and prints the results.

Invariants:
- The checks change nothing: they start no server, download nothing and write no file.
- Each check imports its own libraries, so a broken installation is one row of the table and does
  not stop the other checks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from lightfield.errors import described
from pipeline.console import Console

State = Literal["ok", "absent", "broken"]
Found = tuple[State, str]
"""State, and the version or what else was found."""

TABLE_COLUMNS = 100
STYLES: dict[State, str] = {"ok": "green", "absent": "yellow", "broken": "red"}
CHILD_SECONDS = 20.0
GIB = 2**30
MEMORY_BYTES = 4 * GIB
"""Memory that the tiny preset needs at most."""
DISK_MARGIN_BYTES = 2 * GIB
"""Size of everything in a run but its pseudo images."""

COREML_CHECK = """
import coremltools
import coremltools.libmilstoragepython
print(coremltools.__version__)
"""
"""coremltools can be imported without its native library for weights, but cannot convert then."""


@dataclass(frozen=True)
class CheckResult:
    """One row of the table."""

    name: str
    state: State
    """`ok`: it works; `absent`: it is not installed or attached; `broken`: it is, but fails."""
    detail: str
    """The version, or what else was found."""
    effect: str
    """What does not work because of it, one clause; empty when the state is `ok`."""


@dataclass(frozen=True)
class Check:
    """One check of this machine."""

    name: str
    find: Callable[[], Found]
    """Returns state and detail; an exception means that the state is `broken`."""
    effect: str

    def result(self) -> CheckResult:
        """The result of the check; never raises."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning is not a fault of this machine
                state, detail = self.find()
        except Exception as error:  # broken installations raise errors of any type
            state, detail = "broken", described(error)
        return CheckResult(self.name, state, detail, "" if state == "ok" else self.effect)


def check_machine(runs: Path = Path("runs")) -> list[CheckResult]:
    """The results of all checks; `runs` is the folder whose disk is checked, and need not exist."""
    with ThreadPoolExecutor(1) as pool:  # the slowest check, that of coremltools, starts first
        coreml = pool.submit(find_coremltools)
        checks = (
            Check("Python", find_python, "reports cannot name the system"),
            Check("CPU", find_cpu, "reports cannot name the CPU"),
            Check("memory", find_memory, "even the tiny preset, which needs up to 4 GiB, may fail"),
            Check("disk", lambda: find_disk(runs), "a run may fill the disk"),
            Check("torch", find_torch, "no stage works: all of them compute with PyTorch"),
            Check("GPU", find_gpu, "training runs on the CPU, which suits the tiny preset only"),
            Check("triton", find_triton, "training on a GPU is many times slower"),
            Check(
                "tinycudann", find_tinycudann, "without Triton the hash grid is in plain PyTorch"
            ),
            Check("torch-scatter", find_scatter, "PyTorch's own index_add is used instead"),
            Check("LPIPS", find_lpips, "quality tables show LPIPS as not available"),
            Check("ONNX", lambda: find_package("onnx"), "nothing can be exported"),
            Check("onnxsim", lambda: find_package("onnxsim"), "nothing can be exported"),
            Check("ONNX Runtime", find_onnxruntime, "this machine cannot check or measure a graph"),
            Check("CoreML", coreml.result, "no .mlpackage is exported; all ONNX graphs are"),
            Check("phone", find_phone, "latency is measured on this machine instead"),
            Check("phone compiler", find_phone_compiler, "latency cannot be measured on a phone"),
            Check("node", find_node, "only the tests of the lens script are skipped"),
        )
        return [check.result() for check in checks]


def print_checks(results: list[CheckResult], console: Console) -> None:
    """Print a table of at most 100 columns, then the default preset of this machine."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for result in results:
        lines = [Text(result.detail)]
        if result.effect:
            lines.append(Text(f"effect: {result.effect}", "dim"))
        state = Text(result.state, STYLES[result.state])
        table.add_row(result.name, state, Text("\n").join(lines))
    # rich uses the terminal's width when that is less
    console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)
    console.say("")
    console.say(_preset_line())


def _preset_line() -> str:
    try:
        from pipeline.presets import default_preset_name

        name = default_preset_name()
    except Exception as error:  # for example because torch is broken
        return f"No preset works here: {described(error)}"
    why = {
        "tiny": "torch sees no CUDA GPU",
        "small": "the GPU has too little memory for `paper`",
        "paper": "the GPU has enough memory for it",
    }[name]
    return f"The default preset here is `{name}`: {why}."


# --- the machine ----------------------------------------------------------------------------------


def find_python() -> Found:
    """The version of Python, and the operating system."""
    from device.host import system_name

    return "ok", f"{platform.python_version()} on {system_name()}"


def find_cpu() -> Found:
    """The CPU, and how many of its cores this process may use."""
    from device.host import processor_name

    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return "ok", f"{processor_name()}, {usable} of {cores} cores usable"


def find_memory(meminfo: Path = Path("/proc/meminfo")) -> Found:
    """Memory that is available without swapping; the total where there is no /proc/meminfo."""
    if not meminfo.is_file():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return "ok" if total >= MEMORY_BYTES else "broken", f"{total / GIB:.1f} GiB in total"
    entries = (line.partition(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    sizes = {key: int(value.split()[0]) * 1024 for key, _, value in entries}
    available, total = sizes["MemAvailable"], sizes["MemTotal"]
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    return "ok" if available >= MEMORY_BYTES else "broken", detail


def find_disk(runs: Path) -> Found:
    """Free space on the disk of the runs, compared with what a run of the default preset needs."""
    from pipeline.presets import default_preset_name, preset

    folder = next(path for path in (runs.resolve(), *runs.resolve().parents) if path.is_dir())
    if not os.access(folder, os.W_OK):
        return "broken", f"no permission to write in {folder}"
    chosen = preset(default_preset_name())
    pseudo_bytes = 3 * chosen.scene.resolution**2 * chosen.pseudo.images
    free, needed = shutil.disk_usage(folder).free, pseudo_bytes + DISK_MARGIN_BYTES
    detail = f"{free / GIB:.1f} GiB free; a `{chosen.name}` run needs up to {needed / GIB:.1f} GiB"
    return "ok" if free >= needed else "broken", detail


# --- training -------------------------------------------------------------------------------------


def find_torch() -> Found:
    """The version of PyTorch, the CUDA version that it was built for, and its number of threads."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA support"
    return "ok", f"{torch.__version__}, built with {built}, {torch.get_num_threads()} thread(s)"


def find_gpu() -> Found:
    """The first CUDA GPU, on which a small computation must succeed."""
    import torch

    if torch.cuda.is_available():
        torch.ones(8, device="cuda").sum().item()  # raises where torch has no kernels for this GPU
        gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        several = f", the first of {count}" if count > 1 else ""
        return "ok", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, {capability}{several}"
    if not nvidia_devices():
        return "absent", "no NVIDIA GPU"
    why = (
        "cannot start CUDA: is the driver too old?"
        if torch.version.cuda
        else "was built without CUDA"
    )
    return "broken", f"there is an NVIDIA GPU, but torch {torch.__version__} {why}"


def nvidia_devices(folder: Path = Path("/dev")) -> list[Path]:
    """The device files of NVIDIA's driver, one per GPU, whether torch can use the GPU or not."""
    return sorted(folder.glob("nvidia[0-9]*"))


def find_triton() -> Found:
    """Triton, which torch's CUDA builds include; the kernels' own check tells whether it works."""
    import torch

    from train.kernels import availability

    state, version = find_package("triton")
    if state == "absent":
        return state, "not installed"
    if not torch.cuda.is_available():
        return "ok", f"{version}; its kernels need a CUDA GPU"
    reason = availability.reason(torch.device("cuda"))
    return ("broken", reason) if reason else ("ok", f"{version}; its kernels run on this GPU")


def find_tinycudann() -> Found:
    """tiny-cuda-nn's Python module; the teacher's own check tells whether it works."""
    from train.hash_grid import tcnn

    module, reason = tcnn.probe()
    if module is None and not _is_installed("tinycudann"):
        return "absent", "not installed"
    return "broken" if module is None else "ok", reason or _version("tinycudann")


def find_scatter() -> Found:
    """torch-scatter; the renderer's own check tells whether it works."""
    from train import volume_rendering

    if volume_rendering.scatter_library() is not None:
        return "ok", _version("torch_scatter")
    if _is_installed("torch_scatter"):
        return "broken", "installed, but cannot be imported: was it built for another torch?"
    return "absent", "not installed"


def find_lpips() -> Found:
    """LPIPS: its package, torchvision, and the weights of its backbone."""
    from lightfield import metrics

    reason = metrics.load_lpips().unavailable
    if reason is None:
        return "ok", f"with AlexNet weights {metrics.LPIPS_BACKBONE}"
    if not _is_installed("lpips"):
        return "absent", "not installed: pip install lpips"
    return "absent" if metrics.LPIPS_BACKBONE in reason else "broken", reason


# --- export and devices ---------------------------------------------------------------------------


def find_onnxruntime() -> Found:
    """ONNX Runtime and its execution providers."""
    state, detail = find_package("onnxruntime")
    if state == "ok":
        providers = importlib.import_module("onnxruntime").get_available_providers()
        names = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
        detail = f"{detail}, providers: {names}"
    return state, detail


def find_coremltools() -> Found:
    """What coremltools can do. Another Python imports it, because it prints, and because its native
    libraries can crash the process."""
    if not _is_installed("coremltools"):
        return "absent", "not installed: pip install coremltools"
    state, said = child_says(COREML_CHECK)
    if state == "ok":
        predicts = "and predicts" if sys.platform == "darwin" else "(prediction needs macOS)"
        said = f"coremltools {said} converts {predicts}"
    return state, said


def child_says(code: str, limit_seconds: float = CHILD_SECONDS) -> Found:
    """The last line that another Python prints when it runs `code`, or how that Python failed."""
    # -P: nothing is imported from the working folder
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "broken", f"no answer within {limit_seconds:.0f} s"
    if done.returncode < 0:
        return "broken", f"its process was ended by {signal.Signals(-done.returncode).name}"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return "broken" if done.returncode else "ok", lines[-1].strip() if lines else "no message"


def find_phone() -> Found:
    """The phones that a running adb server lists; no server is started."""
    from device import adb_server

    adb = adb_server.probe_adb()
    program = f"adb {adb.version or 'of unknown version'}" if adb.binary else "no adb"
    if adb.problem is not None:
        attached = bool(adb.phones or adb.usb_debugging_devices)
        return "broken" if attached else "absent", f"{program}; {adb.problem}"
    ready = [f"{phone.model or 'phone'} ({phone.serial})" for phone in adb.phones if phone.is_ready]
    return "ok", f"{', '.join(ready)}; {program}"


def find_phone_compiler() -> Found:
    """The compiler for the program that measures latencies on a phone."""
    from device.runner import compiler

    if clang := compiler.ndk_clang():
        return "ok", f"the NDK's {clang}"
    if compiler.zig_command():
        return "ok", f"zig {_version('ziglang')}"
    if home := os.environ.get("ANDROID_NDK_HOME"):
        return "broken", f"ANDROID_NDK_HOME={home} has no clang for arm64"
    return "absent", "not installed: pip install ziglang, or set ANDROID_NDK_HOME"


def find_node() -> Found:
    """Node.js and its version."""
    program = shutil.which("node")
    if program is None:
        return "absent", "not installed"
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=5, check=False
    )
    return (
        "broken" if done.returncode else "ok",
        done.stdout.strip() or f"{program} prints no version",
    )


# --- packages -------------------------------------------------------------------------------------


def find_package(name: str) -> Found:
    """A package, which works when it can be imported."""
    if not _is_installed(name):
        return "absent", f"not installed: pip install {name}"
    importlib.import_module(name)
    return "ok", _version(name)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # another distribution's module, as of onnxruntime-gpu
        return str(getattr(importlib.import_module(name), "__version__", "of unknown version"))
