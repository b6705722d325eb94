"""The C runner, compiled for this machine and compared with Python's ONNX Runtime; runner packages."""

import dataclasses
import importlib.util
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from small_graphs import write_graph

from device.host import HostTarget
from device.onnx_inputs import fixed_inputs
from device.operator_profile import read_profile
from device.runner import compiler
from device.runner.compiler import SOURCE, compile_runner, zig_command
from device.runner.package import PhoneRuntime, RunnerPackage, runner_package
from device.runner_protocol import (
    RunnerReport,
    Schedule,
    parse_report,
    read_outputs,
    runner_arguments,
    write_inputs,
)
from lightfield.errors import DeviceError

LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
HOST_COMPILER = [cc] if (cc := shutil.which("cc")) else zig_command()

needs_host_compiler = pytest.mark.skipif(
    HOST_COMPILER is None or LIBRARY is None,
    reason="needs a C compiler (gcc, clang or ziglang) and an onnxruntime wheel for Linux",
)
needs_zig = pytest.mark.skipif(zig_command() is None, reason="needs the ziglang package")
AARCH64, ELF_MACHINE = 183, 18


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> list[str]:
    """The command line of the C runner, without its arguments."""
    program = tmp_path_factory.mktemp("runner") / "nelf_runner"
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    source = str(SOURCE / "nelf_runner.c")
    assert HOST_COMPILER
    subprocess.run([*HOST_COMPILER, *flags, source, "-ldl", "-o", str(program)], check=True)
    return [str(program), "--library", str(LIBRARY)]


def run(
    runner: list[str],
    graphs: list[Path],
    folder: Path,
    *,
    outputs: bool = False,
    runs: int = 3,
    limit_seconds: int = 60,
    **asked,
) -> RunnerReport:
    jobs = []
    for index, graph in enumerate(graphs):
        inputs, results = folder / f"in{index}", folder / f"out{index}"
        write_inputs(inputs, list(fixed_inputs(graph).values()))
        results.mkdir(exist_ok=True)
        jobs.append((str(graph), str(inputs), str(results) if outputs else None))
    schedule = Schedule(1, warmup=1, runs=runs, limit_seconds=limit_seconds, **asked)
    prefix = str(schedule.profile.with_suffix("")) if schedule.profile else None
    words = runner_arguments(jobs, schedule, profile_prefix=prefix)
    done = subprocess.run([*runner, *words], capture_output=True, text=True, check=False)
    where = ", ".join(graph.name for graph in graphs)
    return parse_report(
        done.returncode,
        done.stdout,
        done.stderr,
        where=where,
        schedule=schedule,
        models=len(graphs),
    )


@needs_host_compiler
def test_the_c_runner_computes_what_python_computes(runner, tmp_path):
    graph = write_graph(tmp_path / 'a "quoted" $(name).onnx', width=16, layers=3)
    report = run(runner, [graph], tmp_path, outputs=True)
    outputs = read_outputs(tmp_path / "out0", report.models[0].outputs)
    expected = HostTarget().run(graph, fixed_inputs(graph))
    assert np.ptp(expected["output"]) > 0.5
    # the wheel's two builds of the same code may differ in rounding
    np.testing.assert_allclose(outputs["output"], expected["output"], atol=1e-5)
    assert report.runtime == onnxruntime.__version__


@needs_host_compiler
def test_the_c_runner_lasts_and_reads_the_watched_files(runner, tmp_path):
    graph = write_graph(tmp_path / "g.onnx")
    (tmp_path / "clock").write_text("1800000\n")
    (tmp_path / "words").write_text("no number\n")
    files = tuple(str(tmp_path / name) for name in ("clock", "words", "nowhere"))
    report = run(runner, [graph, graph], tmp_path, runs=2, seconds=1, watch=files)
    first, second = report.models
    assert len(first.wall_ms) == len(second.wall_ms) > 300  # more than one growth of its arrays
    assert first.at_ms[-1] < 1000 <= first.at_ms[-1] + first.wall_ms[-1] + second.wall_ms[-1] + 1
    assert all(a < b for a, b in zip(first.at_ms, second.at_ms, strict=True))
    assert [row[1:] for row in report.watched] == [(1_800_000, -1, -1)] * len(report.watched)
    assert 3 <= len(report.watched) <= 5  # at the beginning, every half second, at the end


