from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console as RichConsole

import pipeline.presets
from device import adb_server
from device.adb import AttachedPhone
from device.adb_server import AdbProbe
from device.runner import compiler
from lightfield import metrics
from lightfield.metrics import LPIPS_BACKBONE, Lpips
from pipeline import doctor
from pipeline.console import Console
from pipeline.doctor import (
    GIB,
    Finding,
    Probe,
    child_says,
    examine,
    find_disk,
    find_gpu,
    find_lpips,
    find_memory,
    find_node,
    find_onnxruntime,
    find_package,
    find_phone,
    find_phone_compiler,
    find_processor,
    find_scatter,
    find_tinycudann,
    find_triton,
    nvidia_devices,
    print_findings,
)
from train import volume_rendering
from train.hash_grid import tcnn
from train.kernels import availability


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """The names of the packages that are installed; none but what the test adds."""
    names: set[str] = set()
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name in names)
    return names


def module(monkeypatch, name: str, **attributes) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def returns(value):
    return lambda *args, **kwargs: value


# -- the whole --------------------------------------------------------------------------------------


def test_a_machine_is_examined_without_starting_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "child_says", returns(("ok", "9.0")))
    monkeypatch.setattr(adb_server, "_start_server", lambda: pytest.fail("a server was started"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_: pytest.fail("a download"))
    findings = examine(tmp_path / "runs")
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) == 17
    for finding in findings:
        assert finding.state in ("ok", "absent", "broken")
        assert finding.detail
        assert (finding.state == "ok") == (finding.cost == ""), finding
    assert list(tmp_path.iterdir()) == []


def test_a_machine_where_everything_is_broken_is_examined_too(monkeypatch, tmp_path):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise OSError(f"cannot load lib{name}.so\nmuch more")

    for name in ("torch", "device.host", "device.adb_server", "pipeline.presets", "onnx"):
        monkeypatch.setitem(sys.modules, name, Broken(name))
    for package, name in (("device", "host"), ("device", "adb_server"), ("pipeline", "presets")):
        monkeypatch.delattr(f"{package}.{name}", raising=False)
    monkeypatch.setattr(doctor, "child_says", lambda code: 1 / 0)
    monkeypatch.setattr(doctor, "_is_installed", returns(True))
    findings = {finding.name: finding for finding in examine(tmp_path)}
    for name in ("Python", "processor", "disk", "torch", "GPU", "phone", "CoreML"):
        assert findings[name].state == "broken", findings[name]
        assert findings[name].cost
    assert findings["GPU"].detail == "OSError: cannot load libcuda.so"
    assert findings["CoreML"].detail == "ZeroDivisionError: division by zero"
    assert "No preset works here: OSError: cannot load" in printed([])


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (OSError("no driver\nsecond line"), "OSError: no driver"),
        (RuntimeError(), "RuntimeError: no reason given"),
        (ImportError("  \n"), "ImportError: no reason given"),
    ],
)
def test_a_probe_that_raises_has_found_something_broken(error, detail):
    def look():
        raise error

    assert Probe("thing", look, "no things").finding() == Finding(
        "thing", "broken", detail, "no things"
    )


def test_what_is_there_costs_nothing():
    assert Probe("thing", lambda: ("ok", "1.0"), "no things").finding().cost == ""
    assert Probe("thing", lambda: ("absent", "no"), "no things").finding().cost == "no things"


def test_warnings_are_not_findings():
    def look():
        import warnings

        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return "ok", "1.0"

    assert Probe("thing", look, "").finding().state == "ok"


# -- the table --------------------------------------------------------------------------------------


def printed(findings: list[Finding], width: int = 200) -> str:
    text = io.StringIO()
    rich = RichConsole(file=text, width=width, soft_wrap=True, highlight=False)
    print_findings(findings, Console(rich_console=rich))
    return text.getvalue()


def test_the_table_says_it_all_within_its_width():
    findings = [
        Finding("torch", "ok", "2.13 [cpu]", ""),
        Finding("phone compiler", "absent", "pip " * 40, "nothing is measured " * 12),
        Finding("GPU", "broken", "/" + "x" * 150, "slow"),
    ]
    for width in (60, 100, 200):
        text = printed(findings, width)
        table, preset = text.rstrip().rsplit("\n", 1)
        assert max(len(line.rstrip()) for line in table.splitlines()) <= min(width, 100)
        flat = " ".join(table.split())
        assert "torch ok 2.13 [cpu]" in flat
        assert "so nothing is measured nothing" in flat
        assert flat.count("pip") == 40
        assert flat.count("nothing is measured") == 12
        assert flat.count("x") == 150, "a long path is folded, not cut"
        assert preset.startswith("The default preset here is")


