"""A phone's fitness to be measured: temperature, battery, screen; and what shows that it throttled.

A warm phone runs slower for reasons that have nothing to do with the graph. A measurement begins at
thermal status 0 and a battery no warmer than the limit, waiting for both; a battery that is nearly
empty, battery saver, a dark screen, and charging where that is not wanted are refused at once, for
waiting does not help. A measurement that throttled on the way says by which sign.
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
"""A last quarter of the runs that takes so many times the first one's time is a sign of throttling."""
_POLL_SECONDS = 10.0


@dataclass(frozen=True)
class ThermalConfig:
    """When a phone is fit to be measured."""

    battery_limit_celsius: Annotated[float, Range(0, 100)] = 37.0
    """A measurement begins only below this battery temperature."""
    wait_seconds: Annotated[float, Range(0, 86_400)] = 300.0
    """How long to wait for the phone to cool down before giving up."""
    poll_seconds: Annotated[float, Range(0.01, 3600)] = 5.0
    """Time between two looks while waiting."""
    lowest_battery_percent: Annotated[float, Range(0, 100)] = 20.0
    """A battery that is emptier is refused: many phones lower their clocks then."""
    allow_charging: bool = True
    """Charging warms a phone and is always recorded; without this it is refused, which over USB takes
    wireless debugging or a charge limit in the phone's settings."""
    allow_dark_screen: bool = False
    """Measure although the screen stays off; many phones lower their clocks then."""

    def __post_init__(self) -> None:
        check_ranges(self, "thermal")


@dataclass(frozen=True)
class PhoneState:
    """Temperatures, power and clocks at one moment."""

    thermal: Thermal
    battery: Battery
    frequencies_khz: dict[int, int]
    is_awake: bool | None = None
    """Whether the screen is on."""
    battery_saver: bool | None = None
    memory: Memory = field(default_factory=Memory)

    def to_json(self) -> dict[str, Any]:
        """For a record's conditions."""
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
    """Processor -> kHz of a cpufreq file; without those that are off or will not say."""
    paths = [f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/{file}" for cpu in cpus]
    return parse_frequencies(phone.attempt(["grep", "-H", ".", *paths]).stdout) if paths else {}


def read_state(phone: AdbPhone, cpus: list[int]) -> PhoneState:
    """Temperatures, power and clocks now. Android 9 and older have no thermal service."""
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
    """Refuse what waiting does not cure; what a phone does not say is fine.

    Raises:
        DeviceError: for a battery that is nearly empty, battery saver, or charging that is not allowed.
    """
    percent = state.battery.level_percent
    if percent is not None and percent < config.lowest_battery_percent:
        raise DeviceError(
            f"its battery is at {percent:.0f}%, below {config.lowest_battery_percent:.0f}%",
            where="phone",
            remedy="charge it, let it cool down, then measure again",
        )
    if state.battery_saver:
        raise DeviceError(
            "battery saver is on, which lowers the clocks",
            where="phone",
            remedy="turn it off in the phone's settings",
        )
    if state.battery.is_charging and not config.allow_charging:
        raise DeviceError(
            "it is charging, which was not to be allowed",
            where="phone",
            remedy="attach it over wireless debugging, or allow charging",
        )


def require_screen(state: PhoneState, config: ThermalConfig) -> None:
    """Refuse a phone whose screen is off although it was to be on.

    Raises:
        DeviceError: unless the configuration allows it.
    """
    if state.is_awake is False and not config.allow_dark_screen:
        raise DeviceError(
            "its screen stays off, and clocks may be lowered then",
            where="phone",
            remedy="wake it and unlock it, then measure again",
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
        DeviceError: when the phone stays warm for the configured time, or is unfit in another way.
    """
    deadline = clock() + config.wait_seconds
    while not is_cool(state := read(), config):
        require_fit(state, config)
        if clock() >= deadline:
            raise DeviceError(
                f"the phone stays warm (thermal status {state.thermal.status}, battery "
                f"{state.battery.temperature_celsius} °C)",
                where="phone",
                remedy="let it cool down out of its case and off the charger, then measure again",
            )
        sleep(config.poll_seconds)
    require_fit(state, config)
    return state


class StatePolling:
    """Reads a phone's state every ten seconds, beside a run that is long enough for it.

    Shorter runs are left undisturbed. A phone that is lost meanwhile is told by the run itself.
    """

    def __init__(self, read: Callable[[], PhoneState], seconds: float):
        self._read, self._wanted = read, seconds > _POLL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.states: list[tuple[float, PhoneState]] = []
        """Seconds since the run was begun, and the state then."""

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
    """How a phone showed that it throttled; empty when it did not.

    Args:
        states: during and after the runs.
        samples_ms: the runs of each graph.
        frequencies_mhz: of the cores it ran on, over the time of the runs.
    """
    signs = []
    if worst := max((state.thermal.status or 0 for state in states), default=0):
        signs.append(f"its thermal status rose to {worst}")
    ratio = max((slowdown(samples) or 0 for samples in samples_ms), default=0)
    if ratio >= SLOWDOWN_LIMIT:
        signs.append(f"the last quarter of the runs took {ratio:.2f} times as long as the first")
    for core, clocks in frequencies_mhz.items():
        known = [clock for clock in clocks if clock is not None]
        quarter = max(len(known) // 4, 1)
        if len(known) >= 8 and max(known[-quarter:]) * SLOWDOWN_LIMIT < max(known[:quarter]):
            signs.append(
                f"{core} fell from {max(known[:quarter]):.0f} to {max(known[-quarter:]):.0f} MHz"
            )
    return signs
