"""Record of a search's measurements, and replay: one JSON object per line, in order of measurement.

A search depends on the device only through these measurements. The record therefore replays a
search without the device. An interrupted search reads its recorded measurements again, and then
continues on the target. A line without a newline at its end was cut off while it was written, and
is ignored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from lightfield.errors import CheckpointError, NelfError
from lightfield.files import parse_json, read_text, write_text
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from lightfield.student import Student, StudentSpec
from prune.workbench import Measurer

MEASUREMENTS = "measurements.jsonl"


class MeasurementRecord:
    """A `Measurer` that reads the recorded measurements first, and then measures and records new
    ones.

    Args:
        path: the record, which does not have to exist.
        position: number of measurements that the search has already used.
        measurer: the target; None replays the record only.

    If a search asks for another measurement than the recorded one, a replay fails; with a target
    the rest of the record is dropped and measured again.
    """

    def __init__(self, path: Path, position: int = 0, measurer: Measurer | None = None):
        self.path, self.position = path, position
        self._measurer = measurer
        self._entries = _read(path)
        if measurer is not None and path.exists():
            self._rewrite()  # drops a line that was cut off
        if position > len(self._entries):
            raise CheckpointError(
                f"has {len(self._entries)} measurements, but the search has used {position}",
                where=path,
                remedy="start the search over",
            )

    def measure(self, students: Sequence[Student]) -> Iterator[ComparedLatency]:
        """Interleaved runs of each student and of the reference; recorded before they are
        returned."""
        rest: Iterator[ComparedLatency] | None = None

        for i, student in enumerate(students):

            def measured(measurer: Measurer, first: int = i) -> dict[str, Any]:
                nonlocal rest
                rest = rest or iter(measurer.measure(students[first:]))
                pair = next(rest)
                return {
                    "candidate": pair.candidate.to_json(),
                    "reference": pair.reference.to_json(),
                }

            yield _compared(self._next("compare", [student.spec], measured))
        if rest is not None:
            # Exhaust the generator now so that its cleanup runs here: exceptions that are raised
            # during garbage collection are swallowed.
            next(rest, None)

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies of students with the given specifications."""

        def measured(measurer: Measurer) -> dict[str, Any]:
            return {"median_ms": measurer.time_specs(specs, fresh=fresh)}

        return _medians(self._next("table", specs, measured))

    def _next(
        self,
        kind: str,
        specs: Sequence[StudentSpec],
        measured: Callable[[Measurer], dict[str, Any]],
    ) -> dict[str, Any]:
        """The next recorded measurement if it is the requested one, else a new measurement."""
        asked = {"kind": kind, "specs": json.loads(json.dumps([s.to_json() for s in specs]))}
        if self.position < len(self._entries):
            entry = self._entries[self.position]
            if {"kind": entry.get("kind"), "specs": entry.get("specs")} == asked:
                self.position += 1
                return entry
        if self._measurer is None:
            raise self._divergence(kind, specs)
        if self.position < len(self._entries):
            del self._entries[self.position :]
            self._rewrite()
        self._append({**asked, **measured(self._measurer)})
        return self._entries[-1]

    def _rewrite(self) -> None:
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self._entries))

    def _divergence(self, kind: str, specs: Sequence[StudentSpec]) -> CheckpointError:
        if self.position == len(self._entries):
            what = f"the record ends after {self.position} measurements, but the search needs more"
        else:
            what = (
                f"recorded measurement {self.position} differs from the one that the search needs "
                f"({kind} of {len(specs)}; line {self.position + 1})"
            )
        remedy = "replay with the student, settings and seed of the recorded search"
        return CheckpointError(what, where=self.path, remedy=remedy)

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._entries.append(json.loads(line))
        self.position += 1


def _compared(entry: dict[str, Any]) -> ComparedLatency:
    return ComparedLatency(
        LatencyRecord.from_json(entry["candidate"]), LatencyRecord.from_json(entry["reference"])
    )


def _medians(entry: dict[str, Any]) -> list[float]:
    return [float(ms) for ms in entry["median_ms"]]


def replayed(folder: Path, position: int = 0) -> MeasurementRecord:
    """A `Measurer` that replays the record of an earlier search after its first `position`
    measurements.

    Raises:
        CheckpointError: at once when there is no record or a line of it is not a measurement; later
            when the search asks for another measurement than the recorded one.
    """
    path = folder / MEASUREMENTS
    if not path.is_file():
        raise CheckpointError("there are no recorded measurements", where=path)
    return MeasurementRecord(path, position)


def measured_on(folder: Path) -> DeviceIdentity:
    """The device on which an earlier search was measured.

    Raises:
        CheckpointError: when the record has no comparison of two students.
    """
    path = folder / MEASUREMENTS
    for entry in _read(path):
        if entry["kind"] == "compare":
            return _compared(entry).candidate.device
    raise CheckpointError("there are no recorded measurements", where=path)


def measurements_in(folder: Path) -> int:
    """Number of recorded measurements in a folder; 0 without a record.

    Raises:
        CheckpointError: when a line of the record is not a measurement.
    """
    return len(_read(folder / MEASUREMENTS))


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a record, each checked to be a measurement."""
    if not path.exists():
        return []
    *lines, _ = read_text(path, CheckpointError).split("\n")
    return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
        _check(entry)
    except _MALFORMED as reason:
        text = f"missing {reason}" if isinstance(reason, KeyError) else str(reason)
        raise CheckpointError(
            f"not a measurement ({text})",
            where=where,
            remedy="use an undamaged record, or measure again",
        ) from reason
    return entry


_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, NelfError)
"""Exceptions raised by reading a line that is not a measurement."""


def _check(entry: dict[str, Any]) -> None:
    """Raise one of the exceptions in `_MALFORMED` for an object that is not a measurement."""
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object, got {type(entry).__name__}")
    specs = entry["specs"]
    if not (isinstance(specs, list) and specs):
        raise TypeError("specs is not a list of student specifications")
    if entry["kind"] == "table":
        _check_times("median_ms", entry["median_ms"])
        if len(entry["median_ms"]) != len(specs):
            raise ValueError(f"{len(entry['median_ms'])} latencies for {len(specs)} students")
    elif entry["kind"] == "compare":
        for side in ("candidate", "reference"):
            _check_times("samples_ms", entry[side]["samples_ms"])
            _check_device(entry[side]["device"])
        _compared(entry)
    else:
        raise ValueError(f"unknown kind {entry['kind']!r:.40}")


def _check_times(name: str, times_ms: Any) -> None:
    if not isinstance(times_ms, list):
        raise TypeError(f"{name} is not a list")
    for ms in times_ms:
        if isinstance(ms, bool) or not isinstance(ms, int | float):
            raise TypeError(f"{name} holds {ms!r:.40}, which is not a number")
        if not 0 < float(ms) < math.inf:
            raise ValueError(f"{name} holds {ms:.6g}, which is not a latency")


def _check_device(device: Any) -> None:
    """Check each field's type, which JSON does not guarantee."""
    for name, kind in get_type_hints(DeviceIdentity).items():
        if name in device and type(device[name]) is not kind:
            raise TypeError(
                f"the device's {name} must be a {kind.__name__}, got {device[name]!r:.40}"
            )
