"""Why the runner does not start on a phone, and what helps: from the phone's own words."""

from __future__ import annotations

import re

from device.adb import TEMPORARY_FOLDER
from device.adb_output import mount_options
from device.runner.compiler import RunnerForm

_OTHER_AAR = "use an onnxruntime-android AAR of another version"
# The first pattern that is in the phone's words says what helps.
_REMEDIES = (
    (r"page size|alignment|page-aligned",
     "the phone has pages of 16 KB: use a newer onnxruntime-android AAR"),
    (r"cannot locate symbol", "the AAR is for a newer Android: use an older onnxruntime-android AAR"),
    (r"library \S+ not found", f"pass the library with the provider's, or {_OTHER_AAR}"),
    (r"older than ONNX Runtime", "use a newer onnxruntime-android AAR"),
    (r"not executable|Exec format|e_machine|instead of (32|64)-bit",
     "the phone does not run programs for 64-bit Arm: measure on another phone"),
    (r"No space left|Cannot allocate|out of memory|bad_alloc|SIGKILL",
     "the phone lacks memory or storage: close what runs on it and make room"),
    (r"SIGILL", f"its processor lacks instructions that this ONNX Runtime uses: {_OTHER_AAR}"),
    (r"Text file busy|time limit", "the phone is busy: let it come to rest, then measure again"),
)  # fmt: skip
_GENERAL = {
    "glibc": "give it Android's own library with an onnxruntime-android AAR",
    "bionic": "check that the AAR is for this Android",
}


def start_remedy(said: str, form: RunnerForm, mounts: str) -> str:
    """What helps against a runner that does not start.

    Args:
        said: how it ended, with the phone's words.
        form: of the runner.
        mounts: the phone's /proc/mounts; empty where it cannot be read.
    """
    # `taskset` starts the runner, and so also tells of a runner that cannot be started
    started_by_taskset = re.search(r"taskset: (failed to )?exec(ute)?\b", said)
    if "taskset" in said and not started_by_taskset:
        return (
            "`taskset`, which keeps the runner on the fast cores, is missing or refused (they may be "
            "switched off): wake the phone, then try again"
        )
    if re.search("Permission denied|Operation not permitted", said):
        return _not_allowed(mounts)
    if "SIGSYS" in said:
        what = "the phone's filter of system calls refuses one that it needs"
        return f"{what}: {_GENERAL['glibc'] if form == 'glibc' else _OTHER_AAR}"
    found = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, said)), None)
    if found is None and re.search(r"exit code 126\b", said):
        return _not_allowed(mounts)
    return found or _GENERAL[form]


def _not_allowed(mounts: str) -> str:
    """Why a program that was pushed may not be executed."""
    if "noexec" in mount_options(mounts, TEMPORARY_FOLDER):
        why = "is mounted noexec"
    else:
        why = "is closed to programs, by noexec or by a policy (SELinux, a managed phone)"
    return f"{TEMPORARY_FOLDER} {why}: measure on another phone"
