"""Remedies for a runner that does not start on a phone, chosen by the phone's error message."""

from __future__ import annotations

import re

from device.adb import TEMPORARY_FOLDER
from device.adb_output import mount_options
from device.runner.compiler import RunnerBuild

_OTHER_AAR = "use an onnxruntime-android AAR of another version"
# The first pattern that matches the phone's message gives the remedy.
_REMEDIES = (
    (r"page size|alignment|page-aligned",
     "the phone has memory pages of 16 KB: use a newer onnxruntime-android AAR"),
    (r"cannot locate symbol", "the AAR is for a newer Android: use an older onnxruntime-android AAR"),
    (r"library \S+ not found",
     f"pass the folder of the missing library with --phone.libraries, or {_OTHER_AAR}"),
    (r"older than ONNX Runtime", "use a newer onnxruntime-android AAR"),
    (r"not executable|Exec format|e_machine|instead of (32|64)-bit",
     "the phone does not run programs for 64-bit Arm: measure on another phone"),
    (r"No space left|Cannot allocate|out of memory|bad_alloc|SIGKILL",
     "the phone lacks memory or storage: close other apps and free storage"),
    (r"SIGILL", f"the processor lacks instructions that this ONNX Runtime uses: {_OTHER_AAR}"),
    (r"Text file busy|time limit", "the phone is busy: wait until it is idle, then measure again"),
)  # fmt: skip
_GENERAL = {
    "glibc": "use Android's own library from an onnxruntime-android AAR (--phone.aar)",
    "bionic": "check that the AAR supports this version of Android",
}


def start_remedy(message: str, build: RunnerBuild, mounts: str) -> str:
    """The remedy for a runner that does not start.

    Args:
        message: how the runner ended, with the phone's error message.
        build: build of the runner.
        mounts: the phone's /proc/mounts; empty if it cannot be read.
    """
    # `taskset` starts the runner, so its name is also part of messages about the runner
    started_by_taskset = re.search(r"taskset: (failed to )?exec(ute)?\b", message)
    if "taskset" in message and not started_by_taskset:
        return (
            "`taskset`, which pins the runner to the fast cores, is missing or not allowed (the cores "
            "may be switched off): wake the phone, then try again"
        )
    if re.search("Permission denied|Operation not permitted", message):
        return _not_allowed(mounts)
    if "SIGSYS" in message:
        what = "the phone's filter of system calls blocks a system call of the runner"
        return f"{what}: {_GENERAL['glibc'] if build == 'glibc' else _OTHER_AAR}"
    remedy = next((text for pattern, text in _REMEDIES if re.search(pattern, message)), None)
    if remedy is None and re.search(r"exit code 126\b", message):
        return _not_allowed(mounts)
    return remedy or _GENERAL[build]


def _not_allowed(mounts: str) -> str:
    """The remedy for a phone that does not allow pushed programs to run."""
    if "noexec" in mount_options(mounts, TEMPORARY_FOLDER):
        why = "is mounted noexec"
    else:
        why = "does not allow programs, because of noexec or a policy (SELinux, a managed phone)"
    return f"{TEMPORARY_FOLDER} {why}: measure on another phone"
