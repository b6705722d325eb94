"""A benchmark program of the user's own on a phone: run, read, shown."""

from __future__ import annotations

from pathlib import Path

from device.adb import open_phone
from device.adb_server import connect
from device.thermal import ThermalConfig
from device.tools import ToolConfig, ToolMeasurement, measure_with_tool
from lightfield.files import write_json
from pipeline.console import Console

FIGURES = {
    "p50_ms": "median", "p90_ms": "90th percentile", "p99_ms": "99th percentile", "mean_ms": "mean",
    "min_ms": "least", "max_ms": "most", "load_ms": "load", "first_run_ms": "first run",
}  # fmt: skip


def bench_tool(
    config: ToolConfig,
    thermal: ThermalConfig,
    serial: str | None,
    json: Path | None,
    console: Console,
) -> ToolMeasurement:
    """Measure with the program, print what it said, and write it down when a file is given.

    Raises:
        DeviceError: when the phone is not fit, or the program fails or says nothing.
    """
    found = measure_with_tool(open_phone(connect(), serial), config, thermal)
    device, figures = found.device, found.figures
    console.say(f"{config.kind} on {device.name}, {device.system}, {device.threads} thread(s)")
    if device.emulated:
        console.say("an emulated device: its times mean nothing and are not shown")
    else:
        for name, title in FIGURES.items():
            value = getattr(figures, name)
            if value is not None:
                console.say(f"{value:12.3f} ms  {title}")
        console.say(f"{figures.fps:12.1f} FPS over {figures.runs} runs")
    for sign in found.conditions["throttling"]:
        console.say(f"throttled: {sign}")
    if json is not None:
        write_json(json, found.to_json())
        console.say(f"record: {json}")
    return found
