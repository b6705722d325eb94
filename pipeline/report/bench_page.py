"""The pages of a benchmark and of a comparison of two students."""

from __future__ import annotations

from collections.abc import Sequence

from device.bench_record import DeviceBench
from device.comparison import Comparison
from pipeline.report.charts import latency_chart
from pipeline.report.device_latency import device_latency
from pipeline.report.pages import page

PAGE = "bench.html"


def bench_page(title: str, benches: Sequence[DeviceBench], failed: Sequence[str]) -> str:
    """Every device with its latencies, its temperature and its conditions."""
    devices = [device_latency(bench, number=i) for i, bench in enumerate(benches, 1)]
    return page("bench.html.j2", name=title, devices=devices, failed=failed)


def comparison_page(names: tuple[str, str], found: Comparison) -> str:
    """Two students in interleaved runs on one device."""
    records = dict(zip(names, (found.candidate, found.reference), strict=True))
    chart = latency_chart(records)
    return page("comparison.html.j2", names=names, records=records, found=found, chart=chart)
