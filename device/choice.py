"""Which device a measurement is made on: the host, the one phone there is, a named one, or all."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import adbutils

from device.adb import AdbClient, open_phone, phone_names, read_identity
from device.adb_server import connect, server_is_running, usb_debugging_devices
from device.host import HostTarget
from device.phone import attach_phone
from device.runner.bundle import PhoneRuntime
from device.runner_protocol import Provider
from device.target import RunnerTarget
from device.thermal import ThermalConfig
from lightfield.errors import AdbError, DeviceError

TargetKind = Literal["auto", "phone", "host"]
Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_target(
    kind: TargetKind,
    *,
    serial: str | None = None,
    threads: int = 1,
    phone_runtime: PhoneRuntime = PhoneRuntime(),  # noqa: B008 -- frozen
    thermal: ThermalConfig = ThermalConfig(),  # noqa: B008 -- frozen
    provider: Provider = "cpu",
    options: Mapping[str, str] | None = None,
    client: AdbClient | None = None,
) -> RunnerTarget:
    """The target asked for; its identity says which one it is.

    `auto` takes a phone when a serial is given, or when exactly one is attached that is usable and not
    emulated, or ANDROID_SERIAL names such a phone; it starts no adb server unless a USB device may offer
    debugging.

    Raises:
        AdbError: when a phone is wanted and none can be used.
        DeviceError: when the phone's runner cannot be built or does not start.
    """
    if kind == "auto" and serial is None:
        serial = _only_phone(client)
        kind = "host" if serial is None else "phone"
    if kind == "host":
        return HostTarget(threads=threads, provider=provider)
    return attach_phone(
        serial,
        threads=threads,
        runtime=phone_runtime,
        thermal=thermal,
        provider=provider,
        options=options,
        client=client,
    )


def _only_phone(client: AdbClient | None) -> str | None:
    """Name of the only usable real phone, or of the one in ANDROID_SERIAL if it is one; looking for it
    leaves no adb server behind in vain."""
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
    """Names for `open_phone` of all attached phones that can be used. A phone that is attached twice,
    over USB and over Wi-Fi say, is among them once.

    Raises:
        AdbError: when there is none.
    """
    client = client or connect()
    names = phone_names(client)
    if not names:
        open_phone(client)  # which says why
    return names


@contextlib.contextmanager
def opened_phones(
    attach: Callable[[str], RunnerTarget], client: AdbClient | None = None
) -> Iterator[tuple[list[RunnerTarget], list[str]]]:
    """Every attached phone as `attach` makes it from its name, and why the others are not among them;
    all are left as they were found.

    Raises:
        AdbError: when no phone can be used.
    """

    def attempt(serial: str) -> RunnerTarget | DeviceError:
        try:
            return attach(serial)
        except DeviceError as error:
            return error

    targets, failures = list[RunnerTarget](), list[str]()
    with contextlib.ExitStack() as stack:
        for found in together(attempt, all_phones(client)):
            if isinstance(found, DeviceError):
                failures.append(str(found))
            else:
                targets.append(stack.enter_context(found))
        if not targets:
            raise AdbError("; ".join(failures), where="phones")
        yield targets, failures


def together(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    abort: Callable[[Item], object] = lambda item: None,
) -> list[Result]:
    """The work of several devices at once, one thread each; results in the items' order.

    What ends this early, Ctrl-C among it, calls `abort` for every item and waits until all have put
    things back. A single item is worked on right here.
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
