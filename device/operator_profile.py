"""Operator profile: time and execution provider of every node, from ONNX Runtime's trace.

The trace is JSON in Chrome's tracing format. It has one event `NAME_kernel_time` per node and run, with
the duration in microseconds, the operator and the provider. Because the trace includes the warm-up runs,
only the last runs of each node count. Tracing slows the runs down: shares are accurate, but the sum is
larger than the latency.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device.runner_protocol import PROVIDER_NAMES, Provider
from lightfield.errors import DeviceError

_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """Time of one node of the graph after ONNX Runtime's fusions."""

    name: str
    operator: str
    provider: str
    median_ms: float


@dataclass(frozen=True)
class OperatorTime:
    """Time of all nodes of one operator on one provider."""

    operator: str
    provider: str
    nodes: int
    total_ms: float
    """Sum of the nodes' medians."""
    share: float
    """Share of the time of all nodes."""

    def to_json(self) -> dict[str, Any]:
        """The time as plain data."""
        return asdict(self)


def read_profile(path: Path, runs: int) -> tuple[NodeTime, ...]:
    """Read the nodes of one graph's trace, in execution order, from the last `runs` runs.

    Raises:
        DeviceError: when the file is not such a trace, or contains no node.
    """
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    try:
        for event in json.loads(path.read_text(encoding="utf-8", errors="replace")):
            if event.get("cat") == "Node" and str(event.get("name")).endswith(_SUFFIX):
                about = event["args"]
                name = str(event["name"]).removesuffix(_SUFFIX)
                key = (name, str(about["op_name"]), str(about["provider"]))
                times[key].append(float(event["dur"]) / 1e3)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
        raise DeviceError(f"ONNX Runtime's trace cannot be read ({reason})") from reason
    if not times:
        raise DeviceError("ONNX Runtime's trace contains no node")
    return tuple(NodeTime(*key, statistics.median(each[-runs:])) for key, each in times.items())


def operator_times(nodes: Iterable[NodeTime]) -> tuple[OperatorTime, ...]:
    """Group nodes by operator and provider, slowest first."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        groups[node.operator, node.provider].append(node.median_ms)
    all_ms = sum(map(sum, groups.values()))
    times = [
        OperatorTime(*key, len(each), sum(each), sum(each) / all_ms if all_ms else 0.0)
        for key, each in groups.items()
    ]
    return tuple(sorted(times, key=lambda time: -time.total_ms))


def fallback_nodes(nodes: Iterable[NodeTime], provider: Provider) -> tuple[str, ...]:
    """The nodes that ran on another provider than the given one, as `name (operator)`."""
    expected = PROVIDER_NAMES[provider]
    return tuple(f"{node.name} ({node.operator})" for node in nodes if node.provider != expected)
