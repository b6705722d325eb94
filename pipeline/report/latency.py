"""What the bench measured: every graph's statistics, its runs, the device and its condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightfield.errors import CheckpointError
from lightfield.latency import DeviceIdentity, LatencyRecord
from pipeline.report.chain import Chain
from pipeline.report.charts import latency_chart
from pipeline.report.layout import (
    facts,
    figure,
    folded,
    or_reason,
    outdated,
    section,
    side_by_side,
    table,
    unavailable,
)
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import (
    NOT_AVAILABLE,
    as_number,
    fixed,
    milliseconds,
    plural,
    size,
    whole,
)

NAMES = {
    "dense_student": "Dense student",
    "student": "Student",
    "pose_to_picture": "Pose to picture",
}
HOST_NOTE = fragment(
    "These are a host's figures. A phone's processor, caches and runtime differ, so the milliseconds do "
    "not carry over to one; attach a phone and run ",
    element("code", "nelf bench"),
    " to have them.",
)


def latency_section(chain: Chain) -> Html:
    """Statistics and circumstances of the bench."""
    return section("latency", "Latency", or_reason(lambda: _content(chain)))


def _content(chain: Chain) -> Html:
    records = chain.latencies()
    device = next(iter(records.values())).device
    if any(record.device != device for record in records.values()):
        raise CheckpointError("the graphs were not all measured on one device")
    if device.emulated or chain.emulated("bench"):
        reason = f"{device.name} is an emulated device; its times mean nothing and are not shown"
        return fragment(unavailable(reason), _device(device))
    names = {**NAMES, "student": "Pruned student"} if chain.pruned_files else NAMES
    return fragment(
        outdated(chain.outdated("bench")),
        element("p", HOST_NOTE) if device.kind != "phone" else None,
        _statistics(records, names),
        side_by_side(_runs(records, names), _circumstances(device, records, names)),
    )


def _runs(records: Mapping[str, LatencyRecord], names: Mapping[str, str]) -> Html:
    return figure(
        latency_chart(records, names),
        "The measured runs, later ones higher: a cloud that leans shows a device that warmed up or was "
        "disturbed. Runs beyond the slowest graph's 99th percentile lie outside.",
    )


def _circumstances(
    device: DeviceIdentity, records: Mapping[str, LatencyRecord], names: Mapping[str, str]
) -> Html:
    conditions = [
        folded(f"Conditions: {names.get(name, name)}", facts(_conditions(record)))
        for name, record in records.items()
    ]
    return element("div", _device(device), *conditions)


def _statistics(records: Mapping[str, LatencyRecord], names: Mapping[str, str]) -> Html:
    head = ["graph", "mean", "p50", "p90", "p99", "min", "FPS", "runs", "load", "memory", "file"]
    rows = []
    for name, record in records.items():
        figures = record.statistics()
        times = [milliseconds(figures[f"{key}_ms"]) for key in ("mean", "p50", "p90", "p99", "min")]
        rows.append(
            [
                names.get(name, name),
                *times,
                fixed(figures["fps"], 0 if figures["fps"] >= 100 else 1),
                whole(figures["runs"]),
                milliseconds(record.load_ms),
                size(record.peak_memory_bytes),
                size(record.model_bytes),
            ]
        )
    caption = (
        "Wall-clock time of one run. FPS is 1000 ms over the median. Load is the time until the graph "
        "is ready, memory what the process grew by at its peak. “Pose to picture” includes the rays."
    )
    return table(head, rows, caption=caption)


def _device(device: DeviceIdentity) -> Html:
    return facts(
        [
            ("Device", f"{device.name} ({'emulated ' if device.emulated else ''}{device.kind})"),
            ("System", device.system),
            ("Runtime", f"{device.runtime}, {device.provider}"),
            ("Threads", plural(device.threads, "thread")),
        ]
    )


def _conditions(record: LatencyRecord) -> list[tuple[str, str]]:
    pairs = [
        ("file", record.model),
        ("sha256", record.model_sha256),
        ("warm-up runs", whole(record.warmup_runs)),
    ]
    for name, value in record.conditions.items():
        if name == "cpu_ms":
            pairs.append(("processor time (median)", _processor_time(value)))
        else:
            pairs += _flat(str(name), value)
    return pairs


def _processor_time(values: object) -> str:
    """What a run costs whoever else uses the processor; not what a user waits."""
    numbers = [as_number(v) for v in values] if isinstance(values, list | tuple) else []
    known = [number for number in numbers if number is not None]
    if not known:
        return NOT_AVAILABLE
    return f"{milliseconds(float(np.median(known)))} of work a run, which is not a waiting time"


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    title = name.replace("_", " ")
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(f"{name} {key}", inner)]
    if isinstance(value, list):
        return [(title, ", ".join(str(item) for item in value) or "none")]
    if isinstance(value, bool):
        return [(title, "yes" if value else "no")]
    if isinstance(value, float):
        return [(title, f"{value:.4g}")]
    return [(title, NOT_AVAILABLE if value is None else str(value))]