@needs_host_compiler
def test_the_c_runner_traces_one_graph(runner, tmp_path):
    graph = write_graph(tmp_path / "g.onnx")
    report = run(runner, [graph], tmp_path, profile=tmp_path / "trace.json")
    assert report.profile is not None
    nodes = read_profile(Path(report.profile), 3)
    assert "Conv" in {node.operator for node in nodes}
    assert set(report.providers) == set(onnxruntime.get_available_providers())
    with pytest.raises(DeviceError, match="exit code 2"):  # a profile belongs to one graph
        run(runner, [graph, graph], tmp_path, profile=tmp_path / "trace.json")


@needs_host_compiler
@pytest.mark.parametrize("provider", ["xnnpack", "nnapi", "qnn"])
def test_the_c_runner_names_a_missing_provider(runner, tmp_path, provider):
    graph = write_graph(tmp_path / "g.onnx")
    options = (("intra_op_num_threads", "1"), ("flags", "1"))
    with pytest.raises(DeviceError, match=f"add the provider {provider}"):
        run(runner, [graph], tmp_path, provider=provider, options=options)


@needs_host_compiler
def test_the_c_runner_supports_every_element_type(runner, tmp_path):
    elements = [getattr(TensorProto, name) for name in ("FLOAT16", "DOUBLE", "INT8", "UINT8")]
    elements += [TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL]
    values = [helper.make_tensor_value_info(f"x{e}", e, [2, 3]) for e in elements]
    outs = [helper.make_tensor_value_info(f'"y\\{e}', e, [2, 3]) for e in elements]
    nodes = [helper.make_node("Identity", [f"x{e}"], [f'"y\\{e}']) for e in elements]
    graph = helper.make_graph(nodes, "identities", values, outs)
    path = tmp_path / "types.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    report = run(runner, [path], tmp_path, outputs=True)
    outputs = read_outputs(tmp_path / "out0", report.models[0].outputs)
    for element, value in zip(elements, fixed_inputs(path).values(), strict=True):
        result = outputs[f'"y\\{element}']
        assert result.dtype == value.dtype
        assert np.array_equal(result, value)


@needs_host_compiler
def test_the_c_runner_interleaves_the_graphs(runner, tmp_path):
    small = write_graph(tmp_path / "small.onnx", width=32, layers=2, pixels=16)
    large = write_graph(tmp_path / "large.onnx", width=32, layers=32, pixels=16)
    report = run(runner, [small, large], tmp_path, runs=15)
    costs = [float(np.median(model.cpu_ms)) for model in report.models]
    assert costs[1] > 4 * costs[0]
    assert all(wall > 0 for model in report.models for wall in model.wall_ms)
    assert report.growth_bytes
    assert report.growth_bytes > 100_000


@needs_host_compiler
def test_the_c_runner_passes_the_hello_check(runner, tmp_path):
    assert run(runner, [], tmp_path).models == ()


