"""The work folder of an unfinished stage, and how interrupted work in it is resumed.

The folder records the settings and inputs that the work was started with. The same settings resume the
work. Changed settings resume it where the stage declares that its files are valid for them too.
Otherwise the work is dropped with a message: it moves into a folder of its own, from which the earlier
settings can resume it until other work of the same stage is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightfield.errors import CheckpointError
from lightfield.files import (
    TEMPORARY_PREFIX,
    discard_temporaries,
    parse_json,
    read_json,
    read_text,
    remove,
    write_json,
)

KEY = "key.json"
METRICS = "metrics.jsonl"
LARGEST_DROPPED = 1 << 30
"""Largest dropped work that is kept, in bytes."""
LONGEST_VALUE = 40
"""Longest value of a setting that a message shows, in characters."""
MOST_NAMED = 3
"""Number of differences that a message names."""
UNKNOWN = "the settings have changed"

Carried = Callable[[dict[str, Any], dict[str, Any]], Collection[str]]
"""Maps earlier settings and present ones to the work files that are valid for both."""


def nothing_carried(before: dict[str, Any], now: dict[str, Any]) -> Collection[str]:
    """No files are valid for changed settings."""
    return ()


@dataclass(frozen=True)
class Request:
    """A stage's settings, the keys of its inputs by name, and the fingerprint of both."""

    key: str
    config: dict[str, Any]
    inputs: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Request | None:
        """Read a request from a file; None when the file cannot be read.

        Earlier versions wrote only the key: settings and inputs are then empty.
        """
        try:
            data = read_json(path, CheckpointError)
        except CheckpointError:
            return None
        match data:
            case {"key": str(key), "config": dict(config), "inputs": dict(inputs)}:
                return cls(key, config, inputs)
            case {"key": str(key)}:
                return cls(key, {}, {})
        return None

    def as_read(self) -> Request:
        """The request after a round trip through JSON."""
        return Request(**json.loads(json.dumps(asdict(self))))

    def changes(self, before: Request) -> str:
        """The differences from an earlier request, in words: `steps is 20, was 10`."""
        if not (before.config or before.inputs):
            return UNKNOWN
        found = list(_changes(before.config, self.as_read().config))
        found += [
            f"the {name} has changed"
            for name, key in self.inputs.items()
            if before.inputs.get(name) != key
        ]
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        return (", ".join(found[:MOST_NAMED]) or UNKNOWN) + more


def begin_work(
    folder: Path, request: Request, carried: Carried, say: Callable[[str], None]
) -> bool:
    """Prepare the work folder of a stage; return whether earlier work is resumed.

    `say` receives one clause about work that was started with other settings.
    """
    begun, kept = Request.read(folder / KEY), _dropped(folder, request)
    if begun is not None and begun.key == request.key:
        discard_temporaries(folder)
        return True
    if begun is not None and (files := _serving(folder, begun, request, carried)):
        _leave_only(folder, {*files, METRICS, KEY})
        say(f"{request.changes(begun)}; the interrupted work is resumed{_after_step(folder)}")
    elif kept.exists():
        _drop(folder, begun, request, say)
        kept.rename(folder)
        say(f"the work that was dropped earlier is resumed{_after_step(folder)}")
        return True
    else:
        _drop(folder, begun, request, say)
        folder.mkdir(parents=True)
    resumed = any(True for _ in folder.iterdir())
    write_json(folder / KEY, asdict(request))
    return resumed


def _dropped(folder: Path, request: Request) -> Path:
    """The folder that keeps the dropped work of a request."""
    return folder.with_name(f"{folder.stem}.dropped-{request.key[:12]}")


def _drop(
    folder: Path, begun: Request | None, request: Request, say: Callable[[str], None]
) -> None:
    """Move interrupted work aside, or delete it when it is large or its settings are unreadable."""
    if not _files(folder):
        remove(folder)
        return
    what = f"the interrupted work{_after_step(folder)} is dropped, and the stage starts over"
    changes = "the earlier settings cannot be read" if begun is None else request.changes(begun)
    if begun is None or sum(path.stat().st_size for path in _files(folder)) > LARGEST_DROPPED:
        remove(folder)
        say(f"{changes}; {what}")
        return
    place = _dropped(folder, begun)
    for older in folder.parent.glob(f"{folder.stem}.dropped-*"):
        if older != _dropped(folder, request):
            remove(older)
    folder.rename(place)
    say(f"{changes}; {what} (the work is kept in {place}; the earlier settings resume it)")


def _serving(folder: Path, begun: Request, request: Request, carried: Carried) -> list[str]:
    """Files of the earlier work that are valid for the request too."""
    now = request.as_read()
    if not begun.config or begun.inputs != now.inputs:
        return []
    try:
        names = carried(begun.config, now.config)
    except (AttributeError, LookupError, TypeError):  # the stored settings were edited by hand
        return []
    return [name for name in names if (folder / name).is_file()]


def _files(folder: Path) -> list[Path]:
    """All files except the key and temporary files."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != KEY and not path.name.startswith(TEMPORARY_PREFIX)
    ]


def _leave_only(folder: Path, names: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir() or path.name not in names:
            remove(path)


def _after_step(folder: Path) -> str:
    """The last step in the work's log, in words; empty when the log holds no step."""
    try:
        last = read_text(folder / METRICS, CheckpointError).splitlines()[-1]
        return f" after step {int(parse_json(last)['step'])}"
    except (CheckpointError, LookupError, TypeError, ValueError, OverflowError):
        return ""


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for part in [*now, *(part for part in before if part not in now)]:
            inner = f"{name}.{part}" if name else str(part)
            yield from _changes(before.get(part), now.get(part), inner)
    elif before != now:
        shown = ["not set" if value is None else str(value) for value in (now, before)]
        if max(map(len, shown)) > LONGEST_VALUE:
            yield f"{name} has changed"
        else:
            yield f"{name} is {shown[0]}, was {shown[1]}"
