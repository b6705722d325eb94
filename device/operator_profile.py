"""Where a graph's time goes, operator by operator, and which provider ran each: ONNX Runtime's trace.

The trace is JSON in the form of Chrome's tracing: an event per node and run, called `NAME_kernel_time`,
with its duration in microseconds, operator and provider. Warm-up runs are in it too, so only the last
runs of each node count. Writing it slows the runs down: shares are true, sums are more than a latency.
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
    """One node of the graph as it was run, after ONNX Runtime's fusions."""

    name: str
    operator: str
    provider: str
    median_ms: float


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator on one provider."""

    operator: str
    provider: str
    nodes: int
    total_ms: float
    """Sum of the nodes' medians."""
    share: float
    """Of all nodes' time."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def read_profile(path: Path, runs: int) -> tuple[NodeTime, ...]:
    """The nodes of a trace of one graph, in the order they ran, from its last `runs` runs.

    Raises:
        DeviceError: when it is no such trace, or holds no node.
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
        raise DeviceError("ONNX Runtime's trace names no node")
    return tuple(NodeTime(*key, statistics.median(each[-runs:])) for key, each in times.items())


def operator_times(nodes: Iterable[NodeTime]) -> tuple[OperatorTime, ...]:
    """Grouped by operator and provider, the costliest first."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        groups[node.operator, node.provider].append(node.median_ms)
    all_ms = sum(map(sum, groups.values()))
    times = [
        OperatorTime(*key, len(each), sum(each), sum(each) / all_ms if all_ms else 0.0)
        for key, each in groups.items()
    ]
    return tuple(sorted(times, key=lambda time: -time.total_ms))


def fallen_back(nodes: Iterable[NodeTime], provider: Provider) -> tuple[str, ...]:
    """The nodes that another provider than the one asked for ran, as `name (operator)`."""
    asked = PROVIDER_NAMES[provider]
    return tuple(f"{node.name} ({node.operator})" for node in nodes if node.provider != asked)