@needs_host_compiler
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda graph, folder: graph.write_bytes(b"broken"), "failed to load the graph"),
        (lambda graph, folder: graph.unlink(), "failed to load the graph"),
        (lambda graph, folder: (folder / "in0/0.bin").write_bytes(b"12"), "does not have the size"),
        (lambda graph, folder: (folder / "in0/0.bin").unlink(), "failed to read an input"),
    ],
)
def test_the_c_runner_reports_errors(runner, tmp_path, damage, message, monkeypatch):
    graph = write_graph(tmp_path / "graph.onnx")
    original = subprocess.run

    def damaged_run(*arguments, **options):
        damage(graph, tmp_path)
        return original(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", damaged_run)
    with pytest.raises(DeviceError, match=rf"graph\.onnx: .*{message}"):
        run(runner, [graph], tmp_path)


@needs_host_compiler
def test_the_c_runner_refuses_an_invalid_library(runner, tmp_path):
    with pytest.raises(DeviceError, match="failed to open its library"):
        run([*runner[:2], "/nowhere/libonnxruntime.so"], [], tmp_path)


@needs_host_compiler
def test_the_c_runner_stops_at_its_time_limit(runner, tmp_path):
    graph = write_graph(tmp_path / "slow.onnx", width=256, layers=8, pixels=64)
    with pytest.raises(DeviceError, match="time limit"):
        run(runner, [graph], tmp_path, runs=100_000, limit_seconds=1)


def elf_interpreter(program: Path) -> str:
    """The loader of an arm64 ELF file; checks that its segments are aligned to pages of 16 KB."""
    data = program.read_bytes()
    assert struct.unpack_from("<H", data, ELF_MACHINE)[0] == AARCH64
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    loader = ""
    for header in range(offset, offset + size * count, size):
        kind, _, start, _, _, length, _, align = struct.unpack_from("<IIQQQQQQ", data, header)
        if kind == 1:  # PT_LOAD
            assert align % 16384 == 0
        if kind == 3:  # PT_INTERP
            loader = data[start : start + length].rstrip(b"\0").decode()
    return loader


@needs_zig
def test_zig_compiles_both_builds(tmp_path, monkeypatch):
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    monkeypatch.delenv("ANDROID_NDK_ROOT", raising=False)
    for form, loader in {
        "bionic": "/system/bin/linker64",
        "glibc": "/lib/ld-linux-aarch64.so.1",
    }.items():
        program = tmp_path / form
        compile_runner(form, program, tmp_path)
        assert elf_interpreter(program) == loader


def test_every_compiler_aligns_to_16_kb(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(compiler, "_call", calls.append)
    monkeypatch.setattr(compiler, "zig_command", lambda: None)
    monkeypatch.setattr(compiler, "ndk_clang", lambda: Path("/ndk/clang"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for form in ("bionic", "glibc"):
        compile_runner(form, tmp_path / form, tmp_path)
    assert [call[0] for call in calls] == ["/ndk/clang", "/usr/bin/aarch64-linux-gnu-gcc"]
    assert all("-Wl,-z,max-page-size=16384" in call for call in calls)


def elf(machine: int) -> bytes:
    return b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", machine) + b"library"


@pytest.fixture
def stocked(tmp_path, monkeypatch) -> PhoneRuntime:
    """All inputs of a package, with fakes of the compiler and the libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def compiled(form, output, scratch):
        output.write_bytes(f"runner {form}".encode())

    monkeypatch.setattr("device.runner.package.compile_runner", compiled)
    glibc = tmp_path / "glibc"
    glibc.mkdir()
    for name in ("ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libdl.so.2"):
        (glibc / name).write_bytes(b"library")
    for name in ("libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"):
        (glibc / name).write_bytes(b"library")
    members = {
        "aar": "jni/arm64-v8a/libonnxruntime.so",
        "whl": "onnxruntime/capi/libonnxruntime.so.1",
    }
    for suffix, member in members.items():
        with zipfile.ZipFile(tmp_path / f"ort.{suffix}", "w") as archive:
            archive.writestr(member, elf(AARCH64))
            archive.writestr("../../escaped", b"never unpacked")
    return PhoneRuntime(aar=tmp_path / "ort.aar", wheel=tmp_path / "ort.whl", glibc=glibc)


def test_an_aar_makes_a_bionic_package(stocked):
    package = runner_package(stocked)
    assert package.build == "bionic"
    assert package.files["nelf_runner"].read_text() == "runner bionic"
    assert package.files["libonnxruntime.so"].read_bytes() == elf(AARCH64)
    assert package.command("/d") == ["/d/nelf_runner", "--library", "/d/libonnxruntime.so"]


def test_a_wheel_makes_a_glibc_package(stocked):
    package = runner_package(PhoneRuntime(wheel=stocked.wheel, glibc=stocked.glibc))
    assert package.build == "glibc"
    assert len(package.files) == 10
    start = ["/d/ld-linux-aarch64.so.1", "--library-path", "/d", "/d/nelf_runner"]
    assert package.command("/d")[:4] == start


def test_a_downloaded_aar_makes_a_bionic_package(stocked, monkeypatch):
    asked = []

    def fetched(cache, repository, name, version, sha256):
        asked.append((repository, name, version, sha256))
        return stocked.aar

    monkeypatch.setattr("device.runner.package.fetched_aar", fetched)
    runtime = PhoneRuntime(repository="https://x/maven2", version="1.22.0", aar_sha256="ab")
    assert runner_package(runtime).build == "bionic"
    assert runner_package(runtime, provider="qnn").build == "bionic"
    names = ["onnxruntime-android", "onnxruntime-android-qnn"]
    assert asked == [("https://x/maven2", name, "1.22.0", "ab") for name in names]


def test_additional_libraries_are_part_of_the_package(stocked, tmp_path):
    folder = tmp_path / "qnn"
    folder.mkdir()
    runtime = dataclasses.replace(stocked, libraries=folder)
    with pytest.raises(DeviceError, match="contains no library"):
        runner_package(runtime, provider="qnn")
    (folder / "libQnnHtp.so").write_bytes(b"library")
    (folder / "notes.txt").write_text("not sent")
    package = runner_package(runtime, provider="qnn")
    assert sorted(package.files) == ["libQnnHtp.so", "libonnxruntime.so", "nelf_runner"]
    assert package.command("/d")[:3] == ["env", "LD_LIBRARY_PATH=/d", "ADSP_LIBRARY_PATH=/d"]
    assert package.hashes().keys() == {"nelf_runner", "libonnxruntime.so"}


def test_the_glibc_build_has_only_the_cpu_provider(stocked):
    runtime = PhoneRuntime(wheel=stocked.wheel, glibc=stocked.glibc)
    for provider in ("xnnpack", "nnapi", "qnn"):
        with pytest.raises(DeviceError, match=f"{provider}; pass an"):
            runner_package(runtime, provider=provider)


def test_a_package_is_built_once(stocked, monkeypatch):
    first = runner_package(stocked)
    monkeypatch.setattr("device.runner.package.compile_runner", lambda *a: pytest.fail("again"))
    assert runner_package(stocked) == first


def test_the_error_of_a_missing_c_library_says_what_to_install(stocked):
    assert stocked.glibc is not None
    (stocked.glibc / "libm.so.6").unlink()
    with pytest.raises(DeviceError, match=r"libm\.so\.6 are not in .*apt install libstdc"):
        runner_package(PhoneRuntime(wheel=stocked.wheel, glibc=stocked.glibc))


def test_the_error_of_a_missing_compiler_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "zig_command", lambda: None)
    monkeypatch.setattr(compiler, "ndk_clang", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for form in ("bionic", "glibc"):
        with pytest.raises(DeviceError, match=r"pip install ziglang.*ANDROID_NDK_HOME"):
            compile_runner(form, tmp_path / "out", tmp_path)


def test_a_failing_compiler_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "clang"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "ndk_clang", lambda: broken)
    with pytest.raises(DeviceError, match=r"does not compile .*no such thing"):
        compile_runner("bionic", tmp_path / "out", tmp_path)


def test_without_pip_the_wheel_must_be_given(stocked, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pip" else find_spec(n))
    with pytest.raises(DeviceError, match="has no pip; pass the aarch64 Linux wheel"):
        runner_package(PhoneRuntime(glibc=stocked.glibc))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jni/x86_64/libonnxruntime.so": elf(62)}, "contains no arm64"),
        ({"jni/arm64-v8a/libonnxruntime.so": elf(62)}, "not for 64-bit Arm"),
        ({"jni/arm64-v8a/libonnxruntime.so": b""}, "not for 64-bit Arm"),
        (None, "cannot be unpacked"),
    ],
)
def test_another_archive_is_refused(stocked, tmp_path, members, message):
    path = tmp_path / "other.aar"
    if members is None:
        path.write_bytes(b"no archive")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    with pytest.raises(DeviceError, match=rf"other\.aar: .*{message}"):
        runner_package(PhoneRuntime(aar=path))
    with pytest.raises(DeviceError, match=r"none\.aar: file is missing"):
        runner_package(PhoneRuntime(aar=tmp_path / "none.aar"))


@needs_host_compiler
def test_the_c_runner_runs_on_the_fake_phone(runner, fake, tmp_path):
    from device.adb import AdbPhone
    from device.phone import PhoneTarget

    assert LIBRARY is not None
    files = {"nelf_runner": Path(runner[0]), "libonnxruntime.so": LIBRARY}
    graph = write_graph(tmp_path / "graph.onnx")
    with PhoneTarget(AdbPhone(fake, fake.serial), RunnerPackage("bionic", files)) as target:
        outputs = target.run(graph, fixed_inputs(graph))
        record = target.measure(graph, runs=3)
    expected = HostTarget().run(graph, fixed_inputs(graph))
    np.testing.assert_allclose(outputs["output"], expected["output"], atol=1e-5)
    assert record.device.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert fake.files() == []