@pytest.mark.parametrize(
    ("memory_gib", "line"),
    [
        (None, "`tiny`: torch sees no CUDA GPU"),
        (12, "`small`: the GPU has too little memory for `paper`"),
        (80, "`paper`: the GPU has memory enough for it"),
    ],
)
def test_the_last_line_names_the_preset_and_why(monkeypatch, memory_gib, line):
    monkeypatch.setattr(torch.cuda, "is_available", returns(memory_gib is not None))
    gpu = SimpleNamespace(total_memory=(memory_gib or 0) * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", returns(gpu))
    assert printed([]).splitlines()[-1] == f"The default preset here is {line}."


# -- the machine ------------------------------------------------------------------------------------


def meminfo(path: Path, available_kib: int) -> Path:
    path.write_text(f"MemTotal: 16777216 kB\nMemAvailable: {available_kib} kB\nHugePages_Free: 0\n")
    return path


@pytest.mark.parametrize(
    ("available_kib", "found"),
    [
        (12 << 20, ("ok", "12.0 of 16.0 GiB available")),
        (4 << 20, ("ok", "4.0 of 16.0 GiB available")),
        (3 << 20, ("broken", "3.0 of 16.0 GiB available")),
    ],
)
def test_memory(tmp_path, available_kib, found):
    assert find_memory(meminfo(tmp_path / "meminfo", available_kib)) == found


@pytest.mark.parametrize(("pages", "state"), [(4 << 18, "ok"), (3 << 18, "broken")])
def test_memory_where_there_is_no_meminfo(monkeypatch, tmp_path, pages, state):
    sizes = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    found = find_memory(tmp_path / "meminfo")
    assert found == (state, f"{pages / (1 << 18):.1f} GiB in all")


def test_processor(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", returns(16))
    monkeypatch.setattr(os, "sched_getaffinity", returns({0, 3}), raising=False)
    monkeypatch.setattr("device.host.processor_name", returns("Some Processor"))
    assert find_processor() == ("ok", "Some Processor, 2 of 16 cores usable")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert find_processor() == ("ok", "Some Processor, 16 of 16 cores usable")


@pytest.fixture
def disk(monkeypatch):
    """Free bytes of every disk, as a list of one; a run here takes 4 GiB beside the margin of 2."""
    free = [100 * GIB]
    asked = []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=free[0])

    sizes = SimpleNamespace(
        name="tiny",
        scene=SimpleNamespace(resolution=1024),
        pseudo=SimpleNamespace(images=4 * GIB // (3 << 20)),
    )
    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr(pipeline.presets, "default_preset_name", returns("tiny"))
    monkeypatch.setattr(pipeline.presets, "preset", returns(sizes))
    return SimpleNamespace(free=free, asked=asked)


@pytest.mark.parametrize(("free_gib", "state"), [(100, "ok"), (6, "ok"), (5.9, "broken")])
def test_disk(disk, tmp_path, free_gib, state):
    disk.free[0] = int(free_gib * GIB)
    detail = f"{free_gib:.1f} GiB free; a `tiny` run takes up to 6.0"
    assert find_disk(tmp_path / "not" / "there") == (state, detail)
    assert disk.asked == [tmp_path]


def test_a_disk_that_cannot_be_written_to(disk, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert find_disk(tmp_path / "runs") == ("broken", f"no permission to write in {tmp_path}")


# -- training ---------------------------------------------------------------------------------------


def gpus(monkeypatch, *, count: int, devices=(), cuda: str | None = "13.0", computes=True) -> None:
    properties = SimpleNamespace(name="NVIDIA X1", total_memory=24 * GIB, major=8, minor=9)

    def ones(*_, **__):
        if not computes:
            raise RuntimeError("no kernel image is available for execution on the device\nHint")
        return torch.zeros(8)

    monkeypatch.setattr(torch.cuda, "is_available", returns(count > 0))
    monkeypatch.setattr(torch.cuda, "device_count", returns(count))
    monkeypatch.setattr(torch.cuda, "get_device_properties", returns(properties))
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "nvidia_devices", returns(list(devices)))


def test_a_gpu(monkeypatch):
    gpus(monkeypatch, count=1)
    assert find_gpu() == ("ok", "NVIDIA X1, 24 GiB, compute capability 8.9")
    gpus(monkeypatch, count=4)
    assert find_gpu() == ("ok", "NVIDIA X1, 24 GiB, compute capability 8.9, the first of 4")


def test_a_gpu_that_this_torch_has_no_kernels_for(monkeypatch):
    gpus(monkeypatch, count=1, computes=False)
    found = Probe("GPU", find_gpu, "slow").finding()
    assert found.state == "broken"
    assert found.detail == "RuntimeError: no kernel image is available for execution on the device"


def test_no_gpu(monkeypatch):
    gpus(monkeypatch, count=0)
    assert find_gpu() == ("absent", "no NVIDIA GPU")


@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "is built without CUDA"), ("13.0", "cannot start CUDA: is the driver")]
)
def test_a_gpu_that_torch_cannot_use(monkeypatch, cuda, why):
    gpus(monkeypatch, count=0, devices=[Path("nvidia0")], cuda=cuda)
    state, detail = find_gpu()
    assert state == "broken"
    assert detail.startswith(f"an NVIDIA GPU is there, but torch {torch.__version__} {why}")


