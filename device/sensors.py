"""Sensors in /sys, clock frequencies and temperatures, which the runner reads between runs.

A sensor is a file with one number. Thermal zones report thousandths of a degree Celsius according to the
kernel's interface; some makers report tenths or whole degrees, which are recognized by plausibility.
Implausible values (an absent sensor reads 0, -274000 or 999999) become None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from device.adb_output import is_temperature

CPU_FOLDER = "/sys/devices/system/cpu"
ZONES = "/sys/class/thermal"
LIST_ZONES = f"grep -H . {ZONES}/thermal_zone*/type {ZONES}/thermal_zone*/temp"
"""Shell command that prints `FILE:CONTENT` of every readable thermal zone."""

_KINDS = (
    r"skin|shell|quiet|back|case",
    r"batt",
    r"soc|cpu|big|mid|little|gold|silver|apc|tsens|x86_pkg|coretemp|package",
    r"gpu",
)
"""Names of the zones to record; a phone has up to a hundred zones."""
_ZONES_OF_A_KIND = 2
_MOST_CORES = 16
_MOST_MHZ = 10_000


@dataclass(frozen=True)
class Sensor:
    """A file with one number, the quantity it measures, and the factor that converts it to the unit."""

    name: str
    path: str
    quantity: Literal["temperature_celsius", "frequency_mhz"]
    factor: float


@dataclass(frozen=True)
class ConditionCurve:
    """Sensor values over the time of a measurement; None for unreadable or implausible values."""

    at_seconds: tuple[float, ...]
    temperatures_celsius: dict[str, tuple[float | None, ...]]
    frequencies_mhz: dict[str, tuple[float | None, ...]]

    def to_json(self) -> dict[str, Any]:
        """The curve as plain data, with lists instead of tuples."""
        return json.loads(json.dumps(asdict(self)))


def clock_sensors(cpus: Sequence[int]) -> list[Sensor]:
    """Sensors of the current frequency of each processor."""
    return [
        Sensor(
            f"cpu{cpu}", f"{CPU_FOLDER}/cpu{cpu}/cpufreq/scaling_cur_freq", "frequency_mhz", 1e-3
        )
        for cpu in cpus[:_MOST_CORES]
    ]


def zone_sensors(text: str) -> list[Sensor]:
    """Sensors of the thermal zones to record, from the output of LIST_ZONES."""
    types = dict(re.findall(r"^(\S+)/type:(.+)$", text, re.MULTILINE))
    values = dict(re.findall(r"^(\S+)/temp:(-?\d+)$", text, re.MULTILINE))
    sensors: list[Sensor] = []
    for kind in _KINDS:
        of_kind = 0
        for zone, name in types.items():
            factor = _factor(int(values.get(zone, 0)))
            known = any(sensor.path == f"{zone}/temp" for sensor in sensors)
            if factor is None or known or not re.search(kind, name, re.IGNORECASE):
                continue
            sensors.append(Sensor(name.strip(), f"{zone}/temp", "temperature_celsius", factor))
            of_kind += 1
            if of_kind == _ZONES_OF_A_KIND:
                break
    return sensors


def _factor(value: int) -> float | None:
    """Factor that converts a zone's number into degrees; None if the number is not a temperature.

    The ranges of whole degrees, tenths and thousandths do not overlap, so the unit is unambiguous.
    """
    factors = ((5_000, 130_000, 1e-3), (130, 1_300, 0.1), (5, 130, 1.0))
    return next((factor for low, high, factor in factors if low <= value < high), None)


def host_sensors() -> list[Sensor]:
    """Sensors of this machine; empty if it has none."""
    zones = "".join(
        f"{path}:{content}\n"
        for path in sorted(Path(ZONES).glob("thermal_zone*/t[ey][mp]p*"))
        if (content := _content(path))
    )
    cpus = [int(path.name[3:]) for path in Path(CPU_FOLDER).glob("cpu[0-9]*")]
    clocks = [sensor for sensor in clock_sensors(sorted(cpus)) if _content(Path(sensor.path))]
    return clocks + zone_sensors(zones)


def _content(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def condition_curve(
    sensors: Sequence[Sensor], rows: Sequence[Sequence[float]]
) -> ConditionCurve | None:
    """Convert a runner's rows (milliseconds, then one value per sensor); None without sensors."""
    if not sensors or not rows:
        return None
    series: dict[str, dict[str, tuple[float | None, ...]]] = {
        "temperature_celsius": {},
        "frequency_mhz": {},
    }
    for column, sensor in enumerate(sensors, 1):
        values = [row[column] for row in rows]
        read = tuple(_measured(sensor, value) for value in values)
        if any(value is not None for value in read):
            names = series[sensor.quantity]
            name = sensor.name if sensor.name not in names else f"{sensor.name} ({column})"
            names[name] = read
    return ConditionCurve(
        tuple(round(row[0] / 1e3, 3) for row in rows),
        series["temperature_celsius"],
        series["frequency_mhz"],
    )


def _measured(sensor: Sensor, number: float) -> float | None:
    """Convert a number to the sensor's unit; None if the value is implausible."""
    value = round(number * sensor.factor, 3)
    if sensor.quantity == "temperature_celsius":
        return value if is_temperature(value) else None
    return value if 0 < value < _MOST_MHZ else None
