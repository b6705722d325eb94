"""Clocks and temperatures that a kernel shows in /sys, which the runner reads between turns.

A sensor is a file with one number. Thermal zones give thousandths of a degree, as the kernel's
interface says; some makers give tenths or whole degrees, told apart by what can be a temperature. What
cannot be one (an absent sensor reads 0, -274000 or 999999) is left out of a curve, value by value.
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
"""For a shell: prints `FILE:CONTENT` of every zone that may be read."""

_KINDS = (
    r"skin|shell|quiet|back|case",
    r"batt",
    r"soc|cpu|big|mid|little|gold|silver|apc|tsens|x86_pkg|coretemp|package",
    r"gpu",
)
"""Zones worth watching, by name; a phone has up to a hundred."""
_ZONES_OF_A_KIND = 2
_MOST_CORES = 16
_MOST_MHZ = 10_000


@dataclass(frozen=True)
class Sensor:
    """A file, what its number is, and how to turn it into the unit."""

    name: str
    path: str
    quantity: Literal["temperature_celsius", "frequency_mhz"]
    factor: float


@dataclass(frozen=True)
class ConditionCurve:
    """What the sensors said during a measurement; None where one could not be read, or said what it
    cannot have measured."""

    at_seconds: tuple[float, ...]
    temperatures_celsius: dict[str, tuple[float | None, ...]]
    frequencies_mhz: dict[str, tuple[float | None, ...]]

    def to_json(self) -> dict[str, Any]:
        """For a record's conditions, as it comes back from a file."""
        return json.loads(json.dumps(asdict(self)))


def clock_sensors(cpus: Sequence[int]) -> list[Sensor]:
    """The present frequency of each processor."""
    return [
        Sensor(
            f"cpu{cpu}", f"{CPU_FOLDER}/cpu{cpu}/cpufreq/scaling_cur_freq", "frequency_mhz", 1e-3
        )
        for cpu in cpus[:_MOST_CORES]
    ]


def zone_sensors(text: str) -> list[Sensor]:
    """The zones worth watching, from what LIST_ZONES printed."""
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
    """What turns a zone's number into degrees, None for a number that is no temperature. The ranges of
    whole degrees, tenths and thousandths do not meet, so no number is taken for another's."""
    factors = ((5_000, 130_000, 1e-3), (130, 1_300, 0.1), (5, 130, 1.0))
    return next((factor for low, high, factor in factors if low <= value < high), None)


def host_sensors() -> list[Sensor]:
    """Those of this machine; none where it shows none."""
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
    """The curve of a runner's rows (milliseconds, then one value per sensor); None without sensors."""
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
    """A file's number in the sensor's unit, None for one that the sensor cannot have measured."""
    value = round(number * sensor.factor, 3)
    if sensor.quantity == "temperature_celsius":
        return value if is_temperature(value) else None
    return value if 0 < value < _MOST_MHZ else None
