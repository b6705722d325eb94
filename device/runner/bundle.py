"""What travels to a phone: the runner, ONNX Runtime, and in the glibc form the C library.

    bionic   from an onnxruntime-android AAR: the library as apps use it, our runner linked to Android;
             the AAR is given by its path, or fetched from a Maven repository
    glibc    from the aarch64 Linux wheel of onnxruntime, with arm64 libraries of a Linux system; the
             runner is started by their loader, so nothing of it touches the phone's own libraries

Bundles are built once into the cache folder ($XDG_CACHE_HOME/nelf or ~/.cache/nelf), under a name made
of everything that goes in.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from device.runner.compiler import SOURCE, SOURCE_FILES, RunnerForm, compile_runner, ndk_clang
from device.runner.maven import fetched_aar
from device.runner_protocol import Provider
from lightfield.errors import DeviceError
from lightfield.files import atomic_path, fingerprint, sha256_of
from lightfield.scratch import scratch_folder

_LOADER = "ld-linux-aarch64.so.1"
_GLIBC_FILES = (
    _LOADER,
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
    "libstdc++.so.6",
)
_GLIBC_FOLDERS = (
    "/usr/aarch64-linux-gnu/lib",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
)


@dataclass(frozen=True)
class PhoneRuntime:
    """Where the phone's ONNX Runtime comes from."""

    aar: Path | None = None
    """onnxruntime-android AAR (from Maven Central); the library as Android apps use it. With the
    provider qnn an onnxruntime-android-qnn AAR."""
    repository: str | None = None
    """Address of a Maven repository, such as Maven Central's, from which the AAR is fetched and checked
    when no path is given."""
    version: str | None = None
    """Version of the AAR that is fetched; by default that of ONNX Runtime on this machine."""
    aar_sha256: str | None = None
    """What the fetched AAR must be, instead of what the repository says."""
    libraries: Path | None = None
    """Folder of further libraries that a provider opens on the phone: for qnn those of Qualcomm's
    runtime, libQnnHtp.so and its companions."""
    wheel: Path | None = None
    """aarch64 Linux wheel of onnxruntime; fetched with pip when neither it nor an AAR is given."""
    glibc: Path | None = None
    """Folder with arm64 `ld-linux-aarch64.so.1` and its libraries; searched in the usual places."""


@dataclass(frozen=True)
class RunnerBundle:
    """Files to push into one folder, and how to start the runner there."""

    form: RunnerForm
    files: dict[str, Path]
    """Name in the phone's folder -> file here."""
    opens_libraries: bool = False
    """Whether a provider will look for further libraries among the files."""

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the runner and of ONNX Runtime."""
        return {name: sha256_of(self.files[name]) for name in ("nelf_runner", "libonnxruntime.so")}

    def command(self, folder: str) -> list[str]:
        """The command line up to the runner's arguments, for files pushed into `folder`."""
        runner = [f"{folder}/nelf_runner", "--library", f"{folder}/libonnxruntime.so"]
        if self.form == "bionic" and self.opens_libraries:
            # the second is where a Hexagon processor's own libraries are looked for
            return ["env", f"LD_LIBRARY_PATH={folder}", f"ADSP_LIBRARY_PATH={folder}", *runner]
        if self.form == "bionic":
            return runner
        return [f"{folder}/{_LOADER}", "--library-path", folder, *runner]


