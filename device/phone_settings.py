"""Phone settings for a measurement: screen on and fixed clocks, restored afterwards.

Before the first change, the commands that restore the settings are written to a note on the phone, and a
guard process starts there. The guard reads from a connection that ends when the measurement ends, when
this program dies in any way, or when the cable is pulled; then it runs the commands of the note, if the
note still exists. If the guard is lost too (the phone was restarted), the next measurement finds the
note and runs its commands first. Normally this program restores the settings itself, last change first,
and continues even if one command fails.
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

# $1: path of the note, $2: commands that restore the settings. The note's first line names its guard.
_GUARD = """trap "" HUP INT TERM PIPE
printf "# %s\\n%s\\n" "$$" "$2" > "$1" && echo guarded || echo refused
cat > /dev/null
[ -e "$1" ] && sh "$1" > /dev/null 2>&1
rm -f "$1" """

# $1: prefix of the notes' paths
_RESTORE_LEFTOVERS = """for note in "$1"*; do
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
    """Name in a record's conditions."""
    name: str
    words: Sequence[str]
    undo: Sequence[str]
    is_on: Callable[[], bool] = lambda: True
    """Whether the phone kept the change; some phones accept a setting and then ignore it."""
    is_off: Callable[[], bool] = lambda: True
    """Whether the phone has its previous setting again."""


@contextlib.contextmanager
def measurement_settings(phone: AdbPhone, api: int | None) -> Iterator[dict[str, bool]]:
    """Keep the screen on and the clocks fixed while the block runs.

    Yields, for each setting, whether the phone allowed it and, if that can be read, kept it.

    Raises:
        AdbError: when a setting could not be restored although the block succeeded.
    """
    restore_leftovers(phone)
    awake = parse_wakefulness(phone.attempt(["dumpsys", "power"]).stdout)
    changes = _planned(phone, api, awake)
    applied = {"stays_on": False, "screen_on": bool(awake)} | {c.key: False for c in changes}
    made: list[_Change] = []
    stuck: list[str] = []
    note = f"{NOTE_PREFIX}{secrets.token_hex(4)}"
    commands = "\n".join(shlex.join(change.undo) for change in reversed(changes))
    with phone.in_background(["sh", "-c", _GUARD, "nelf", note, commands]) as answer:
        try:
            # without a guard, no setting is changed
            for change in changes if answer == "guarded" else ():
                made.append(change)
                if phone.attempt(change.words).exit_code == 0:
                    applied[change.key] = change.is_on()
                else:
                    made.pop()  # the phone refused the change, so it would refuse to undo it
            yield applied
        finally:
            stuck = _undo(phone, made, note)
    if stuck:
        raise AdbError(
            f"could not restore these settings: {', '.join(stuck)}",
            where=phone.serial,
            remedy="attach the phone again; it or the next measurement restores the settings",
        )


def restore_leftovers(phone: AdbPhone) -> int:
    """Restore settings that interrupted measurements left changed; return how many there were."""
    done = phone.attempt(["sh", "-c", _RESTORE_LEFTOVERS, "nelf", NOTE_PREFIX])
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
    """Undo the changes; return the names of those that could not be undone, which the guard retries."""
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
