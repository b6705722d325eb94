"""Emulated phones attached to the adb server, and runners that are scripts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from adbutils import AdbClient
from emulated_phone import EmulatedPhone, wait_until

from device.adb import attached_phones
from device.runner.package import RunnerPackage
from device.target_config import TargetConfig
from device.thermal import ThermalConfig

IMPATIENT = TargetConfig(thermal=ThermalConfig(wait_seconds=0))

# Report of a runner for one graph and one run; a test's script may print another report.
ANSWER = (
    '{"runtime": "1.31.1", "growth_kb": 640, "providers": [], "watched": [], "models": ['
    '{"load_us": 9, "at_us": [0], "wall_us": [2500], "cpu_us": [2500], "outputs": []}]}'
)
HELLO = '{"runtime": "1.31.1", "growth_kb": 0, "providers": [], "watched": [], "models": []}'


@contextlib.contextmanager
def attached_phone(folder: Path, tree: Path, server: AdbClient) -> Iterator[EmulatedPhone]:
    """A phone that is attached to the adb server while the block runs."""
    phone = EmulatedPhone(folder, tree)
    try:
        attach(server, phone)
        yield phone
    finally:
        phone.close()
        server.disconnect(phone.serial)


def attach(server: AdbClient, phone: EmulatedPhone) -> None:
    """Attach a phone; the adb server keeps looking for a phone that it has seen before."""
    if phone.serial not in [known.serial for known in attached_phones(server)]:
        server.connect(phone.serial)
    wait_until(lambda: state_of(server, phone) in ("device", "unauthorized"))


def state_of(server: AdbClient, phone: EmulatedPhone) -> str:
    states = {known.serial: known.state for known in attached_phones(server)}
    return states.get(phone.serial, "not attached")


def scripted_package(folder: Path, script: str) -> RunnerPackage:
    """A runner that passes the hello check and otherwise runs a script; $answer is a valid report."""
    (folder / "nelf_runner").write_text(
        f"#!/system/bin/sh\ncase \"$*\" in *--model*) ;; *) echo '{HELLO}'; exit ;; esac\n"
        f"answer='{ANSWER}'\n{script}\n"
    )
    (folder / "libonnxruntime.so").write_bytes(b"not opened")
    files = {name: folder / name for name in ("nelf_runner", "libonnxruntime.so")}
    return RunnerPackage("bionic", files)