def cache_folder() -> Path:
    """Where built and downloaded things are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nelf"


def runner_bundle(runtime: PhoneRuntime, *, provider: Provider = "cpu") -> RunnerBundle:
    """Build what the phone needs, or take it from the cache.

    An AAR that is given or can be fetched makes the bionic form; without one the wheel makes the glibc
    form, which has the CPU provider only.

    Raises:
        DeviceError: when a compiler, the library or the C library is missing, saying how to get it.
    """
    aar = runtime.aar or fetched_aar(
        cache_folder(),
        runtime.repository,
        f"onnxruntime-android{'-qnn' if provider == 'qnn' else ''}",
        runtime.version or metadata.version("onnxruntime"),
        runtime.aar_sha256,
    )
    if aar is not None:
        library = _library(aar, r"jni/arm64-v8a/libonnxruntime\.so")
        files = {"nelf_runner": _runner("bionic"), "libonnxruntime.so": library}
        if runtime.libraries is None:
            return RunnerBundle("bionic", files)
        return RunnerBundle("bionic", {**_other_libraries(runtime.libraries), **files}, True)
    if provider != "cpu":
        raise DeviceError(
            f"the provider {provider} is not in the Linux library",
            where="phone",
            remedy="pass an onnxruntime-android AAR, or the address of a Maven repository that has it",
        )
    glibc = _glibc_files(runtime.glibc)
    runner = _runner("glibc")
    wheel = runtime.wheel or _downloaded_wheel()
    library = _library(wheel, r"onnxruntime/capi/libonnxruntime\.so(\.\d+)*")
    return RunnerBundle("glibc", {"nelf_runner": runner, "libonnxruntime.so": library, **glibc})


def _other_libraries(folder: Path) -> dict[str, Path]:
    libraries = {path.name: path for path in sorted(folder.glob("*.so")) if path.is_file()}
    if not libraries:
        raise DeviceError("holds no library (*.so)", where=folder)
    return libraries


def _runner(form: RunnerForm) -> Path:
    sources = {name: sha256_of(SOURCE / name) for name in SOURCE_FILES}
    made_of = fingerprint([sources, str(ndk_clang())])[:16]
    path = cache_folder() / f"nelf_runner-{form}-{made_of}"
    if not path.exists():
        with atomic_path(path) as temporary, scratch_folder("compile") as place:
            compile_runner(form, temporary, place)
    return path


def _library(archive: Path, member: str) -> Path:
    """The archive's one member of this name, unpacked into the cache."""
    try:
        path = cache_folder() / f"libonnxruntime-{sha256_of(archive)[:16]}.so"
        if path.exists():
            return path
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if re.fullmatch(member, name)]
            if not names:
                raise DeviceError("holds no arm64 libonnxruntime.so", where=archive)
            with zipped.open(names[0]) as source, atomic_path(path) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)
                _require_arm64(temporary, archive)
    except FileNotFoundError:
        raise DeviceError("file is missing", where=archive) from None
    except (OSError, zipfile.BadZipFile) as reason:
        raise DeviceError(f"cannot be unpacked ({reason})", where=archive) from reason
    return path


def _require_arm64(library: Path, archive: Path) -> None:
    with library.open("rb") as file:
        header = file.read(20)
    # ELF, 64-bit, little-endian, e_machine 183 (EM_AARCH64)
    if header[:6] != b"\x7fELF\x02\x01" or int.from_bytes(header[18:20], "little") != 183:
        raise DeviceError(
            "its libonnxruntime.so is not for 64-bit Arm",
            where=archive,
            remedy="pass the arm64 one",
        )


def _glibc_files(folder: Path | None) -> dict[str, Path]:
    folders = [folder] if folder is not None else [Path(name) for name in _GLIBC_FOLDERS]
    found = {
        name: next((f / name for f in folders if (f / name).exists()), None)
        for name in _GLIBC_FILES
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DeviceError(
            f"arm64 {', '.join(missing)} not found in {', '.join(map(str, folders))}",
            where="phone",
            remedy="pass an onnxruntime-android AAR, or install the arm64 C library "
            "(Debian, Ubuntu: `apt install libstdc++6-arm64-cross`)",
        )
    return {name: path.resolve() for name, path in found.items() if path is not None}


def _downloaded_wheel() -> Path:
    version = metadata.version("onnxruntime")
    folder = cache_folder() / f"onnxruntime-{version}-aarch64"
    wheels = sorted(folder.glob("onnxruntime-*aarch64.whl"))
    if not wheels:
        _download_wheel(version, folder)
        wheels = sorted(folder.glob("onnxruntime-*aarch64.whl"))
    if not wheels:
        raise DeviceError("pip fetched no aarch64 wheel", where=folder)
    return wheels[0]


def _download_wheel(version: str, folder: Path) -> None:
    remedy = f"pass the aarch64 Linux wheel of onnxruntime {version}, or an onnxruntime-android AAR"
    if importlib.util.find_spec("pip") is None:
        raise DeviceError("this Python has no pip to fetch it", where="onnxruntime", remedy=remedy)
    folder.mkdir(parents=True, exist_ok=True)
    major, minor, _ = platform.python_version_tuple()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    for glibc_minor in (27, 28, 34):
        command += ["--platform", f"manylinux_2_{glibc_minor}_aarch64"]
    command += ["--python-version", f"{major}.{minor}", f"onnxruntime=={version}"]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        try:
            done = subprocess.run(
                [*command, "--dest", name],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=600,
                check=False,
            )
        except subprocess.TimeoutExpired as reason:
            raise DeviceError("pip did not finish", where="onnxruntime", remedy=remedy) from reason
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise DeviceError(
                f"pip cannot fetch the phone's library ({lines[-1].strip()})",
                where="onnxruntime",
                remedy=remedy,
            )
        for wheel in Path(name).glob("*.whl"):
            wheel.replace(folder / wheel.name)
