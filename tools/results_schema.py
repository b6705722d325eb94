"""Records of measured runs: the JSON files of `docs/records`, their fields, units and checks.

A record describes one measured run: what was measured, when, on which hardware, with which
software, commit, command and seed, and the figures. A field whose value nobody wrote down holds the
text "not recorded", and the record's note says so. `config` may hold the settings of each stage.

A figure has a name, a unit, and either a value or a range (lowest and highest of several values).
The optional interval is the 95 % interval of the value, and `decimals` is how many decimals were
stated where the figure was transcribed from a document. A record of several machines names the
machine of each figure.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
NOT_RECORDED = "not recorded"
UNITS = (
    "1",  # counts, ratios, SSIM
    "dB",
    "%",
    "ms",
    "s",
    "min",
    "h",
    "B",
    "MB",
    "GiB",
    "MMAC",
    "GMAC",
    "rays/s",
    "images/s",
    "frames/s",
    "steps/s",
)
FIELDS = (
    "name",
    "description",
    "date",
    "hardware",
    "software",
    "commit",
    "command",
    "seed",
    "figures",
)
"""Fields that every record holds beside its schema version."""


class RecordError(ValueError):
    """A record that cannot be used. The message is one line: the file, the field and the fault."""


@dataclass(frozen=True)
class Figure:
    """One measured number, or the range of several."""

    name: str
    unit: str
    low: float
    high: float
    """Equal to `low` unless the record states a range."""
    interval: tuple[float, float] | None = None
    decimals: int | None = None
    """Decimals to show; None leaves the choice to the table."""
    machine: str | None = None


@dataclass(frozen=True)
class Record:
    """One measured run."""

    name: str
    description: str
    date: str
    hardware: dict[str, str]
    software: dict[str, str] | str
    commit: str
    command: list[str] | str
    seed: int | str
    figures: dict[str, Figure]
    note: str


def load_records(folder: Path) -> dict[str, Record]:
    """Read and check every record of a folder, by name.

    Raises:
        RecordError: when a file is no valid record.
    """
    records = (load_record(path) for path in sorted(folder.glob("*.json")))
    return {record.name: record for record in records}


def load_record(path: Path) -> Record:
    """Read and check one record.

    Raises:
        RecordError: when the file is no valid record.
    """
    try:
        return parse_record(json.loads(path.read_text(encoding="utf-8")), path.stem)
    except (OSError, ValueError) as reason:
        first_line = (str(reason).splitlines() or [""])[0]
        raise RecordError(f"{path}: {first_line}") from None


def parse_record(fields: Any, name: str) -> Record:
    """Check the fields of a record whose file is called `name`.

    Raises:
        RecordError: when a field is missing, unknown, or not of its type.
    """
    _require(isinstance(fields, dict), "a record is a JSON object")
    _require(fields.get("schema") == SCHEMA, f"`schema` must be {SCHEMA}")
    for field in FIELDS:
        _require(field in fields, f"the field `{field}` is missing")
    unknown = sorted(set(fields) - {"schema", "note", "config", *FIELDS})
    _require(not unknown, f"unknown field `{', '.join(unknown)}`")
    _require(fields["name"] == name, f"`name` must be the name of the file, {name}")
    for field in ("description", "date", "commit"):
        _require(_is_text(fields[field]), f"`{field}` must be a text")
    _require(_is_date(fields["date"]), "`date` must be YYYY-MM-DD")
    hardware, software, command = fields["hardware"], fields["software"], fields["command"]
    _require(_maps_texts(hardware) and hardware, "`hardware` must name at least one machine")
    _require(
        software == NOT_RECORDED or _maps_texts(software), "`software` must map names to versions"
    )
    commands = isinstance(command, list) and command and all(map(_is_text, command))
    _require(command == NOT_RECORDED or commands, "`command` must be a list of command lines")
    seed = fields["seed"]
    _require(seed == NOT_RECORDED or type(seed) is int, "`seed` must be a whole number")
    note = fields.get("note", "")
    _require(isinstance(note, str), "`note` must be a text")
    gaps = any(fields[field] == NOT_RECORDED for field in FIELDS)
    _require(note or not gaps, "the `note` must say why fields are not recorded")
    figures = _parse_figures(fields["figures"], hardware)
    return Record(
        name, fields["description"], fields["date"], hardware, software, fields["commit"], command,
        seed, figures, note,
    )  # fmt: skip


def _parse_figures(entries: Any, machines: dict[str, str]) -> dict[str, Figure]:
    _require(isinstance(entries, list) and entries, "`figures` must be a list of figures")
    figures: dict[str, Figure] = {}
    for entry in entries:
        _require(isinstance(entry, dict) and _is_text(entry.get("name")), "a figure has no `name`")
        figure = _parse_figure(entry, machines)
        _require(figure.name not in figures, f"the figure `{figure.name}` is there twice")
        figures[figure.name] = figure
    return figures


def _parse_figure(entry: dict[str, Any], machines: dict[str, str]) -> Figure:
    name = entry["name"]
    unknown = sorted(
        set(entry) - {"name", "value", "range", "unit", "interval", "decimals", "machine"}
    )
    _require(not unknown, f"figure `{name}`: unknown field `{', '.join(unknown)}`")
    _require("unit" in entry, f"figure `{name}`: the field `unit` is missing")
    unit = entry["unit"]
    _require(unit in UNITS, f"figure `{name}`: unknown unit {unit!r}, known are {', '.join(UNITS)}")
    _require(("value" in entry) != ("range" in entry), f"figure `{name}`: needs a value or a range")
    limits = entry["range"] if "range" in entry else [entry["value"]] * 2
    _require(
        _is_pair(limits), f"figure `{name}`: `value` must be a number, `range` two ascending ones"
    )
    interval = entry.get("interval")
    _require(
        interval is None or (_is_pair(interval) and interval[0] <= limits[0] <= interval[1]),
        f"figure `{name}`: `interval` must be two numbers around the value",
    )
    decimals = entry.get("decimals")
    _require(
        decimals is None or (type(decimals) is int and 0 <= decimals <= 12),
        f"figure `{name}`: `decimals` must be a whole number from 0 to 12",
    )
    machine = entry.get("machine")
    _require(
        machine in machines or (machine is None and len(machines) == 1),
        f"figure `{name}`: `machine` must be one of {', '.join(machines)}",
    )
    pair = None if interval is None else (interval[0], interval[1])
    return Figure(name, unit, limits[0], limits[1], pair, decimals, machine)


def _require(condition: Any, fault: str) -> None:
    if not condition:
        raise RecordError(fault)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_date(text: str) -> bool:
    if text == NOT_RECORDED:
        return True
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _maps_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and _is_text(v) for k, v in value.items())


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
        and value[0] <= value[1]
    )
