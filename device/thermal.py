"""Thermal and power conditions of a phone: checks before a measurement, and signs of throttling.

A warm phone runs slower for reasons that have nothing to do with the graph. A measurement waits for
thermal status 0 and a battery below the temperature limit. A nearly empty battery, battery saver, a dark
screen, and unwanted charging are errors at once, because waiting does not help. A record lists the signs
of throttling during its measurement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any

from device.adb import AdbPhone
from device.adb_output import (
    Battery,
    Memory,
    Thermal,
    parse_battery,
    parse_frequencies,
    parse_meminfo,
    parse_thermal,
    parse_wakefulness,
)
from lightfield.errors import AdbError, DeviceError
from lightfield.latency import slowdown
from lightfield.ranges import Range, check_ranges

SLOWDOWN_LIMIT = 1.1
"""Ratio of the time of the last quarter of the runs to the first quarter's, from which on it counts as a
sign of throttling."""
_POLL_SECONDS = 10.0


@dataclass(frozen=True)
class ThermalConfig:
    """Conditions that a phone must meet before a measurement starts."""

    battery_limit_celsius: Annotated[float, Range(0, 100)] = 37.0
    """Maximum battery temperature in degrees Celsius at the start of a measurement."""
    wait_seconds: Annotated[float, Range(0, 86_400)] = 300.0
    """Maximum time to wait for the phone to cool down, in seconds; after that, the measurement fails."""
    poll_seconds: Annotated[float, Range(0.01, 3600)] = 5.0
    """Time between two checks of the temperature while waiting, in seconds."""
    lowest_battery_percent: Annotated[float, Range(0, 100)] = 20.0
    """Minimum battery level in percent, because many phones lower their clocks at low levels."""
    allow_charging: bool = True
    """Measure while the phone charges. Charging warms the phone and is always recorded. To avoid
    charging, attach the phone by wireless debugging or set a charge limit in the phone's settings."""
    allow_dark_screen: bool = False
    """Measure even if the screen stays off; many phones lower their clocks then."""

    def __post_init__(self) -> None:
        check_ranges(self, "thermal")


@dataclass(frozen=True)
class PhoneState:
    """Temperatures, battery, memory and clock frequencies of a phone at one moment."""

    thermal: Thermal
    battery: Battery
    frequencies_khz: dict[int, int]
    is_awake: bool | None = None
    """Whether the screen is on; None if the phone does not tell."""
    battery_saver: bool | None = None
    memory: Memory = field(default_factory=Memory)

    def to_json(self) -> dict[str, Any]:
        """The state as plain data, for a record's conditions."""
        return {
            "thermal_status": self.thermal.status,
            "temperatures_celsius": self.thermal.temperatures_celsius,
            "battery_celsius": self.battery.temperature_celsius,
            "battery_percent": self.battery.level_percent,
            "is_charging": self.battery.is_charging,
            "is_plugged": self.battery.is_plugged,
            "is_awake": self.is_awake,
            "battery_saver": self.battery_saver,
            "memory_available_bytes": self.memory.available_bytes,
            "frequencies_khz": {str(cpu): khz for cpu, khz in self.frequencies_khz.items()},
        }


