"""What adbutils and the adb server say when something fails, in words for a person."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import adbutils
from adbutils.errors import AdbConnectionError

from lightfield.errors import AdbError

SERVER = "adb"
_CHECK_CABLE = "check the cable, then measure again"
# adbutils asserts and unpacks what it reads without looking whether it came whole
_CUT_OFF = (EOFError, ConnectionError, AssertionError, struct.error)
_SAID_WHEN_CUT_OFF = (
    "",
    "closed",
    "connection closed",
    "Unknown data: b''",
    "Invalid sync cmd",
    "read chunk missing",
)
STATE_REMEDIES = {
    "unauthorized": "unlock it and accept 'Allow USB debugging', then try again",
    "offline": "plug it in again, or run `adb reconnect offline`",
    "authorizing": "unlock it and accept 'Allow USB debugging', then try again",
    "no": "give your user access to the USB device (udev rules), then plug it in again",
    "recovery": "restart it into Android",
    "sideload": "restart it into Android",
    "bootloader": "restart it into Android",
}


@contextlib.contextmanager
def translated(where: str, remedy: str | None = None) -> Iterator[None]:
    """What adbutils and its sockets raise, as an AdbError."""
    try:
        yield
    except (adbutils.AdbTimeout, TimeoutError) as reason:
        raise AdbError("the phone does not answer", where=where, remedy=remedy) from reason
    except AdbConnectionError as reason:
        raise AdbError(
            "no adb server answers", where=where, remedy="run `adb start-server`, then try again"
        ) from reason
    except _CUT_OFF as reason:
        raise _lost(where, remedy) from reason
    except (adbutils.AdbError, OSError) as reason:
        raise _plain(" ".join(str(part) for part in reason.args), where, remedy) from reason


def _lost(where: str, remedy: str | None) -> AdbError:
    if where == SERVER:
        return AdbError("the connection to the adb server was lost", where=where, remedy=remedy)
    what = "the connection to the phone was lost"
    return AdbError(what, where=where, remedy=remedy or _CHECK_CABLE)


def _plain(said: str, where: str, remedy: str | None) -> AdbError:
    """What the adb server said, in words of ours where it is known."""
    if "not found" in said and "device" in said:
        return AdbError("the phone is no longer attached", where=where, remedy=_CHECK_CABLE)
    for state in ("unauthorized", "offline", "authorizing"):
        if f"device {state}" in said or f"device still {state}" in said:
            return AdbError(f"the phone is {state}", where=where, remedy=STATE_REMEDIES[state])
    if said.strip() in _SAID_WHEN_CUT_OFF:
        return _lost(where, remedy)
    return AdbError(f"adb failed ({said})", where=where, remedy=remedy)
