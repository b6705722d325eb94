"""The benchmark of one device: its graphs with their charts, conditions and operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from device.bench_record import DeviceBench, GraphBench
from device.operator_profile import OperatorTime
from lightfield.latency import LatencyRecord
from pipeline.report.charts import latency_chart, thermal_chart
from pipeline.report.quantities import (
    NOT_AVAILABLE,
    as_number,
    as_text,
    milliseconds,
    plural,
    whole,
)

NAMES = {"dense_student": "Dense student", "pose_to_image": "Pose to image"}
SHOWN_OPERATORS = 12
HIDDEN_CONDITIONS = ("cpu_ms", "at_ms", "curve", "during")
"""Long series: they are drawn, or only in the JSON record."""


@dataclass(frozen=True)
class DeviceLatency:
    """What a page shows of one device, by the title of a graph or measurement."""

    bench: DeviceBench
    emulated: bool
    graphs: dict[str, GraphBench]
    latencies: dict[str, LatencyRecord]
    """The short measurements."""
    sustained: dict[str, LatencyRecord]
    """The measurements as long as an app would run."""
    runs: Markup | None
    """The chart of the short measurements."""
    thermal: tuple[str, Markup] | None
    """The title and chart of the longest measurement that can be drawn over time."""


def device_latency(
    bench: DeviceBench, *, number: int = 1, pruned: bool = False, emulated: bool = False
) -> DeviceLatency:
    """The data of a page's `number`-th device.

    Args:
        pruned: whether the benchmark's student is the pruned one.
        emulated: whether the run says that the device is emulated.
    """
    emulated = emulated or bench.device.emulated
    names = {**NAMES, "student": "Pruned student" if pruned else "Student"}
    graphs = {}
    for graph in bench.graphs:
        name = names.get(graph.name, graph.name)
        graphs[name if graph.precision == "fp32" else f"{name}, {graph.precision}"] = graph
    latencies = {title: graph.latency for title, graph in graphs.items() if graph.latency}
    sustained = {
        f"{t}, sustained": graph.sustained for t, graph in graphs.items() if graph.sustained
    }
    runs = thermal = None
    if latencies and not emulated:
        runs = latency_chart(latencies, name=f"latency {number}")
        charts = (
            (title, thermal_chart(record, title, name=f"thermal {number}"))
            for title, record in (sustained | latencies).items()
        )
        thermal = next(((title, chart) for title, chart in charts if chart is not None), None)
    return DeviceLatency(bench, emulated, graphs, latencies, sustained, runs, thermal)


def throttling(record: LatencyRecord) -> str:
    """The signs that the device throttled; empty when it did not."""
    signs = record.conditions.get("throttling")
    if not record.conditions.get("throttled") or not isinstance(signs, Sequence):
        return ""
    return "; ".join(map(str, signs))


def shown_operators(operators: Sequence[OperatorTime]) -> list[OperatorTime]:
    """The most expensive operators; the last row is the sum of all others."""
    shown, rest = list(operators[:SHOWN_OPERATORS]), operators[SHOWN_OPERATORS:]
    if rest:
        nodes, total_ms = sum(each.nodes for each in rest), sum(each.total_ms for each in rest)
        shown.append(OperatorTime("others", "", nodes, total_ms, sum(e.share for e in rest)))
    return shown


def device_name(device: dict[str, Any]) -> str:
    """Device, runtime and threads in one phrase."""
    name, runtime = (str(device.get(field) or "unknown") for field in ("name", "runtime"))
    return f"{name} with {runtime}, {plural(device.get('threads'), 'thread')}"


def conditions(record: LatencyRecord) -> dict[str, str]:
    """The conditions of a measurement as text."""
    data = {
        "file": record.model,
        "sha256": record.model_sha256,
        "warm-up runs": whole(record.warmup_runs),
        "CPU time (median)": _cpu_time(record.conditions.get("cpu_ms")),
    }
    shown = {name: v for name, v in record.conditions.items() if name not in HIDDEN_CONDITIONS}
    return data | flattened(shown)


def _cpu_time(values: object) -> str:
    numbers = [as_number(value) for value in values] if isinstance(values, list | tuple) else []
    known = [number for number in numbers if number is not None]
    if not known:
        return NOT_AVAILABLE
    return f"{milliseconds(float(np.median(known)))} per run, which excludes waiting"


def flattened(value: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested data as text, by their joined names."""
    if isinstance(value, dict):
        leaves: dict[str, str] = {}
        for key, inner in value.items():
            leaves |= flattened(inner, f"{name} {key.replace('_', ' ')}".lstrip())
        return leaves
    if isinstance(value, list | tuple):
        return {name: ", ".join(map(str, value)) or "none"}
    if isinstance(value, bool):
        return {name: "yes" if value else "no"}
    return {name: f"{value:.4g}" if isinstance(value, float) else as_text(value)}
