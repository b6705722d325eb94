"""The `bench-tool` command: runs a third-party benchmark program on a phone and prints its results."""

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
    "min_ms": "minimum", "max_ms": "maximum", "load_ms": "load", "first_run_ms": "first run",
}  # fmt: skip


def bench_tool(
    config: ToolConfig,
    thermal: ThermalConfig,
    serial: str | None,
    json: Path | None,
    console: Console,
) -> ToolMeasurement:
    """Run the program, print its results, and write them to the JSON file if one is given.

    Raises:
        DeviceError: when the phone's conditions do not allow a measurement, or when the program fails or
            prints no result.
    """
    measurement = measure_with_tool(open_phone(connect(), serial), config, thermal)
    device, figures = measurement.device, measurement.figures
    console.say(f"{config.kind} on {device.name}, {device.system}, {device.threads} thread(s)")
    if device.emulated:
        console.say("emulated device: latencies are meaningless and not shown")
    else:
        for name, title in FIGURES.items():
            value = getattr(figures, name)
            if value is not None:
                console.say(f"{value:12.3f} ms  {title}")
        console.say(f"{figures.fps:12.1f} FPS over {figures.runs} runs")
    for sign in measurement.conditions["throttling"]:
        console.say(f"throttled: {sign}")
    if json is not None:
        write_json(json, measurement.to_json())
        console.say(f"record: {json}")
    return measurement
