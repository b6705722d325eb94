"""Settings of a phone that make a measurement steady, changed for its length and put back.

Every change registers its undoing before it is made; the undoings run last-first however the block ends,
each even when another fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from device.adb import AdbPhone
from device.adb_output import parse_wakefulness
from lightfield.errors import AdbError

_FIXED_PERFORMANCE = ["cmd", "power", "set-fixed-performance-mode-enabled"]
_FIXED_PERFORMANCE_API = 30
_STAY_ON = ["global", "stay_on_while_plugged_in"]
_ON_ANY_POWER = "7"  # BatteryManager: AC 1, USB 2, wireless 4


@contextlib.contextmanager
def steady(phone: AdbPhone, api: int | None) -> Iterator[dict[str, bool]]:
    """Screen on and fixed clocks while the block runs; yields which of them the phone allowed.

    Raises:
        AdbError: when the block went well but a setting could not be put back, naming it.
    """
    undoings: list[tuple[str, Callable[[], object]]] = []
    applied: dict[str, bool] = {}
    failed = False
    try:
        applied["stays_on"] = _stay_on(phone, undoings)
        applied["screen_on"] = _wake(phone, undoings)
        if api is not None and api >= _FIXED_PERFORMANCE_API:
            undoings.append(
                ("fixed performance", partial(phone.shell, [*_FIXED_PERFORMANCE, "false"]))
            )
            applied["fixed_performance"] = (
                phone.attempt([*_FIXED_PERFORMANCE, "true"]).exit_code == 0
            )
            if not applied["fixed_performance"]:
                undoings.pop()  # refused: nothing was changed, and undoing would fail too
        yield applied
    except BaseException:
        failed = True
        raise
    finally:
        stuck = _undo(undoings)
        if stuck and not failed:
            raise AdbError(
                f"could not put back: {', '.join(stuck)}",
                where=phone.serial,
                remedy="attach the phone again and restart it",
            )


def _stay_on(phone: AdbPhone, undoings: list[tuple[str, Callable[[], object]]]) -> bool:
    before = phone.attempt(["settings", "get", *_STAY_ON])
    value = before.stdout.strip()
    if before.exit_code != 0 or not (value == "null" or value.isdecimal()):
        return False
    undo = ["settings", "put", *_STAY_ON, value]
    if value == "null":
        undo = ["settings", "delete", *_STAY_ON]
    undoings.append(("stay on while plugged in", partial(phone.shell, undo)))
    return phone.attempt(["settings", "put", *_STAY_ON, _ON_ANY_POWER]).exit_code == 0


def _wake(phone: AdbPhone, undoings: list[tuple[str, Callable[[], object]]]) -> bool:
    awake = parse_wakefulness(phone.attempt(["dumpsys", "power"]).stdout)
    if awake is not False:
        return bool(awake)
    undoings.append(("screen", partial(phone.shell, ["input", "keyevent", "KEYCODE_SLEEP"])))
    return phone.attempt(["input", "keyevent", "KEYCODE_WAKEUP"]).exit_code == 0


def _undo(undoings: list[tuple[str, Callable[[], object]]]) -> list[str]:
    stuck = []
    for name, undo in reversed(undoings):
        try:
            undo()
        except AdbError:
            stuck.append(name)
    return stuck
