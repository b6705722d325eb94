"""Settings of a phone that make a measurement steady, changed for its length and put back.

What undoes the changes is written down on the phone before the first of them is made, and a guard waits
there beside the measurement: it reads from a connection that ends with the measurement, with this
program however it dies, and with the cable; what is then still written down, it does. Where the guard is
lost too (the phone was restarted), the next measurement finds the note and does it first. When all goes
well the undoings run from here, last-first, each even when another fails.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from device.adb import TEMPORARY_FOLDER, AdbPhone
from device.adb_output import parse_wakefulness
from lightfield.errors import AdbError

NOTE_PREFIX = f"{TEMPORARY_FOLDER}/nelf-restore-"

_FIXED_PERFORMANCE = ["cmd", "power", "set-fixed-performance-mode-enabled"]
_FIXED_PERFORMANCE_API = 30
_STAY_ON = ["global", "stay_on_while_plugged_in"]
_ON_ANY_POWER = "7"  # BatteryManager: AC 1, USB 2, wireless 4

# $1 the note's path, $2 the undoings. The note's first line names its guard.
_GUARD = """trap "" HUP INT TERM PIPE
printf "# %s\\n%s\\n" "$$" "$2" > "$1" && echo guarded || echo refused
cat > /dev/null
[ -e "$1" ] && sh "$1" > /dev/null 2>&1
rm -f "$1" """

# $1 the notes' prefix
_PUT_BACK = """for note in "$1"*; do
  [ -e "$note" ] || continue
  read -r _ guard < "$note"
  kill -0 "$guard" 2> /dev/null && continue
  sh "$note" > /dev/null 2>&1
  rm -f "$note"
  echo "$note"
done"""


@dataclass(frozen=True)
class _Change:
    key: str
    """In a record's conditions."""
    name: str
    words: Sequence[str]
    undo: Sequence[str]
    is_on: Callable[[], bool] = lambda: True
    """Asks the phone whether it kept the change; some take a setting, and then ignore it."""
    is_off: Callable[[], bool] = lambda: True
    """Asks the phone whether it is as it was before."""


@contextlib.contextmanager
def steady(phone: AdbPhone, api: int | None) -> Iterator[dict[str, bool]]:
    """Screen on and fixed clocks while the block runs; yields which of them the phone allowed and, where
    it can be asked, kept.

    Raises:
        AdbError: when the block went well but a setting could not be put back, naming it.
    """
    put_back_leftovers(phone)
    awake = parse_wakefulness(phone.attempt(["dumpsys", "power"]).stdout)
    changes = _planned(phone, api, awake)
    applied = {"stays_on": False, "screen_on": bool(awake)} | {c.key: False for c in changes}
    made: list[_Change] = []
    stuck: list[str] = []
    note = f"{NOTE_PREFIX}{secrets.token_hex(4)}"
    undoings = "\n".join(shlex.join(change.undo) for change in reversed(changes))
    with phone.beside(["sh", "-c", _GUARD, "nelf", note, undoings]) as said:
        try:
            # what the phone cannot promise to put back is not changed
            for change in changes if said == "guarded" else ():
                made.append(change)
                if phone.attempt(change.words).exit_code == 0:
                    applied[change.key] = change.is_on()
                else:
                    made.pop()  # refused: undoing it would fail too
            yield applied
        finally:
            stuck = _undo(phone, made, note)
    if stuck:
        raise AdbError(
            f"could not put back: {', '.join(stuck)}",
            where=phone.serial,
            remedy="attach the phone again: it does so itself, or the next measurement does",
        )


def put_back_leftovers(phone: AdbPhone) -> int:
    """Put back what measurements that were cut off have left changed; how many of those there were."""
    done = phone.attempt(["sh", "-c", _PUT_BACK, "nelf", NOTE_PREFIX])
    return len(done.stdout.splitlines())


def _planned(phone: AdbPhone, api: int | None, awake: bool | None) -> list[_Change]:
    def stay_on() -> str:
        return phone.attempt(["settings", "get", *_STAY_ON]).stdout.strip()

    changes, value = [], stay_on()
    if value == "null" or value.isdecimal():
        undo = ["delete", *_STAY_ON] if value == "null" else ["put", *_STAY_ON, value]
        change = _Change(
            "stays_on",
            "stay on while plugged in",
            ["settings", "put", *_STAY_ON, _ON_ANY_POWER],
            ["settings", *undo],
            is_on=lambda: stay_on() == _ON_ANY_POWER,
            is_off=lambda: stay_on() == value,
        )
        changes.append(change)
    if awake is False:
        key = ["input", "keyevent"]
        wake, sleep = [*key, "KEYCODE_WAKEUP"], [*key, "KEYCODE_SLEEP"]
        changes.append(_Change("screen_on", "screen", wake, sleep))
    if api is not None and api >= _FIXED_PERFORMANCE_API:
        on, off = [*_FIXED_PERFORMANCE, "true"], [*_FIXED_PERFORMANCE, "false"]
        changes.append(_Change("fixed_performance", "fixed performance", on, off))
    return changes


def _undo(phone: AdbPhone, made: Sequence[_Change], note: str) -> list[str]:
    """Names of the changes that could not be undone from here; those are left to the guard."""
    stuck = []
    for change in reversed(made):
        try:
            phone.shell(change.undo)
            undone = change.is_off()
        except AdbError:
            undone = False
        if not undone:
            stuck.append(change.name)
    if not stuck:
        with contextlib.suppress(AdbError):
            phone.attempt(["rm", "-f", note])
    return stuck
