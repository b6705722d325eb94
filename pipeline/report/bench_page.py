"""The page of a benchmark: every device with its latencies, its temperature and its conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device.bench_record import DeviceBench
from device.comparison import Comparison
from lightfield.latency import DeviceIdentity
from pipeline.report.charts import latency_chart
from pipeline.report.document import document
from pipeline.report.latency import device_facts, device_part, throttling_warning
from pipeline.report.layout import facts, figure, section, unavailable
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import interval, milliseconds, share, whole

PAGE = "bench.html"


def bench_page(title: str, benches: Sequence[DeviceBench], failed: Sequence[str]) -> str:
    """The whole page."""
    parts = [
        section(f"device-{number}", heading(bench.device), device_part(bench, number=number))
        for number, bench in enumerate(benches, 1)
    ]
    lost = [element("p", f"Not measured: {reason}", class_="warning") for reason in failed]
    return document(f"{title}: latency", _header(title, "benchmark"), *lost, *parts)


def heading(device: DeviceIdentity) -> str:
    """A device's name, with what tells it from others of its kind."""
    return f"{device.name}, unit {device.unit}" if device.unit else device.name


def comparison_page(names: tuple[str, str], found: Comparison) -> str:
    """The page of two students in turns on one device."""
    first, second = names
    between = found.interval
    title = f"{first} against {second}"
    if found.candidate.device.emulated:
        content = unavailable("an emulated device's times mean nothing and are not shown")
        return document(title, _header(title, "comparison"), section("ratio", "Ratio", content))
    records = {first: found.candidate, second: found.reference}
    content = fragment(
        throttling_warning(found.candidate),
        element(
            "p",
            f"{first} takes {share(between.ratio)} of the time of {second} (interval "
            f"{interval(between.low, between.high)}, {between.confidence:.0%} confidence): "
            f"{between.verdict}.",
            class_="lead",
        ),
        figure(
            latency_chart(records),
            "Both in turns, later runs higher: what slowed the device down slowed both.",
        ),
        facts(
            [
                ("Rounds", whole(between.rounds)),
                *((f"Median, {name}", milliseconds(r.p50_ms)) for name, r in records.items()),
                *((f"File, {name}", f"{r.model}, {r.model_sha256}") for name, r in records.items()),
            ]
        ),
        element(
            "p",
            "The ratio is the median over the rounds; its interval is bootstrapped over the rounds in "
            "blocks of neighbors.",
        ),
        device_facts(found.candidate.device),
    )
    return document(title, _header(title, "comparison"), section("ratio", "Ratio", content))


def _header(title: str, kind: str) -> Html:
    return element(
        "header",
        element("p", f"Neural light field · {kind}", class_="kicker"),
        element("h1", Path(title).name),
    )
