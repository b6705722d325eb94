"""What a benchmark of one device found, typed: the record that is kept, shown and compared.

Units are in the names. A speed stands beside the image it was got for: a graph whose output is not
the host's, or that could not be run, has a reason and no speed. Every sample is in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from device.fidelity import Fidelity, Precision
from device.operator_profile import OperatorTime
from lightfield.errors import DeviceError
from lightfield.files import read_json
from lightfield.latency import DeviceIdentity, LatencyRecord, RatioInterval

SCHEMA = 1
T = TypeVar("T")


def read_benches(path: Path) -> tuple[list[DeviceBench], list[str]]:
    """What a bench measured, by device, and why other devices were not measured.

    Raises:
        DeviceError: when the file is missing, or no such record.
    """
    data = read_json(path, DeviceError)
    devices = data.get("devices") if isinstance(data, dict) else None
    failed = data.get("failed", []) if isinstance(data, dict) else None
    if not isinstance(devices, list) or not devices or not isinstance(failed, list):
        raise DeviceError("the bench left no measurements", where=path)
    return [DeviceBench.from_json(device) for device in devices], [str(why) for why in failed]


@dataclass(frozen=True)
class GraphBench:
    """One graph on one device."""

    name: str
    """What the graph is: student, pose_to_image."""
    precision: Precision
    model: str
    """Its file's name."""
    refused: str = ""
    """Why it has no speed; empty when it has one."""
    latency: LatencyRecord | None = None
    sustained: LatencyRecord | None = None
    """The same, for as long as an app would run."""
    fidelity: Fidelity | None = None
    yardstick: RatioInterval | None = None
    """Its latency over that of the graph that never changes, both in turns."""
    operators: tuple[OperatorTime, ...] = ()
    fallen_back: tuple[str, ...] = ()
    """Nodes that another provider than the one asked for ran."""

    @property
    def sustained_fps(self) -> float | None:
        """1000 / median of the last quarter of the sustained pass: what is left once it is warm."""
        if self.sustained is None:
            return None
        samples_ms = self.sustained.samples_ms
        return 1000 / statistics.median(samples_ms[-max(len(samples_ms) // 4, 1) :])

    def to_json(self) -> dict[str, Any]:
        """Plain data; latencies with their derived statistics."""
        data = asdict(self)
        for name in ("latency", "sustained"):
            record: LatencyRecord | None = getattr(self, name)
            data[name] = None if record is None else record.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphBench:
        """The inverse of `to_json`.

        Raises:
            DeviceError: when the record is not one.
        """

        def part(name: str, read: Callable[[dict[str, Any]], T]) -> T | None:
            return None if data.get(name) is None else read(data[name])

        try:
            return cls(
                name=str(data["name"]),
                precision=data["precision"],
                model=str(data["model"]),
                refused=str(data["refused"]),
                latency=part("latency", LatencyRecord.from_json),
                sustained=part("sustained", LatencyRecord.from_json),
                fidelity=part("fidelity", lambda d: Fidelity(**d)),
                yardstick=part("yardstick", lambda d: RatioInterval(**d)),
                operators=tuple(OperatorTime(**each) for each in data["operators"]),
                fallen_back=tuple(str(name) for name in data["fallen_back"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DeviceError(f"not a benchmark's record ({error})") from error


@dataclass(frozen=True)
class DeviceBench:
    """All graphs on one device."""

    device: DeviceIdentity
    protocol: dict[str, Any]
    """How it was measured: runs, warm-up, gates."""
    versions: dict[str, str]
    """Of everything that shapes the figures, on the machine that measured."""
    measured_at: str
    graphs: tuple[GraphBench, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": SCHEMA,
            "device": asdict(self.device),
            "protocol": self.protocol,
            "versions": self.versions,
            "measured_at": self.measured_at,
            "graphs": [graph.to_json() for graph in self.graphs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceBench:
        """The inverse of `to_json`.

        Raises:
            DeviceError: when the record is not one, or of another version.
        """
        try:
            if data["schema"] != SCHEMA:
                raise DeviceError(f"benchmark schema {data['schema']}, this version reads {SCHEMA}")
            return cls(
                device=DeviceIdentity(**data["device"]),
                protocol=dict(data["protocol"]),
                versions=dict(data["versions"]),
                measured_at=str(data["measured_at"]),
                graphs=tuple(GraphBench.from_json(each) for each in data["graphs"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"not a benchmark's record ({error})") from error
