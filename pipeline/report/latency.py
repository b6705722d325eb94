"""What the bench measured: every graph's statistics and runs, the devices and how they fared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from device.bench_record import DeviceBench, GraphBench
from device.operator_profile import OperatorTime
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
    DOES_NOT_APPLY,
    NOT_AVAILABLE,
    as_number,
    decibels,
    fixed,
    interval,
    milliseconds,
    plural,
    scientific,
    share,
    size,
    whole,
)
from pipeline.report.thermal_chart import thermal_chart

NAMES = {
    "dense_student": "Dense student",
    "student": "Student",
    "pose_to_image": "Pose to image",
}
SHOWN_OPERATORS = 12
UNSHOWN = ("cpu_ms", "at_ms", "curve", "during")
"""Conditions that are long series; they are drawn, or stand in the JSON record."""
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
    benches, failed = chain.benches()
    names = {**NAMES, "student": "Pruned student"} if chain.pruned_files else NAMES
    several = len(benches) > 1
    emulated = chain.emulated("bench")
    parts = [
        fragment(
            element("h3", bench.device.name) if several else None,
            device_part(bench, names, emulated=emulated, number=number),
        )
        for number, bench in enumerate(benches, 1)
    ]
    lost = [element("p", f"Not measured: {reason}", class_="warning") for reason in failed]
    return fragment(outdated(chain.outdated("bench")), *lost, *parts)


def device_part(
    bench: DeviceBench,
    names: Mapping[str, str] = NAMES,
    *,
    emulated: bool = False,
    number: int = 1,
) -> Html:
    """Everything that was measured on one device, the page's `number`-th; of an emulated one, no
    figure."""
    device = bench.device
    if device.emulated or emulated:
        reason = f"{device.name} is an emulated device; its times mean nothing and are not shown"
        return fragment(unavailable(reason), device_facts(device))
    timed = {title(graph, names): graph for graph in bench.graphs if graph.latency is not None}
    records = {name: graph.latency for name, graph in timed.items() if graph.latency is not None}
    refused = [
        unavailable(graph.refused, f"{title(graph, names)}: speed")
        for graph in bench.graphs
        if graph.refused
    ]
    return fragment(
        element("p", HOST_NOTE) if device.kind != "phone" else None,
        *refused,
        *(throttling_warning(record, name) for name, record in records.items()),
        *(
            throttling_warning(graph.sustained, f"{name}, sustained")
            for name, graph in timed.items()
            if graph.sustained is not None
        ),
        _speeds(timed) if timed else None,
        _images_and_costs(timed) if timed else None,
        side_by_side(_runs(records, number), _thermal(timed, number)) if timed else None,
        side_by_side(_circumstances(bench, records), _operators(timed)),
    )


def title(graph: GraphBench, names: Mapping[str, str] = NAMES) -> str:
    """A graph's name as the page calls it, with its precision where that is not fp32."""
    name = names.get(graph.name, graph.name)
    return name if graph.precision == "fp32" else f"{name}, {graph.precision}"


def throttling_warning(record: LatencyRecord, name: str = "The device") -> Html | None:
    """Above figures that were got from a device that throttled."""
    signs = record.conditions.get("throttling")
    if not record.conditions.get("throttled") or not isinstance(signs, Sequence):
        return None
    return element("p", f"{name}: throttled: {'; '.join(map(str, signs))}.", class_="warning")


def _speeds(graphs: Mapping[str, GraphBench]) -> Html:
    head = ["graph", "p50", "p90", "p99", "mean", "min", "FPS", "sustained FPS", "runs"]
    rows = []
    for name, graph in graphs.items():
        assert graph.latency is not None
        figures = graph.latency.statistics()
        times = [milliseconds(figures[f"{key}_ms"]) for key in ("p50", "p90", "p99", "mean", "min")]
        rows.append(
            [
                name,
                *times,
                _frames(figures["fps"]),
                DOES_NOT_APPLY if graph.sustained_fps is None else _frames(graph.sustained_fps),
                whole(figures["runs"]),
            ]
        )
    caption = (
        "Wall-clock time of one run. FPS is 1000 ms over the median; the sustained figure is that of "
        "the last quarter of a pass as long as an app would run. “Pose to image” includes the rays."
    )
    return table(head, rows, caption=caption)


def _frames(fps: float) -> str:
    return fixed(fps, 0 if fps >= 100 else 1)


