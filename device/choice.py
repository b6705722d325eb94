"""Opens the devices that measurements run on: this machine, one phone, or all attached phones."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import adbutils

from device.adb import AdbClient, open_phone, phone_names, read_identity
from device.adb_server import connect, server_is_running, usb_debugging_devices
from device.host import HostTarget
from device.phone import PhoneTarget, attach_phone
from device.target import RunnerTarget
from device.target_config import TargetConfig
from lightfield.errors import AdbError, DeviceError

Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_target(config: TargetConfig, client: AdbClient | None = None) -> RunnerTarget:
    """Open the target that the options ask for.

    `auto` takes a phone if a serial number is given, if exactly one usable, not emulated phone is
    attached, or if ANDROID_SERIAL names such a phone. `auto` starts the adb server only if a USB device
    may offer debugging.

    Raises:
        AdbError: when a phone is wanted and none can be used.
        DeviceError: when the phone's runner cannot be built or does not start.
    """
    kind, serial = config.target, config.serial
    if kind == "auto" and serial is None:
        serial = _only_phone(client)
        kind = "host" if serial is None else "phone"
    if kind == "host":
        return HostTarget(config)
    return attach_phone(replace(config, serial=serial), client)


def _only_phone(client: AdbClient | None) -> str | None:
    """Name of the only usable real phone, or of the phone in ANDROID_SERIAL; None without such a phone.

    An adb server that was started to look for the phone is stopped again if there is none.
    """
    started = False
    try:
        if client is None:
            if not server_is_running():
                if usb_debugging_devices() == 0:
                    return None
                started = True
            client = connect()
        phone = open_phone(client)
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


def all_phones(client: AdbClient | None = None) -> list[str]:
    """Names, for `open_phone`, of all usable attached phones.

    A phone that is attached twice, for example over USB and over Wi-Fi, is listed once.

    Raises:
        AdbError: when there is none.
    """
    client = client or connect()
    names = phone_names(client)
    if not names:
        open_phone(client)  # raises the error that explains why
    return names


@contextlib.contextmanager
def opened_phones(
    config: TargetConfig, client: AdbClient | None = None
) -> Iterator[tuple[list[PhoneTarget], list[str]]]:
    """Open all attached phones; yield them, and the errors of phones that cannot be used.

    All phones are restored to their previous state at the end.

    Raises:
        AdbError: when no phone can be used.
    """

    def attempt(serial: str) -> PhoneTarget | DeviceError:
        try:
            return attach_phone(replace(config, target="phone", serial=serial), client)
        except DeviceError as error:
            return error

    targets, failures = list[PhoneTarget](), list[str]()
    with contextlib.ExitStack() as stack:
        for opened in run_concurrently(attempt, all_phones(client)):
            if isinstance(opened, DeviceError):
                failures.append(str(opened))
            else:
                stack.enter_context(opened)
                targets.append(opened)
        if not targets:
            raise AdbError("; ".join(failures), where="phones")
        yield targets, failures


def run_concurrently(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    abort: Callable[[Item], object] = lambda item: None,
) -> list[Result]:
    """Call `work` for all items at once, in one thread per item; results are in the order of the items.

    If an exception (also Ctrl-C) ends the work early, `abort` is called for every item, and all threads
    are awaited, so that every device is restored. A single item runs in the calling thread.
    """
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(max_workers=max(len(items), 1)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for item in items:
                abort(item)
            raise
