"""The adb program and its server on this machine: looking without touching, and starting.

Listing phones needs a running server, and a server that was started stays. So `probe_adb` and the
automatic choice of a target ask the kernel first whether a USB device offers debugging at all (interface
class 255, subclass 66, protocol 1), and start nothing when none does.
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
from device.adb_errors import in_words
from device.adb_output import AttachedPhone, parse_device_list
from lightfield.errors import AdbError

_USB_DEVICES = Path("/sys/bus/usb/devices")
_ADB_INTERFACE = ("ff", "42", "01")
_PROBE_SECONDS = 1.0
_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class AdbProbe:
    """What there is of adb; made without starting anything."""

    binary: Path | None
    version: str | None
    server_running: bool
    phones: tuple[AttachedPhone, ...]
    """What a running server lists; empty when none runs."""
    usb_debugging_devices: int | None
    """USB devices that offer debugging, None where the kernel does not say."""
    problem: str | None
    """Why no phone can be used, None when one can."""


def server_address() -> tuple[str, int]:
    """Host and port of the adb server, which may be another machine's: from ADB_SERVER_SOCKET
    (`tcp:HOST:PORT`), as adb itself reads it, else from ANDROID_ADB_SERVER_HOST and _PORT.

    Raises:
        AdbError: when these name no host and port.
    """
    if address := os.environ.get("ADB_SERVER_SOCKET"):
        match = re.fullmatch(r"tcp:(?:(.*):)?(\d+)", address)
        if not match:
            raise AdbError(
                f"'{address}' is not of the form tcp:HOST:PORT", where="ADB_SERVER_SOCKET"
            )
        return match[1] or _HERE[0], int(match[2])
    host = os.environ.get("ANDROID_ADB_SERVER_HOST") or _HERE[0]
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or "5037"
    if not port.isdecimal():
        raise AdbError(f"'{port}' is no port", where="ANDROID_ADB_SERVER_PORT")
    return host, int(port)


def server_is_running() -> bool:
    """True when something listens at the adb server's address."""
    try:
        with socket.create_connection(server_address(), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


def connect(*, start: bool = True) -> AdbClient:
    """A client of the adb server, which is started first when `start` and none runs.

    Raises:
        AdbError: when there is no server, or it cannot be started.
    """
    host, port = server_address()
    if not start and not server_is_running():
        raise AdbError("no adb server is running", where=f"{host}:{port}")
    client = _QuietClient(host=host, port=port, socket_timeout=10)
    client.require_server()
    return client


class _QuietClient(adbutils.AdbClient):
    """Starts the adb server again should it die, and reads its list of devices whole.

    adbutils would start it too, but lets adb write into our standard output, and starts one here when
    that of another machine does not answer; it cuts the lines of the list at every blank.
    """

    def list(self, extended: bool = False) -> list[Any]:
        """The devices that the server knows; always with what it says about each."""
        with self.make_connection() as connection:
            connection.send_command("host:devices-l")
            connection.check_okay()
            return [*parse_device_list(connection.read_string_block())]

    def require_server(self) -> None:
        if server_is_running():
            return
        if self.host not in _HERE:
            raise AdbError(
                "no adb server answers",
                where=f"{self.host}:{self.port}",
                remedy="start it there with `adb -a start-server`, where only you can reach it",
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
        raise AdbError("no adb program", where="adb", remedy="install platform-tools") from reason
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise AdbError(f"adb cannot be started ({reason})", where="adb") from reason
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise AdbError(f"the adb server does not start ({lines[-1].strip()})", where="adb")


def usb_debugging_devices(folder: Path = _USB_DEVICES) -> int | None:
    """How many USB interfaces speak adb, None where the kernel does not say."""
    if not folder.is_dir():
        return 0 if folder.parent.parent.is_dir() else None  # a Linux without USB, or no Linux
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
    """What there is of adb, without starting a server and without raising."""
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
        states = ", ".join(f"{phone.serial} {in_words(phone.state)}" for phone in phones)
        return f"no phone is usable: {states}"
    if binary is None:
        return "there is no adb program: install platform-tools"
    if usb:
        hint = "run `adb devices` and accept the prompt on it"
        return f"{usb} USB device(s) offer debugging, but adb lists none: {hint}"
    if running:
        return "the adb server lists no phone"
    return "no adb server is running, and no USB device offers debugging"