def _images_and_costs(graphs: Mapping[str, GraphBench]) -> Html:
    head = ["graph", "PSNR", "max. error", "× yardstick", "interval", "load", "memory", "file"]
    rows = []
    for name, graph in graphs.items():
        assert graph.latency is not None
        near, ratio = graph.fidelity, graph.reference_ratio
        equal = near is not None and near.psnr_db is None
        rows.append(
            [
                name,
                "∞" if equal else decibels(near.psnr_db if near else None),
                scientific(near.max_error if near else None),
                share(ratio.ratio if ratio else None),
                interval(ratio.low, ratio.high) if ratio else DOES_NOT_APPLY,
                milliseconds(graph.latency.load_ms),
                size(graph.latency.peak_memory_bytes),
                size(graph.latency.model_bytes),
            ]
        )
    caption = (
        "PSNR and largest error compare the device's images of real test poses with the host's in "
        "full precision, the worst of them; ∞ means equal to the last bit. The yardstick is a small "
        "graph that never changes, run in turns with each: its ratio (95% interval) survives a warm "
        "device. Load is the time until the graph is ready, memory what the process grew by at its "
        "peak, in a pass of its own."
    )
    return table(head, rows, caption=caption)


def _runs(records: Mapping[str, LatencyRecord], number: int) -> Html:
    return figure(
        latency_chart(records, name=f"latency {number}"),
        "The measured runs, later ones higher: a cloud that leans shows a device that warmed up or was "
        "disturbed. A few runs far beyond the slowest graph's 90th percentile lie outside.",
    )


def _thermal(graphs: Mapping[str, GraphBench], number: int) -> Html | None:
    """The longest pass that says when its runs were; the sustained one where there is one."""
    passes = [(f"{name}, sustained", g.sustained) for name, g in graphs.items()]
    passes += [(name, g.latency) for name, g in graphs.items()]
    for name, record in passes:
        chart = None if record is None else thermal_chart(record, name, name=f"thermal {number}")
        if chart is not None:
            return figure(
                chart,
                f"{name}: every run with its moving median, and what the device's own sensors said "
                "meanwhile, as far as it lets them be read.",
            )
    return None


def _operators(graphs: Mapping[str, GraphBench]) -> Html:
    parts = []
    for name, graph in graphs.items():
        if graph.fallback_nodes:
            text = f"{name}: {plural(len(graph.fallback_nodes), 'node')} ran on another provider"
            parts.append(folded(text, element("p", ", ".join(graph.fallback_nodes))))
        if graph.operators:
            parts.append(folded(f"Operators: {name}", _operator_table(graph.operators)))
    return element("div", *parts)


def _operator_table(operators: Sequence[OperatorTime]) -> Html:
    rows = [
        [each.operator, each.provider.removesuffix("ExecutionProvider"), whole(each.nodes),
         milliseconds(each.total_ms), f"{each.share:.1%}"]
        for each in operators[:SHOWN_OPERATORS]
    ]  # fmt: skip
    rest = operators[SHOWN_OPERATORS:]
    if rest:
        rows.append(["others", "", whole(sum(each.nodes for each in rest)),
                     milliseconds(sum(each.total_ms for each in rest)),
                     f"{sum(each.share for each in rest):.1%}"])  # fmt: skip
    caption = (
        "After ONNX Runtime's fusions. Tracing slows the runs down: shares are true, sums are more "
        "than the latency."
    )
    head = ["operator", "provider", "nodes", "time", "share"]
    return table(head, rows, caption=caption, words=(0, 1))


def _circumstances(bench: DeviceBench, records: Mapping[str, LatencyRecord]) -> Html:
    conditions = [
        folded(f"Conditions: {name}", facts(_conditions(record)))
        for name, record in records.items()
    ]
    protocol = [pair for name, value in bench.protocol.items() for pair in _flat(name, value)]
    versions = [(name, str(version)) for name, version in bench.versions.items()]
    return element(
        "div",
        device_facts(bench.device, measured_at=bench.measured_at),
        *conditions,
        folded("Protocol", facts(protocol)),
        folded("Versions on the machine that measured", facts(versions)),
    )


def device_facts(device: DeviceIdentity, *, measured_at: str | None = None) -> Html:
    """Which device, with which software."""
    kind = f"{'emulated ' if device.emulated else ''}{device.kind}"
    pairs = [
        ("Device", f"{device.name} ({kind}{f', unit {device.unit}' if device.unit else ''})"),
        ("System", device.system),
        ("Runtime", f"{device.runtime}, {device.provider}"),
        ("Threads", plural(device.threads, "thread")),
    ]
    return facts([*pairs, ("Measured", measured_at)] if measured_at else pairs)


def _conditions(record: LatencyRecord) -> list[tuple[str, str]]:
    pairs = [
        ("file", record.model),
        ("sha256", record.model_sha256),
        ("warm-up runs", whole(record.warmup_runs)),
        ("processor time (median)", _processor_time(record.conditions.get("cpu_ms"))),
    ]
    for name, value in record.conditions.items():
        if name not in UNSHOWN:
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
    text = name.replace("_", " ")
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(f"{name} {key}", inner)]
    if isinstance(value, list | tuple):
        return [(text, ", ".join(str(item) for item in value) or "none")]
    if isinstance(value, bool):
        return [(text, "yes" if value else "no")]
    if isinstance(value, float):
        return [(text, f"{value:.4g}")]
    return [(text, NOT_AVAILABLE if value is None else str(value))]
