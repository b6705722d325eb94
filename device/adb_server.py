"""The adb program and its server: probing without side effects, connecting, starting.

Listing phones needs a running server, and a server that was started keeps running. Therefore `probe_adb`
and the automatic choice of a target first ask the kernel whether any USB device offers debugging
(interface class 255, subclass 66, protocol 1), and start no server if there is none.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adbutils

from device.adb import AdbClient, attached_phones
from device.adb_errors import state_description
from device.adb_output import AttachedPhone, parse_device_list
from lightfield.errors import AdbError

_USB_DEVICES = Path("/sys/bus/usb/devices")
_ADB_INTERFACE = ("ff", "42", "01")
_PROBE_SECONDS = 1.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class AdbProbe:
    """State of adb on this machine; probing starts no server."""

    binary: Path | None
    version: str | None
    server_running: bool
    phones: tuple[AttachedPhone, ...]
    """Phones that a running server lists; empty if no server runs."""
    usb_debugging_devices: int | None
    """Number of USB devices that offer debugging; None if the kernel does not tell."""
    problem: str | None
    """Reason why no phone is usable; None if one is usable."""


def server_address() -> tuple[str, int]:
    """Host and port of the adb server, which may run on another machine.

    They come from ADB_SERVER_SOCKET (`tcp:HOST:PORT`), as for adb itself, otherwise from
    ANDROID_ADB_SERVER_HOST and ANDROID_ADB_SERVER_PORT.

    Raises:
        AdbError: when a variable does not name a host and a port.
    """
    if address := os.environ.get("ADB_SERVER_SOCKET"):
        match = re.fullmatch(r"tcp:(?:(.*):)?(\d+)", address)
        if not match:
            raise AdbError(f"'{address}' is not tcp:HOST:PORT", where="ADB_SERVER_SOCKET")
        return match[1] or _LOOPBACK[0], int(match[2])
    host = os.environ.get("ANDROID_ADB_SERVER_HOST") or _LOOPBACK[0]
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or "5037"
    if not port.isdecimal():
        raise AdbError(f"'{port}' is not a port number", where="ANDROID_ADB_SERVER_PORT")
    return host, int(port)


def server_is_running() -> bool:
    """Whether something listens at the adb server's address."""
    try:
        with socket.create_connection(server_address(), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


def connect(*, start: bool = True) -> AdbClient:
    """Connect to the adb server; start the server if none runs and `start` is set.

    Raises:
        AdbError: when no server runs, or the server cannot be started.
    """
    host, port = server_address()
    if not start and not server_is_running():
        raise AdbError("no adb server is running", where=f"{host}:{port}")
    client = _QuietClient(host=host, port=port, socket_timeout=10)
    client.require_server()
    return client


class _QuietClient(adbutils.AdbClient):
    """An adb client that restarts a dead server silently, and parses complete device lists.

    adbutils would restart the server too, but it lets adb write to this program's standard output, it
    starts a local server when a server on another machine does not answer, and it splits the lines of
    the device list at every blank.
    """

    def list(self, extended: bool = False) -> list[Any]:
        """All devices that the server knows, always with their tags."""
        with self.make_connection() as connection:
            connection.send_command("host:devices-l")
            connection.check_okay()
            return [*parse_device_list(connection.read_string_block())]

    def require_server(self) -> None:
        if server_is_running():
            return
        if self.host not in _LOOPBACK:
            raise AdbError(
                "no adb server answers",
                where=f"{self.host}:{self.port}",
                remedy="start the server on that machine with `adb -a start-server`, and make sure that "
                "only you can reach it",
            )
        _start_server()

    def make_connection(self, timeout: float | None = None) -> adbutils.AdbConnection:
        self.require_server()
        return super().make_connection(timeout)


def _start_server() -> None:
    try:
        done = subprocess.run(
            [adbutils.adb_path(), "start-server"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except adbutils.AdbError as reason:
        raise AdbError(
            "the adb program is not installed", where="adb", remedy="install platform-tools"
        ) from reason
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise AdbError(f"adb cannot be started ({reason})", where="adb") from reason
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise AdbError(f"the adb server does not start ({lines[-1].strip()})", where="adb")


def usb_debugging_devices(folder: Path = _USB_DEVICES) -> int | None:
    """Number of USB interfaces that offer adb; None if the kernel does not tell."""
    if not folder.is_dir():
        return 0 if folder.parent.parent.is_dir() else None  # Linux without USB, or not Linux
    return sum(
        _interface(path.parent) == _ADB_INTERFACE for path in folder.glob("*/bInterfaceClass")
    )


def _interface(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(
            (folder / f"bInterface{part}").read_text().strip().lower()
            for part in ("Class", "SubClass", "Protocol")
        )
    except OSError:
        return ()


def probe_adb() -> AdbProbe:
    """Probe adb on this machine; starts no server and raises no error."""
    binary, version = _binary()
    usb = usb_debugging_devices()
    try:
        running = server_is_running()
        phones = tuple(attached_phones(connect(start=False))) if running else ()
        problem = _problem(binary, running, phones, usb)
    except AdbError as error:
        running, phones, problem = False, (), str(error)
    return AdbProbe(binary, version, running, phones, usb, problem)


def _binary() -> tuple[Path | None, str | None]:
    try:
        path = Path(adbutils.adb_path())
        done = subprocess.run(
            [str(path), "version"], capture_output=True, text=True, timeout=2, check=False
        )
    except (adbutils.AdbError, OSError, subprocess.SubprocessError):
        return None, None
    match = re.search(r"^Version (\S+)", done.stdout, re.MULTILINE)
    return path, match[1] if match else None


def _problem(
    binary: Path | None, running: bool, phones: tuple[AttachedPhone, ...], usb: int | None
) -> str | None:
    if any(phone.is_ready for phone in phones):
        return None
    if phones:
        states = ", ".join(f"{phone.serial} {state_description(phone.state)}" for phone in phones)
        return f"no phone is usable: {states}"
    if binary is None:
        return "the adb program is not installed: install platform-tools"
    if usb:
        hint = "run `adb devices` and accept the prompt on the phone"
        return f"{usb} USB device(s) offer debugging, but adb lists none: {hint}"
    if running:
        return "the adb server lists no phone"
    return "no adb server is running, and no USB device offers debugging"
