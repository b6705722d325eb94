"""Compilation of the runner for 64-bit Arm phones, in one of two builds.

`bionic` links against Android's C library. The compiler is the NDK's clang if ANDROID_NDK_HOME is set,
otherwise zig's clang. zig does not include Android's libraries, so the linker gets two stub libraries
that only define the names of the functions, and `bionic_start.c` replaces the NDK's entry point. `glibc`
is an ordinary Linux program whose C library is pushed with it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightfield.errors import DeviceError

RunnerBuild = Literal["bionic", "glibc"]

SOURCE = Path(__file__).parent
SOURCE_FILES = ("nelf_runner.c", "ort_functions.h", "bionic_start.c", "compiler.py")

_FLAGS = ["-O2", "-fPIE", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
# phones with memory pages of 16 KB cannot load programs aligned to 4 KB, the default of NDKs before r28
_LINK = ["-pie", "-s", "-Wl,-z,max-page-size=16384"]
_NDK_API = 24  # Android 7, the oldest version that ONNX Runtime's Android library supports
_STUB_LIBRARIES = {
    "libc": "__libc_init _exit alarm clock_gettime exit fclose fflush fgetc fgets fopen fread free "
    "fwrite memcpy memset posix_memalign printf putchar puts snprintf strcmp strlen strncmp strtol",
    "libdl": "dlerror dlopen dlsym",
}


def zig_command() -> list[str] | None:
    """The command of the C compiler in the `ziglang` package; None if it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]


def ndk_clang() -> Path | None:
    """The NDK's compiler for arm64; None if ANDROID_NDK_HOME does not contain one."""
    home = os.environ.get("ANDROID_NDK_HOME") or os.environ.get("ANDROID_NDK_ROOT")
    if not home:
        return None
    folder = Path(home) / "toolchains" / "llvm" / "prebuilt"
    return next(iter(sorted(folder.glob(f"*/bin/aarch64-linux-android{_NDK_API}-clang"))), None)


def compile_runner(build: RunnerBuild, output: Path, scratch: Path) -> None:
    """Compile the runner to `output`, with intermediate files in `scratch`.

    Raises:
        DeviceError: when there is no compiler, or the compiler fails.
    """
    clang, zig = ndk_clang(), zig_command()
    source = str(SOURCE / "nelf_runner.c")
    if build == "bionic" and clang is not None:
        _call([str(clang), *_FLAGS, *_LINK, source, "-ldl", "-o", str(output)])
    elif zig is None and build == "glibc" and (gcc := shutil.which("aarch64-linux-gnu-gcc")):
        _call([gcc, *_FLAGS, *_LINK, source, "-ldl", "-o", str(output)])
    elif zig is None:
        raise DeviceError(
            "there is no C compiler for the phone's runner",
            where="phone",
            remedy="install a compiler with `pip install ziglang`, or set ANDROID_NDK_HOME",
        )
    elif build == "bionic":
        _link_without_ndk([*zig, "-target", "aarch64-linux-musl"], output, scratch)
    else:
        target = ["-target", "aarch64-linux-gnu.2.28"]
        _call([*zig, *target, *_FLAGS, *_LINK, source, "-ldl", "-o", str(output)])


def _link_without_ndk(compiler: Sequence[str], output: Path, scratch: Path) -> None:
    # on arm64, musl's headers agree with Android's for the few types that the runner uses
    inputs = []
    for name in ("nelf_runner", "bionic_start"):
        inputs.append(str(scratch / f"{name}.o"))
        unwind = ["-fno-stack-protector", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables"]
        _call([*compiler, *_FLAGS, *unwind, "-c", str(SOURCE / f"{name}.c"), "-o", inputs[-1]])
    for name, symbols in _STUB_LIBRARIES.items():
        assembly = scratch / f"{name}.S"
        lines = [f".globl {s}\n.type {s},%function\n{s}: ret\n" for s in symbols.split()]
        assembly.write_text(".text\n" + "".join(lines))
        inputs.append(str(scratch / f"{name}.so"))
        stub = ["-shared", "-nostdlib", f"-Wl,-soname,{name}.so"]
        _call([*compiler, *stub, str(assembly), "-o", inputs[-1]])
    link = [
        "-nostdlib",
        *_LINK,
        "-Wl,--dynamic-linker=/system/bin/linker64",
        "-Wl,--hash-style=both",
    ]
    _call([*compiler, *link, *inputs, "-o", str(output)])


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise DeviceError(f"the C compiler cannot run ({reason})", where=command[0]) from reason
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise DeviceError(
            f"the phone's runner does not compile ({lines[0].strip()})", where=command[0]
        )
