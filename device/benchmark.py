"""Which target to measure on, and a benchmark of named graphs on it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import adbutils

from device.adb import AdbClient, attached_phones, open_phone
from device.adb_server import connect, server_is_running, usb_debugging_devices
from device.host import HostTarget
from device.phone import attach_phone, read_identity
from device.runner.bundle import PhoneRuntime
from device.target import Target
from lightfield.errors import AdbError, ConfigError
from lightfield.latency import LatencyRecord
from lightfield.progress import Progress, silent

TargetKind = Literal["auto", "phone", "host"]


@dataclass(frozen=True)
class BenchmarkConfig:
    """How graphs are measured."""

    target: TargetKind = "auto"
    """`phone`, `host`, or `auto`: the phone when exactly one is attached, else this machine."""
    runs: int = 50
    """Measured runs of each graph."""
    warmup: int = 5
    """Runs before them that do not count."""
    threads: int = 1
    """Threads that one operator may use."""
    serial: str | None = None
    """Which phone, when several are attached."""
    phone: PhoneRuntime = field(default_factory=PhoneRuntime)
    """Where a phone's ONNX Runtime comes from."""

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 0 or self.threads < 1:
            raise ConfigError(
                "runs and threads must be at least 1, warmup at least 0", where="bench"
            )
        if self.serial is not None and self.target == "host":
            raise ConfigError("a serial chooses a phone, not the host", where="serial")


def benchmark(
    target: Target, graphs: Mapping[str, Path], config: BenchmarkConfig, progress: Progress = silent
) -> dict[str, LatencyRecord]:
    """Measure each named graph alone on the target.

    Raises:
        DeviceError: when a graph cannot be measured.
    """
    records: dict[str, LatencyRecord] = {}
    progress(0, len(graphs))
    for name, model in graphs.items():
        records[name] = target.measure(model, runs=config.runs, warmup=config.warmup)
        progress(len(records), len(graphs), p50_ms=records[name].p50_ms)
    return records


def choose_target(
    kind: TargetKind,
    *,
    serial: str | None = None,
    threads: int = 1,
    phone_runtime: PhoneRuntime = PhoneRuntime(),  # noqa: B008 -- frozen
    client: AdbClient | None = None,
) -> Target:
    """The target asked for; its identity says which one it is.

    `auto` takes a phone when a serial is given, or when exactly one is attached that is usable and not
    emulated; it starts no adb server unless a USB device may offer debugging.

    Raises:
        AdbError: when a phone is wanted and none can be used.
        DeviceError: when the phone's runner cannot be built or does not start.
    """
    if kind == "auto" and serial is None:
        serial = _only_phone(client)
        kind = "host" if serial is None else "phone"
    if kind == "host":
        return HostTarget(threads=threads)
    return attach_phone(serial, threads=threads, runtime=phone_runtime, client=client)


def _only_phone(client: AdbClient | None) -> str | None:
    """Serial of the only usable real phone; looking for it leaves no adb server behind in vain."""
    started = False
    try:
        if client is None:
            if not server_is_running():
                if usb_debugging_devices() == 0:
                    return None
                started = True
            client = connect()
        ready = [phone for phone in attached_phones(client) if phone.is_ready]
        if len(ready) == 1:
            phone = open_phone(client, ready[0].serial)
            if not read_identity(phone).emulated:
                return phone.serial
    except AdbError:
        pass
    if started:
        _stop_server()
    return None


def _stop_server() -> None:
    try:
        subprocess.run(
            [adbutils.adb_path(), "kill-server"], capture_output=True, timeout=5, check=False
        )
    except (adbutils.AdbError, OSError, subprocess.TimeoutExpired):
        return