def test_gpus_are_told_from_other_nodes_of_their_driver(tmp_path):
    for name in ("nvidiactl", "nvidia-uvm", "nvidia1", "nvidia0", "null"):
        (tmp_path / name).touch()
    assert [path.name for path in nvidia_devices(tmp_path)] == ["nvidia0", "nvidia1"]


def test_triton(monkeypatch, installed):
    assert find_triton() == ("absent", "not installed")
    installed.add("triton")
    module(monkeypatch, "triton", __version__="3.6")
    monkeypatch.setattr(doctor, "_version", returns("3.6"))
    monkeypatch.setattr(torch.cuda, "is_available", returns(False))
    assert find_triton() == ("ok", "3.6; its kernels take a CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", returns(True))
    monkeypatch.setattr(availability, "reason", returns(None))
    assert find_triton() == ("ok", "3.6; its kernels run on this GPU")
    monkeypatch.setattr(availability, "reason", returns("some GPU is older than Ampere"))
    assert find_triton() == ("broken", "some GPU is older than Ampere")


def test_tinycudann(monkeypatch, installed):
    monkeypatch.setattr(tcnn, "probe", returns((None, "ModuleNotFoundError: No module")))
    assert find_tinycudann() == ("absent", "not installed")
    installed.add("tinycudann")
    monkeypatch.setattr(tcnn, "probe", returns((None, "OSError: Unknown compute capability")))
    assert find_tinycudann() == ("broken", "OSError: Unknown compute capability")
    made = module(monkeypatch, "tinycudann", __version__="2.0")
    monkeypatch.setattr(tcnn, "probe", returns((made, None)))
    assert find_tinycudann() == ("ok", "2.0")


def test_torch_scatter(monkeypatch, installed):
    monkeypatch.setattr(volume_rendering, "scatter_library", returns(None))
    assert find_scatter() == ("absent", "not installed")
    installed.add("torch_scatter")
    assert find_scatter()[0] == "broken"
    made = module(monkeypatch, "torch_scatter", __version__="2.1.2")
    monkeypatch.setattr(volume_rendering, "scatter_library", returns(made))
    assert find_scatter() == ("ok", "2.1.2")


def test_lpips(monkeypatch, installed):
    no_weights = f"the AlexNet weights {LPIPS_BACKBONE} are not in torch's hub cache"
    monkeypatch.setattr(metrics, "load_lpips", returns(Lpips(None, no_weights)))
    assert find_lpips() == ("absent", "not installed: pip install lpips")
    installed.add("lpips")
    assert find_lpips() == ("absent", no_weights)
    no_torchvision = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(metrics, "load_lpips", returns(Lpips(None, no_torchvision)))
    assert find_lpips() == ("broken", no_torchvision)
    monkeypatch.setattr(metrics, "load_lpips", returns(Lpips(object(), None)))
    assert find_lpips() == ("ok", f"with AlexNet weights {LPIPS_BACKBONE}")


# -- export and devices -----------------------------------------------------------------------------


def test_onnxruntime_under_another_distribution_name(monkeypatch, installed):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    module(
        monkeypatch,
        "onnxruntime",
        __version__="1.99",
        get_available_providers=returns(providers),
    )
    assert find_onnxruntime()[0] == "absent"
    installed.add("onnxruntime")

    def unknown(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", unknown)
    assert find_onnxruntime() == ("ok", "1.99, providers: CUDA, CPU")


def test_coremltools(monkeypatch, installed):
    monkeypatch.setattr(doctor, "child_says", returns(("ok", "9.0")))
    assert doctor.find_coremltools()[0] == "absent"
    installed.add("coremltools")
    monkeypatch.setattr(sys, "platform", "linux")
    found = doctor.find_coremltools()
    assert found == ("ok", "coremltools 9.0 converts (predicting takes macOS)")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor.find_coremltools() == ("ok", "coremltools 9.0 converts and predicts")
    failure = ("broken", "ImportError: no libmilstoragepython")
    monkeypatch.setattr(doctor, "child_says", returns(failure))
    assert doctor.find_coremltools() == failure


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("print('noise'); print('9.0')", ("ok", "9.0")),
        ("pass", ("ok", "no message")),
        ("import sys; print('noise', file=sys.stderr); print('9.0')", ("ok", "9.0")),
        ("import no_such_module", ("broken", "ModuleNotFoundError: No module named ")),
        ("import os; os.abort()", ("broken", f"its process died of {signal.SIGABRT.name}")),
    ],
)
def test_what_another_python_says(code, found):
    state, said = child_says(code)
    assert (state, said[: len(found[1])]) == found


