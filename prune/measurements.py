"""The record of a search's measurements: one JSON object per line, in the order they were made.

A search depends on the world only through what it measures. With these lines it can be replayed
without the device, and an interrupted one goes on as if nothing had happened: what it had already
measured is served again, and only then is the target asked. A line counts once it ends in a newline,
so a write that was cut is as good as never begun.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints, runtime_checkable

from lightfield.errors import CheckpointError, NelfError
from lightfield.files import parse_json, read_text, write_text
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from lightfield.student import Student, StudentSpec

MEASUREMENTS = "measurements.jsonl"
Measure = Callable[[Sequence[Student]], Iterable[ComparedLatency]]
"""Each student in turns with the pinned reference, in order, as it is measured."""


@runtime_checkable
class TimeSpecs(Protocol):
    """Median latencies in ms of students of the given specs, all on the rays of the one that up-samples
    most: some are cut off. `fresh` ones are measured now, others may have been measured earlier."""

    def __call__(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]: ...  # noqa: D102


class MeasurementRecord:
    """Serves what is on record from `position` on; afterwards measures, and writes it down.

    Args:
        path: the record; it need not exist yet.
        position: how many measurements are already behind the search.
        measure: the target's measurement; None replays the record only.
        time_specs: likewise.

    A search that asks for something else than the record holds is refused in a replay; with a target
    the rest of the record is dropped and measured anew.
    """

    def __init__(
        self,
        path: Path,
        position: int = 0,
        measure: Measure | None = None,
        time_specs: TimeSpecs | None = None,
    ):
        self.path, self.position = path, position
        self._measure, self._time_specs = measure, time_specs
        self._entries = _read(path)
        if measure is not None and path.exists():
            self._rewrite()  # without a line that was cut
        if position > len(self._entries):
            raise CheckpointError(
                f"holds {len(self._entries)} measurements where the search has seen {position}",
                where=path,
                remedy="start the search over",
            )

    def measure(self, students: Sequence[Student]) -> Iterator[ComparedLatency]:
        """Each student in turns with the pinned reference; each is on record once it is there."""
        rest: Iterator[ComparedLatency] | None = None

        for i, student in enumerate(students):

            def ask(target: Measure, first: int = i) -> dict[str, Any]:
                nonlocal rest
                rest = rest or iter(target(students[first:]))
                measured = next(rest)
                return {
                    "candidate": measured.candidate.to_json(),
                    "reference": measured.reference.to_json(),
                }

            entry = self._next("compare", [student.spec], self._measure, ask)
            yield _compared(entry)
        if rest is not None:
            next(rest, None)  # it cleans up here, not as garbage, which hears no interruption

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies of students of the given specs."""

        def ask(target: TimeSpecs) -> dict[str, Any]:
            return {"median_ms": target(specs, fresh=fresh)}

        return _medians(self._next("table", specs, self._time_specs, ask))

    def _next(
        self,
        kind: str,
        specs: Sequence[StudentSpec],
        target: Any,
        ask: Callable[[Any], dict[str, Any]],
    ) -> dict[str, Any]:
        asked = {"kind": kind, "specs": json.loads(json.dumps([s.to_json() for s in specs]))}
        if self.position < len(self._entries):
            entry = self._entries[self.position]
            if {"kind": entry.get("kind"), "specs": entry.get("specs")} == asked:
                self.position += 1
                return entry
        if target is None:
            raise self._divergence(kind, specs)
        if self.position < len(self._entries):
            del self._entries[self.position :]
            self._rewrite()
        self._append({**asked, **ask(target)})
        return self._entries[-1]

    def _rewrite(self) -> None:
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self._entries))

    def _divergence(self, kind: str, specs: Sequence[StudentSpec]) -> CheckpointError:
        if self.position == len(self._entries):
            what = f"the record ends after {self.position} measurements, the search wants more"
        else:
            what = (
                f"measurement {self.position} on record is another one than the search asks for "
                f"({kind} of {len(specs)}; line {self.position + 1})"
            )
        remedy = "replay with the student, settings and seed it was recorded with"
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


def replayed(folder: Path, position: int = 0) -> tuple[Measure, TimeSpecs]:
    """`measure` and `time_specs` that serve the record of an earlier search, in order, after the first
    `position` measurements.

    Raises:
        CheckpointError: at once when there is no record or a line of it is no measurement; later when
            the search asks for something else than was measured.
    """
    path = folder / MEASUREMENTS
    if not path.is_file():
        raise CheckpointError("no measurements are on record", where=path)
    record = MeasurementRecord(path, position)
    return record.measure, record.time_specs


def measured_on(folder: Path) -> DeviceIdentity:
    """The device that an earlier search was measured on.

    Raises:
        CheckpointError: when nothing on record says so.
    """
    path = folder / MEASUREMENTS
    for entry in _read(path):
        if entry["kind"] == "compare":
            return _compared(entry).candidate.device
    raise CheckpointError("no measurements are on record", where=path)


def measurements_in(folder: Path) -> int:
    """How many measurements a folder has on record; 0 without a record.

    Raises:
        CheckpointError: when a line of it is no measurement.
    """
    return len(_read(folder / MEASUREMENTS))


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a record, each checked to be a measurement."""
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
            remedy="take a record that is whole, or measure anew",
        ) from reason
    return entry


_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, NelfError)
"""What reading a line raises that something else than a measurement has been written to."""


def _check(entry: dict[str, Any]) -> None:
    """Refuse what is no measurement, by one of the errors in `_MALFORMED`."""
    if not isinstance(entry, dict):
        raise TypeError(f"an object is needed, not {type(entry).__name__}")
    specs = entry["specs"]
    if not (isinstance(specs, list) and specs):
        raise TypeError("specs is not a list of networks")
    if entry["kind"] == "table":
        _check_times("median_ms", entry["median_ms"])
        if len(entry["median_ms"]) != len(specs):
            raise ValueError(f"{len(entry['median_ms'])} latencies of {len(specs)} networks")
    elif entry["kind"] == "compare":
        for side in ("candidate", "reference"):
            _check_times("samples_ms", entry[side]["samples_ms"])
            _check_device(entry[side]["device"])
        _compared(entry)
    else:
        raise ValueError(f"its kind is {entry['kind']!r:.40}")


def _check_times(name: str, times_ms: Any) -> None:
    if not isinstance(times_ms, list):
        raise TypeError(f"{name} is not a list")
    for ms in times_ms:
        if isinstance(ms, bool) or not isinstance(ms, int | float):
            raise TypeError(f"{name} holds {ms!r:.40}, which is no number")
        if not 0 < float(ms) < math.inf:
            raise ValueError(f"{name} holds {ms:.6g}, which is no latency")


def _check_device(device: Any) -> None:
    """JSON knows no dataclass: each field has to have the type that it is annotated with."""
    for name, kind in get_type_hints(DeviceIdentity).items():
        if name in device and type(device[name]) is not kind:
            raise TypeError(f"the device's {name} is {device[name]!r:.40}")
