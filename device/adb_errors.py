"""Translation of errors of adbutils and the adb server into one-line errors with a remedy."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import adbutils
from adbutils.errors import AdbConnectionError

from lightfield.errors import AdbError

SERVER = "adb"
_CHECK_CABLE = "check the cable, then measure again"
# adbutils asserts and unpacks what it reads without checking that it is complete
_CUT_OFF = (EOFError, ConnectionError, AssertionError, struct.error)
_CUT_OFF_MESSAGES = (
    "",
    "closed",
    "connection closed",
    "Unknown data: b''",
    "Invalid sync cmd",
    "read chunk missing",
)
_ACCEPT = "unlock the phone and accept 'Allow USB debugging', then try again"
_RESTART = "restart the phone into Android"
_REMEDIES = {
    "unauthorized": _ACCEPT,
    "authorizing": _ACCEPT,
    "connecting": "wait a moment, then try again",
    "offline": "plug the phone in again, or run `adb reconnect offline`",
    "detached": "run `adb attach` for the phone, then try again",
    "no permissions": "give your user access to the USB device (udev rules), then plug the phone in "
    "again",
    "recovery": _RESTART,
    "rescue": _RESTART,
    "sideload": _RESTART,
    "bootloader": _RESTART,
}
_STATES = {
    "no permissions": "cannot be opened by this user: adb has no permissions for its USB device",
    "host": "is a computer that offers no debugging (state `host`)",
    "rescue": "is in rescue mode",
    "recovery": "is in recovery mode",
    "sideload": "is in sideload mode",
    "bootloader": "is in its bootloader",
}


def state_description(state: str) -> str:
    """Description of a state in `adb devices`, for the sentence "the phone ..."."""
    return _STATES.get(state, f"is {state}")


def unusable(state: str, where: str) -> AdbError:
    """The error for a phone whose state is not `device`."""
    remedy = _REMEDIES.get(state, "see `adb devices -l`")
    return AdbError(f"the phone {state_description(state)}", where=where, remedy=remedy)


@contextlib.contextmanager
def translated(where: str, remedy: str | None = None) -> Iterator[None]:
    """Turn exceptions of adbutils and its sockets into an AdbError."""
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


def _plain(message: str, where: str, remedy: str | None) -> AdbError:
    """The error for a message of the adb server."""
    if "not found" in message and "device" in message:
        return AdbError("the phone is no longer attached", where=where, remedy=_CHECK_CABLE)
    for state in ("unauthorized", "offline", "authorizing", "connecting"):
        if f"device {state}" in message or f"device still {state}" in message:
            return unusable(state, where)
    if message.strip() in _CUT_OFF_MESSAGES:
        return _lost(where, remedy)
    return AdbError(f"adb failed ({message})", where=where, remedy=remedy)