def test_another_python_that_hangs_is_ended():
    assert child_says("import time; time.sleep(60)", 0.5) == ("broken", "no answer within 0 s")


def test_another_python_does_not_import_from_the_working_folder(monkeypatch, tmp_path):
    (tmp_path / "stowaway.py").write_text("print('here')")
    monkeypatch.chdir(tmp_path)
    assert child_says("import stowaway")[0] == "broken"


PHONES = (AttachedPhone("A1", "device", "Pixel_9"), AttachedPhone("B2", "device"))
LOCKED = AttachedPhone("C3", "unauthorized")
NO_PHONE = AdbProbe(
    binary=Path("adb"),
    version="36.0.0",
    server_running=False,
    phones=(),
    usb_debugging_devices=0,
    problem="no adb server is running",
)


@pytest.mark.parametrize(
    ("probe", "found"),
    [
        (NO_PHONE, ("absent", "adb 36.0.0; no adb server is running")),
        (
            replace(NO_PHONE, binary=None, version=None, problem="there is no adb program"),
            ("absent", "no adb; there is no adb program"),
        ),
        (
            replace(NO_PHONE, usb_debugging_devices=1, problem="1 USB device offers debugging"),
            ("broken", "adb 36.0.0; 1 USB device offers debugging"),
        ),
        (
            replace(NO_PHONE, phones=(LOCKED,), problem="C3 is unauthorized"),
            ("broken", "adb 36.0.0; C3 is unauthorized"),
        ),
        (
            replace(NO_PHONE, version=None, phones=(*PHONES, LOCKED), problem=None),
            ("ok", "Pixel_9 (A1), phone (B2); adb of unknown version"),
        ),
    ],
)
def test_phones(monkeypatch, probe, found):
    monkeypatch.setattr(adb_server, "probe_adb", returns(probe))
    assert find_phone() == found


def test_the_compiler_for_phones(monkeypatch):
    monkeypatch.setattr(compiler, "ndk_clang", returns(None))
    monkeypatch.setattr(compiler, "zig_command", returns(None))
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    assert find_phone_compiler()[0] == "absent"
    monkeypatch.setenv("ANDROID_NDK_HOME", "old-ndk")
    found = find_phone_compiler()
    assert found == ("broken", "ANDROID_NDK_HOME=old-ndk holds no clang for arm64")
    monkeypatch.setattr(compiler, "zig_command", returns(["zig", "cc"]))
    monkeypatch.setattr(doctor.metadata, "version", {"ziglang": "0.14.1"}.__getitem__)
    assert find_phone_compiler() == ("ok", "zig 0.14.1")
    monkeypatch.setattr(compiler, "ndk_clang", returns(Path("ndk/clang")))
    assert find_phone_compiler() == ("ok", "the NDK's ndk/clang")


def test_node(monkeypatch):
    monkeypatch.setattr("shutil.which", returns(None))
    assert find_node() == ("absent", "not installed")
    monkeypatch.setattr("shutil.which", lambda name: f"bin/{name}")
    done = subprocess.CompletedProcess(["bin/node"], 0, stdout="v20.1.0\n")
    monkeypatch.setattr(subprocess, "run", returns(done))
    assert find_node() == ("ok", "v20.1.0")
    done.returncode, done.stdout = 127, ""
    assert find_node() == ("broken", "bin/node says nothing")


# -- packages ---------------------------------------------------------------------------------------


def test_a_package(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    name = "package_of_the_doctors_test"
    assert find_package(name) == ("absent", f"not installed: pip install {name}")
    (tmp_path / f"{name}.py").write_text("__version__ = '3.1'")
    assert find_package(name) == ("ok", "3.1")
    (tmp_path / f"{name}_broken.py").write_text("raise OSError('no libcuda.so')")
    found = Probe("package", lambda: find_package(f"{name}_broken"), "much").finding()
    assert found == Finding("package", "broken", "OSError: no libcuda.so", "much")
