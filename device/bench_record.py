"""Benchmark records: the results of one device, as they are stored, shown and compared.

Units are part of the names. A record keeps every sample. A graph that could not be run, or whose output
differs from the host's, has a reason instead of a latency.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from device.fidelity import Fidelity, GraphPrecision
from device.operator_profile import OperatorTime
from lightfield.errors import DeviceError
from lightfield.files import read_json
from lightfield.latency import DeviceIdentity, LatencyRecord, RatioInterval

SCHEMA = 2
T = TypeVar("T")


def read_benches(path: Path) -> tuple[list[DeviceBench], list[str]]:
    """Read the record of each device, and the errors of devices that could not be measured.

    Raises:
        DeviceError: when the file is missing, or is not a benchmark record of this version.
    """
    data = read_json(path, DeviceError)
    devices = data.get("devices") if isinstance(data, dict) else None
    failed = data.get("failed", []) if isinstance(data, dict) else None
    if not isinstance(devices, list) or not devices or not isinstance(failed, list):
        raise DeviceError(
            "the file holds no benchmark records", where=path, remedy="run `nelf bench` again"
        )
    return [DeviceBench.from_json(device) for device in devices], [str(why) for why in failed]


@dataclass(frozen=True)
class GraphBench:
    """Results of one graph on one device."""

    name: str
    """Role of the graph: `student`, `pose_to_image` or `dense_student`."""
    precision: GraphPrecision
    model: str
    """Name of the graph's file."""
    refused: str = ""
    """Reason why there is no latency; empty if there is a latency."""
    latency: LatencyRecord | None = None
    sustained: LatencyRecord | None = None
    """Latency during the sustained pass, which lasts as long as an app would run."""
    fidelity: Fidelity | None = None
    reference_ratio: RatioInterval | None = None
    """Ratio of the graph's latency to the reference model's, from interleaved runs."""
    operators: tuple[OperatorTime, ...] = ()
    fallback_nodes: tuple[str, ...] = ()
    """Nodes that ran on another execution provider than the configured one."""

    @property
    def sustained_fps(self) -> float | None:
        """Frames per second of the warm device: 1000 / median of the sustained pass's last quarter."""
        if self.sustained is None:
            return None
        samples_ms = self.sustained.samples_ms
        return 1000 / statistics.median(samples_ms[-max(len(samples_ms) // 4, 1) :])

    def to_json(self) -> dict[str, Any]:
        """The results as plain data; latencies include their derived statistics."""
        data = asdict(self)
        for name in ("latency", "sustained"):
            record: LatencyRecord | None = getattr(self, name)
            data[name] = None if record is None else record.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphBench:
        """The inverse of `to_json`.

        Raises:
            DeviceError: when the data are not such a record.
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
                reference_ratio=part("reference_ratio", lambda d: RatioInterval(**d)),
                operators=tuple(OperatorTime(**each) for each in data["operators"]),
                fallback_nodes=tuple(str(name) for name in data["fallback_nodes"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DeviceError(f"not a benchmark record ({error})") from error


@dataclass(frozen=True)
class DeviceBench:
    """Results of all graphs on one device."""

    device: DeviceIdentity
    protocol: dict[str, Any]
    """Settings of the benchmark: runs, warm-up, thermal conditions."""
    versions: dict[str, str]
    """Versions of the software that affects the results, on the machine that ran the benchmark."""
    measured_at: str
    graphs: tuple[GraphBench, ...]

    def to_json(self) -> dict[str, Any]:
        """The results as plain data."""
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
            DeviceError: when the data are not such a record, or have another schema version.
        """
        try:
            if data["schema"] != SCHEMA:
                raise DeviceError(
                    f"the benchmark record has schema version {data['schema']}, but this version "
                    f"reads {SCHEMA}",
                    remedy="run `nelf bench` again",
                )
            return cls(
                device=DeviceIdentity(**data["device"]),
                protocol=dict(data["protocol"]),
                versions=dict(data["versions"]),
                measured_at=str(data["measured_at"]),
                graphs=tuple(GraphBench.from_json(each) for each in data["graphs"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"not a benchmark record ({error})") from error
