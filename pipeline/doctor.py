"""What this machine has for the chain, and what each absence costs.

Invariants:
- Looking changes nothing: no server is started, nothing is downloaded, nothing is written.
- Whatever is looked at is imported inside its own probe, so a broken installation, however it fails,
  is one line of the table and not the end of it.
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

TABLE_COLUMNS = 100
STYLES: dict[State, str] = {"ok": "green", "absent": "yellow", "broken": "red"}
CHILD_SECONDS = 20.0
GIB = 2**30
MEMORY_BYTES = 4 * GIB
"""What the tiny preset stays below."""
DISK_MARGIN_BYTES = 2 * GIB
"""Room for everything of a run but its pseudo images."""

COREML_TRIAL = """
import coremltools
import coremltools.libmilstoragepython
print(coremltools.__version__)
"""
"""Without the native library for weights coremltools imports, but does not convert."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    state: State
    """`ok` serves; `absent` is not there; `broken` is there and does not serve."""
    detail: str
    """The version, or what was found."""
    cost: str
    """What follows from its absence, one clause; empty when it is ok."""


@dataclass(frozen=True)
class Probe:
    """How to look for one thing."""

    name: str
    look: Callable[[], Found]
    """State and detail; an exception means that the thing is broken."""
    cost: str

    def finding(self) -> Finding:
        """What `look` finds; never raises."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a library says of itself is not our finding
                state, detail = self.look()
        except Exception as error:  # that is what a broken installation is
            state, detail = "broken", described(error)
        return Finding(self.name, state, detail, "" if state == "ok" else self.cost)


def examine(runs: Path = Path("runs")) -> list[Finding]:
    """Look at this machine; `runs` is the folder, there or not, whose disk is looked at."""
    with ThreadPoolExecutor(1) as pool:  # coremltools takes longest, so it is tried meanwhile
        coreml = pool.submit(find_coremltools)
        probes = (
            Probe("Python", find_python, "reports cannot name the system"),
            Probe("processor", find_processor, "reports cannot name it"),
            Probe("memory", find_memory, "even the tiny preset, which takes up to 4 GiB, may fail"),
            Probe("disk", lambda: find_disk(runs), "a run may end on a full disk"),
            Probe("torch", find_torch, "nothing works: every stage computes with it"),
            Probe("GPU", find_gpu, "training runs on the processor, at sizes for the tiny preset"),
            Probe("triton", find_triton, "GPU training is many times slower, in plain PyTorch"),
            Probe("tinycudann", find_tinycudann, "the teacher's hash grid runs in plain PyTorch"),
            Probe("torch-scatter", find_scatter, "PyTorch's own index_add does its work"),
            Probe("LPIPS", find_lpips, "quality tables say that LPIPS is not available"),
            Probe("ONNX", lambda: find_package("onnx"), "nothing can be exported"),
            Probe("onnxsim", lambda: find_package("onnxsim"), "nothing can be exported"),
            Probe("ONNX Runtime", find_onnxruntime, "no graph can be checked or measured here"),
            Probe("CoreML", coreml.result, "no .mlpackage is written; all ONNX graphs are"),
            Probe("phone", find_phone, "latency is measured on this machine instead"),
            Probe("phone compiler", find_phone_compiler, "no phone can be measured"),
            Probe("node", find_node, "the lens script's own tests are skipped; nothing else is"),
        )
        return [probe.finding() for probe in probes]


def print_findings(findings: list[Finding], console: Console) -> None:
    """The findings as a table of at most 100 columns, then the preset that this machine gets."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        lines = [Text(finding.detail)]
        if finding.cost:
            lines.append(Text(f"so {finding.cost}", "dim"))
        state = Text(finding.state, STYLES[finding.state])
        table.add_row(finding.name, state, Text("\n").join(lines))
    console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)  # rich keeps the narrower
    console.say("")
    console.say(_preset_line())


def _preset_line() -> str:
    try:
        from pipeline.presets import default_preset_name

        name = default_preset_name()
    except Exception as error:  # torch may be what is broken
        return f"No preset works here: {described(error)}"
    why = {
        "tiny": "torch sees no CUDA GPU",
        "small": "the GPU has too little memory for `paper`",
        "paper": "the GPU has memory enough for it",
    }[name]
    return f"The default preset here is `{name}`: {why}."


# --- the machine ----------------------------------------------------------------------------------


def find_python() -> Found:
    """This Python, and the system it runs on."""
    from device.host import system_name

    return "ok", f"{platform.python_version()} on {system_name()}"


def find_processor() -> Found:
    """The processor, and how many of its cores this process may use."""
    from device.host import processor_name

    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return "ok", f"{processor_name()}, {usable} of {cores} cores usable"


