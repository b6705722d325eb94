"""Runner package: the files that are pushed to a phone to run graphs there.

A package contains the runner and ONNX Runtime, in one of two builds:

    bionic   uses Android's C library. ONNX Runtime is the library that apps use, from an
             onnxruntime-android AAR, which is given by its path or downloaded from a Maven repository.
    glibc    uses the C library of a Linux system for arm64, which is part of the package. ONNX Runtime
             comes from the aarch64 Linux wheel of onnxruntime. The package's own loader starts the
             runner, so it does not use the phone's libraries.

Runners and libraries are built once into the cache folder ($XDG_CACHE_HOME/nelf or ~/.cache/nelf), under
names that contain a hash of their sources.
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

from device.runner.compiler import SOURCE, SOURCE_FILES, RunnerBuild, compile_runner, ndk_clang
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
    """Source of the ONNX Runtime library that runs on the phone."""

    aar: Path | None = None
    """Path of an onnxruntime-android AAR (published at Maven Central), which contains the library that
    Android apps use. For the provider qnn, an onnxruntime-android-qnn AAR."""
    repository: str | None = None
    """Address of a Maven repository, such as Maven Central. The AAR is downloaded from there and
    verified if --phone.aar is not given."""
    version: str | None = None
    """Version of the AAR to download; by default, the version of ONNX Runtime on this machine."""
    aar_sha256: str | None = None
    """SHA-256 that the downloaded AAR must have; by default, the digest in the repository."""
    libraries: Path | None = None
    """Folder of additional libraries that an execution provider loads on the phone. The provider qnn
    needs libQnnHtp.so and the other libraries of Qualcomm's runtime."""
    wheel: Path | None = None
    """Path of an aarch64 Linux wheel of onnxruntime, for use without an AAR; by default, pip downloads
    it."""
    glibc: Path | None = None
    """Folder with `ld-linux-aarch64.so.1` and the C library for arm64, for use without an AAR; by
    default, the usual folders are searched."""


@dataclass(frozen=True)
class RunnerPackage:
    """Files to push into one folder of a phone, and the command that starts the runner there."""

    build: RunnerBuild
    files: dict[str, Path]
    """Name in the phone's folder -> file on this machine."""
    opens_libraries: bool = False
    """Whether an execution provider loads additional libraries from the folder."""

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the runner and of ONNX Runtime."""
        return {name: sha256_of(self.files[name]) for name in ("nelf_runner", "libonnxruntime.so")}

    def command(self, folder: str) -> list[str]:
        """The start of the command line, without the runner's arguments, for files in `folder`."""
        runner = [f"{folder}/nelf_runner", "--library", f"{folder}/libonnxruntime.so"]
        if self.build == "bionic" and self.opens_libraries:
            # a Hexagon processor loads its libraries from ADSP_LIBRARY_PATH
            return ["env", f"LD_LIBRARY_PATH={folder}", f"ADSP_LIBRARY_PATH={folder}", *runner]
        if self.build == "bionic":
            return runner
        return [f"{folder}/{_LOADER}", "--library-path", folder, *runner]


def cache_folder() -> Path:
    """Folder of built and downloaded files."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nelf"


def runner_package(runtime: PhoneRuntime, *, provider: Provider = "cpu") -> RunnerPackage:
    """Build the package, or take its files from the cache.

    With an AAR (given or downloaded) the build is bionic. Without an AAR it is glibc, which supports the
    CPU provider only.

    Raises:
        DeviceError: when a compiler, ONNX Runtime or the C library is missing; the error says how to
            get it.
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
            return RunnerPackage("bionic", files)
        return RunnerPackage("bionic", {**_other_libraries(runtime.libraries), **files}, True)
    if provider != "cpu":
        raise DeviceError(
            f"the Linux build of ONNX Runtime does not have the provider {provider}",
            where="phone",
            remedy="pass an onnxruntime-android AAR with --phone.aar, or the address of a Maven "
            "repository that has the AAR with --phone.repository",
        )
    glibc = _glibc_files(runtime.glibc)
    runner = _runner("glibc")
    wheel = runtime.wheel or _downloaded_wheel()
    library = _library(wheel, r"onnxruntime/capi/libonnxruntime\.so(\.\d+)*")
    return RunnerPackage("glibc", {"nelf_runner": runner, "libonnxruntime.so": library, **glibc})


def _other_libraries(folder: Path) -> dict[str, Path]:
    libraries = {path.name: path for path in sorted(folder.glob("*.so")) if path.is_file()}
    if not libraries:
        raise DeviceError("the folder contains no library (*.so)", where=folder)
    return libraries


def _runner(build: RunnerBuild) -> Path:
    sources = {name: sha256_of(SOURCE / name) for name in SOURCE_FILES}
    made_of = fingerprint([sources, str(ndk_clang())])[:16]
    path = cache_folder() / f"nelf_runner-{build}-{made_of}"
    if not path.exists():
        with atomic_path(path) as temporary, scratch_folder("compile") as place:
            compile_runner(build, temporary, place)
    return path


def _library(archive: Path, member: str) -> Path:
    """Unpack the archive's library whose name matches `member` into the cache."""
    try:
        path = cache_folder() / f"libonnxruntime-{sha256_of(archive)[:16]}.so"
        if path.exists():
            return path
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if re.fullmatch(member, name)]
            if not names:
                raise DeviceError("the archive contains no arm64 libonnxruntime.so", where=archive)
            with zipped.open(names[0]) as source, atomic_path(path) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)
                _require_arm64(temporary, archive)
    except FileNotFoundError:
        raise DeviceError("file is missing", where=archive) from None
    except (OSError, zipfile.BadZipFile) as reason:
        raise DeviceError(f"the archive cannot be unpacked ({reason})", where=archive) from reason
    return path


def _require_arm64(library: Path, archive: Path) -> None:
    with library.open("rb") as file:
        header = file.read(20)
    # ELF, 64-bit, little-endian, e_machine 183 (EM_AARCH64)
    if header[:6] != b"\x7fELF\x02\x01" or int.from_bytes(header[18:20], "little") != 183:
        raise DeviceError(
            "the libonnxruntime.so in this archive is not for 64-bit Arm",
            where=archive,
            remedy="pass the archive for arm64",
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
            f"the arm64 libraries {', '.join(missing)} are not in {', '.join(map(str, folders))}",
            where="phone",
            remedy="pass an onnxruntime-android AAR with --phone.aar, or install the arm64 C library "
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
        raise DeviceError("pip did not download an aarch64 wheel", where=folder)
    return wheels[0]


def _download_wheel(version: str, folder: Path) -> None:
    remedy = (
        f"pass the aarch64 Linux wheel of onnxruntime {version} with --phone.wheel, or an "
        "onnxruntime-android AAR with --phone.aar"
    )
    if importlib.util.find_spec("pip") is None:
        raise DeviceError(
            "the wheel cannot be downloaded, because this Python has no pip",
            where="onnxruntime",
            remedy=remedy,
        )
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
                f"pip cannot download the phone's library ({lines[-1].strip()})",
                where="onnxruntime",
                remedy=remedy,
            )
        for wheel in Path(name).glob("*.whl"):
            wheel.replace(folder / wheel.name)