def read_frequencies(phone: AdbPhone, cpus: list[int], file: str) -> dict[int, int]:
    """Read frequencies, processor -> kHz, from a cpufreq file; unreadable processors are left out."""
    paths = [f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/{file}" for cpu in cpus]
    return parse_frequencies(phone.attempt(["grep", "-H", ".", *paths]).stdout) if paths else {}


def read_state(phone: AdbPhone, cpus: list[int]) -> PhoneState:
    """Read the current state. Android 9 and older have no thermal service."""
    saver = phone.attempt(["settings", "get", "global", "low_power"]).stdout.strip()
    return PhoneState(
        thermal=parse_thermal(phone.attempt(["dumpsys", "thermalservice"]).stdout),
        battery=parse_battery(phone.attempt(["dumpsys", "battery"]).stdout),
        frequencies_khz=read_frequencies(phone, cpus, "scaling_cur_freq"),
        is_awake=parse_wakefulness(phone.attempt(["dumpsys", "power"]).stdout),
        battery_saver={"0": False, "1": True}.get(saver),
        memory=parse_meminfo(phone.attempt(["cat", "/proc/meminfo"]).stdout),
    )


def require_fit(state: PhoneState, config: ThermalConfig) -> None:
    """Check the conditions that waiting does not change; unknown values pass.

    Raises:
        DeviceError: for a nearly empty battery, battery saver, or charging that is not allowed.
    """
    percent = state.battery.level_percent
    if percent is not None and percent < config.lowest_battery_percent:
        raise DeviceError(
            f"the battery level is {percent:.0f}%, below {config.lowest_battery_percent:.0f}%",
            where="phone",
            remedy="charge the phone, let it cool down, then measure again",
        )
    if state.battery_saver:
        raise DeviceError(
            "battery saver is on, which lowers the clocks",
            where="phone",
            remedy="turn battery saver off in the phone's settings",
        )
    if state.battery.is_charging and not config.allow_charging:
        raise DeviceError(
            "the phone is charging, which --thermal.no-allow-charging forbids",
            where="phone",
            remedy="attach the phone by wireless debugging, or allow charging",
        )


def require_screen(state: PhoneState, config: ThermalConfig) -> None:
    """Check that the screen is on.

    Raises:
        DeviceError: when the screen is off and the configuration does not allow that.
    """
    if state.is_awake is False and not config.allow_dark_screen:
        raise DeviceError(
            "the screen stays off, which may lower the clocks",
            where="phone",
            remedy="wake and unlock the phone, then measure again",
        )


def is_cool(state: PhoneState, config: ThermalConfig) -> bool:
    """Whether the thermal status is 0 and the battery is within the limit; unknown values pass."""
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
    """Wait until the phone is cool; return its state.

    Raises:
        DeviceError: when the phone stays warm for the configured time, or fails another check.
    """
    deadline = clock() + config.wait_seconds
    while not is_cool(state := read(), config):
        require_fit(state, config)
        if clock() >= deadline:
            raise DeviceError(
                f"the phone stays warm (thermal status {state.thermal.status}, battery "
                f"{state.battery.temperature_celsius} °C)",
                where="phone",
                remedy="let the phone cool down out of its case and off the charger, then measure again",
            )
        sleep(config.poll_seconds)
    require_fit(state, config)
    return state


class StatePolling:
    """Background thread that reads a phone's state every ten seconds during a measurement.

    Shorter measurements are not polled, so that they are not disturbed. If the phone is lost, polling
    stops, and the measurement itself raises the error.
    """

    def __init__(self, read: Callable[[], PhoneState], seconds: float):
        self._read, self._wanted = read, seconds > _POLL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.states: list[tuple[float, PhoneState]] = []
        """Pairs of seconds since the start of the measurement and the state at that time."""

    def __enter__(self) -> StatePolling:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._wanted:
            self._thread.join()

    def _poll(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self.states.append((time.monotonic() - began, self._read()))
            except AdbError:
                return


def throttling_signs(
    states: Sequence[PhoneState],
    samples_ms: Sequence[Sequence[float]],
    frequencies_mhz: Mapping[str, Sequence[float | None]],
) -> list[str]:
    """Signs that the phone throttled during a measurement; empty if there are none.

    Args:
        states: states during and after the runs.
        samples_ms: latencies of the runs of each graph.
        frequencies_mhz: frequencies, over the time of the runs, of the cores that ran the graphs.
    """
    signs = []
    if worst := max((state.thermal.status or 0 for state in states), default=0):
        signs.append(f"the thermal status rose to {worst}")
    ratio = max((slowdown(samples) or 0 for samples in samples_ms), default=0)
    if ratio >= SLOWDOWN_LIMIT:
        signs.append(f"the last quarter of the runs took {ratio:.2f} times as long as the first")
    for core, clocks in frequencies_mhz.items():
        known = [clock for clock in clocks if clock is not None]
        quarter = max(len(known) // 4, 1)
        if len(known) >= 8 and max(known[-quarter:]) * SLOWDOWN_LIMIT < max(known[:quarter]):
            signs.append(
                f"the clock of {core} fell from {max(known[:quarter]):.0f} to "
                f"{max(known[-quarter:]):.0f} MHz"
            )
    return signs