def find_memory(meminfo: Path = Path("/proc/meminfo")) -> Found:
    """Memory that programs can have without swapping; all of it where the system says no more."""
    if not meminfo.is_file():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return "ok" if total >= MEMORY_BYTES else "broken", f"{total / GIB:.1f} GiB in all"
    entries = (line.partition(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    sizes = {key: int(value.split()[0]) * 1024 for key, _, value in entries}
    available, total = sizes["MemAvailable"], sizes["MemTotal"]
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    return "ok" if available >= MEMORY_BYTES else "broken", detail


def find_disk(runs: Path) -> Found:
    """Free space where the runs would be, held against a run of this machine's default preset."""
    from pipeline.presets import default_preset_name, preset

    folder = next(path for path in (runs.resolve(), *runs.resolve().parents) if path.is_dir())
    if not os.access(folder, os.W_OK):
        return "broken", f"no permission to write in {folder}"
    chosen = preset(default_preset_name())
    pseudo_bytes = 3 * chosen.scene.resolution**2 * chosen.pseudo.images
    free, needed = shutil.disk_usage(folder).free, pseudo_bytes + DISK_MARGIN_BYTES
    detail = f"{free / GIB:.1f} GiB free; a `{chosen.name}` run takes up to {needed / GIB:.1f}"
    return "ok" if free >= needed else "broken", detail


# --- training -------------------------------------------------------------------------------------


def find_torch() -> Found:
    """PyTorch, what it was built for, and its threads."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return "ok", f"{torch.__version__}, built for {built}, {torch.get_num_threads()} thread(s)"


def find_gpu() -> Found:
    """The first CUDA GPU, shown to compute."""
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
        else "is built without CUDA"
    )
    return "broken", f"an NVIDIA GPU is there, but torch {torch.__version__} {why}"


def nvidia_devices(folder: Path = Path("/dev")) -> list[Path]:
    """The GPUs that a driver offers, whatever torch thinks of them."""
    return sorted(folder.glob("nvidia[0-9]*"))


def find_triton() -> Found:
    """Triton, which torch's CUDA builds bring, by the kernels' own probe."""
    import torch

    from train.kernels import availability

    state, version = find_package("triton")
    if state == "absent":
        return state, "not installed"
    if not torch.cuda.is_available():
        return "ok", f"{version}; its kernels take a CUDA GPU"
    reason = availability.reason(torch.device("cuda"))
    return ("broken", reason) if reason else ("ok", f"{version}; its kernels run on this GPU")


def find_tinycudann() -> Found:
    """tiny-cuda-nn's Python module, by the teacher's own probe."""
    from train.hash_grid import tcnn

    module, reason = tcnn.probe()
    if module is None and not _is_installed("tinycudann"):
        return "absent", "not installed"
    return "broken" if module is None else "ok", reason or _version("tinycudann")


def find_scatter() -> Found:
    """torch-scatter, by the renderer's own probe."""
    from train import volume_rendering

    if volume_rendering.scatter_library() is not None:
        return "ok", _version("torch_scatter")
    if _is_installed("torch_scatter"):
        return "broken", "installed, but does not import: built for another torch?"
    return "absent", "not installed"


def find_lpips() -> Found:
    """The perceptual metric: its package, torchvision, and the backbone's weights."""
    from lightfield import metrics

    reason = metrics.load_lpips().unavailable
    if reason is None:
        return "ok", f"with AlexNet weights {metrics.LPIPS_BACKBONE}"
    if not _is_installed("lpips"):
        return "absent", "not installed: pip install lpips"
    return "absent" if metrics.LPIPS_BACKBONE in reason else "broken", reason


# --- export and devices ---------------------------------------------------------------------------


def find_onnxruntime() -> Found:
    """ONNX Runtime and what it can compute on."""
    state, detail = find_package("onnxruntime")
    if state == "ok":
        providers = importlib.import_module("onnxruntime").get_available_providers()
        names = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
        detail = f"{detail}, providers: {names}"
    return state, detail


def find_coremltools() -> Found:
    """What coremltools can do; tried by another Python, for it prints, and its libraries are native."""
    if not _is_installed("coremltools"):
        return "absent", "not installed: pip install coremltools"
    state, said = child_says(COREML_TRIAL)
    if state == "ok":
        predicts = "and predicts" if sys.platform == "darwin" else "(predicting takes macOS)"
        said = f"coremltools {said} converts {predicts}"
    return state, said


def child_says(code: str, limit_seconds: float = CHILD_SECONDS) -> Found:
    """The last line that another Python prints while it runs `code`, or how it failed."""
    # -P: the caller's working folder must not decide what is imported
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
        return "broken", f"its process died of {signal.Signals(-done.returncode).name}"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return "broken" if done.returncode else "ok", lines[-1].strip() if lines else "no message"


def find_phone() -> Found:
    """Phones that a running adb server lists; none is started."""
    from device import adb_server

    adb = adb_server.probe_adb()
    program = f"adb {adb.version or 'of unknown version'}" if adb.binary else "no adb"
    if adb.problem is not None:
        there = bool(adb.phones or adb.usb_debugging_devices)
        return "broken" if there else "absent", f"{program}; {adb.problem}"
    ready = [f"{phone.model or 'phone'} ({phone.serial})" for phone in adb.phones if phone.is_ready]
    return "ok", f"{', '.join(ready)}; {program}"


def find_phone_compiler() -> Found:
    """What would compile the program that measures on a phone."""
    from device.runner import compiler

    if clang := compiler.ndk_clang():
        return "ok", f"the NDK's {clang}"
    if compiler.zig_command():
        return "ok", f"zig {_version('ziglang')}"
    if home := os.environ.get("ANDROID_NDK_HOME"):
        return "broken", f"ANDROID_NDK_HOME={home} holds no clang for arm64"
    return "absent", "not installed: pip install ziglang, or set ANDROID_NDK_HOME"


def find_node() -> Found:
    """Node.js."""
    program = shutil.which("node")
    if program is None:
        return "absent", "not installed"
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=5, check=False
    )
    return "broken" if done.returncode else "ok", done.stdout.strip() or f"{program} says nothing"


# --- packages -------------------------------------------------------------------------------------


def find_package(name: str) -> Found:
    """A package that only has to import."""
    if not _is_installed(name):
        return "absent", f"not installed: pip install {name}"
    importlib.import_module(name)
    return "ok", _version(name)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # its distribution has another name: onnxruntime-gpu
        return str(getattr(importlib.import_module(name), "__version__", "of unknown version"))
