"""The record of a search's measurements: one JSON object per line, in the order they were made.

A search depends on the world only through what it measures. With these lines it can be replayed
without the device, and an interrupted one goes on as if nothing had happened: what it had already
measured is served again, and only then is the target asked. A line counts once it ends in a newline,
so a write that was cut is as good as never begun.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightfield.errors import CheckpointError, NelfError
from lightfield.files import write_text
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
            yield self._parsed(_compared, entry)
        if rest is not None:
            next(rest, None)  # it cleans up here, not as garbage, which hears no interruption

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies of students of the given specs."""

        def ask(target: TimeSpecs) -> dict[str, Any]:
            return {"median_ms": target(specs, fresh=fresh)}

        entry = self._next("table", specs, self._time_specs, ask)
        return self._parsed(lambda entry: [float(ms) for ms in entry["median_ms"]], entry)

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
                f"({kind} of {len(specs)})"
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

    def _parsed(self, parse: Callable[[dict[str, Any]], Any], entry: dict[str, Any]) -> Any:
        try:
            return parse(entry)
        except (KeyError, TypeError, ValueError, NelfError) as reason:
            raise CheckpointError(
                f"measurement {self.position - 1} cannot be read ({reason})", where=self.path
            ) from reason


def _compared(entry: dict[str, Any]) -> ComparedLatency:
    return ComparedLatency(
        LatencyRecord.from_json(entry["candidate"]), LatencyRecord.from_json(entry["reference"])
    )


def replayed(folder: Path) -> tuple[Measure, TimeSpecs]:
    """`measure` and `time_specs` that serve the record of an earlier search, in order.

    Raises:
        CheckpointError: at once when there is no record; later when the search asks for something
            else than was measured.
    """
    path = folder / MEASUREMENTS
    if not path.is_file():
        raise CheckpointError("no measurements are on record", where=path)
    record = MeasurementRecord(path)
    return record.measure, record.time_specs


def measured_on(folder: Path) -> DeviceIdentity:
    """The device that an earlier search was measured on.

    Raises:
        CheckpointError: when nothing on record says so.
    """
    path = folder / MEASUREMENTS
    for entry in _read(path):
        if entry.get("kind") == "compare":
            try:
                return _compared(entry).candidate.device
            except (KeyError, TypeError, ValueError, NelfError):
                break
    raise CheckpointError("no measurements are on record", where=path)


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a record."""
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        entries = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as reason:
        raise CheckpointError(f"not a record of measurements ({reason})", where=path) from reason
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError("not a record of measurements", where=path)
    return entries
