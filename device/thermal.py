"""A phone's temperature around a measurement: wait until it is cool, say when it was not.

A warm phone runs slower for reasons that have nothing to do with the graph. A measurement begins at
thermal status 0 and a battery no warmer than the limit; one that ends at another status is marked as
throttled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from device.adb import AdbPhone
from device.adb_output import Battery, Thermal, parse_battery, parse_frequencies, parse_thermal
from lightfield.errors import ConfigError, DeviceError


@dataclass(frozen=True)
class ThermalConfig:
    """When a phone is cool enough to be measured."""

    battery_limit_celsius: float = 37.0
    """A measurement begins only below this battery temperature."""
    wait_seconds: float = 300.0
    """How long to wait for the phone to cool down before giving up."""
    poll_seconds: float = 5.0
    """Time between two looks while waiting."""

    def __post_init__(self) -> None:
        if self.wait_seconds < 0 or self.poll_seconds <= 0:
            raise ConfigError("waiting times must be positive", where="thermal")


@dataclass(frozen=True)
class PhoneState:
    """Temperatures, power and clocks at one moment."""

    thermal: Thermal
    battery: Battery
    frequencies_khz: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """For a record's conditions."""
        return {
            "thermal_status": self.thermal.status,
            "temperatures_celsius": self.thermal.temperatures_celsius,
            "battery_celsius": self.battery.temperature_celsius,
            "battery_percent": self.battery.level_percent,
            "is_charging": self.battery.is_charging,
            "is_plugged": self.battery.is_plugged,
            "frequencies_khz": {str(cpu): khz for cpu, khz in self.frequencies_khz.items()},
        }


def read_frequencies(phone: AdbPhone, cpus: list[int], file: str) -> dict[int, int]:
    """Processor -> kHz of a cpufreq file; without those that are off or will not say."""
    paths = [f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/{file}" for cpu in cpus]
    return parse_frequencies(phone.attempt(["grep", "-H", ".", *paths]).stdout) if paths else {}


def read_state(phone: AdbPhone, cpus: list[int]) -> PhoneState:
    """Temperatures, power and clocks now. Android 9 and older have no thermal service."""
    return PhoneState(
        thermal=parse_thermal(phone.attempt(["dumpsys", "thermalservice"]).stdout),
        battery=parse_battery(phone.attempt(["dumpsys", "battery"]).stdout),
        frequencies_khz=read_frequencies(phone, cpus, "scaling_cur_freq"),
    )


def is_cool(state: PhoneState, config: ThermalConfig) -> bool:
    """True at thermal status 0 and a battery within the limit; what a phone does not say is fine."""
    celsius = state.battery.temperature_celsius
    warm = celsius is not None and celsius > config.battery_limit_celsius
    return not warm and not state.thermal.status


def wait_until_cool(
    read: Callable[[], PhoneState],
    config: ThermalConfig,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> PhoneState:
    """The first cool state.

    Raises:
        DeviceError: when the phone stays warm for the configured time.
    """
    deadline = clock() + config.wait_seconds
    while not is_cool(state := read(), config):
        if clock() >= deadline:
            raise DeviceError(
                f"the phone stays warm (thermal status {state.thermal.status}, battery "
                f"{state.battery.temperature_celsius} °C)",
                where="phone",
                remedy="let it cool down out of its case and off the charger, then measure again",
            )
        sleep(config.poll_seconds)
    return state
