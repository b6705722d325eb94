"""Reads what phones print: getprop, dumpsys, /sys. Text in, values out; talks to nothing.

Formats are those of Android 7 to 16 (AOSP: BatteryService, ThermalManagerService, PowerManagerService,
toolbox getprop) with the additions of makers, who print more lines but not other ones. A value that a
phone does not print is None, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

EMULATION_MARKER = "debug.nelf.emulated"
"""Property that declares a device emulated, for those that cannot be told from a phone."""

_PROPERTY = re.compile(r"^\[([^\]]+)\]: \[(.*?)\]$", re.MULTILINE | re.DOTALL)
_TEMPERATURE = re.compile(
    r"Temperature\{mValue=([^,}]+), mType=(-?\d+), mName=([^,}]*), mStatus=(\d+)\}"
)
_TEMPERATURE_TYPES = {
    0: "cpu",
    1: "gpu",
    2: "battery",
    3: "skin",
    9: "npu",
    10: "tpu",
    11: "display",
}
_EMULATOR_HARDWARE = {"goldfish", "ranchu", "cutf_cvm", "cutf", "vbox86", "vsoc_x86", "vsoc_arm64"}
_CHARGING = {2: True, 5: True, 3: False, 4: False}


def parse_getprop(text: str) -> dict[str, str]:
    """All system properties; values may span lines."""
    return dict(_PROPERTY.findall(text.replace("\r\n", "\n")))


@dataclass(frozen=True)
class PhoneIdentity:
    """Who a phone is, from its properties."""

    maker: str
    model: str
    chip: str
    android: str
    api: int | None
    build: str
    abis: tuple[str, ...]
    emulated: bool

    @property
    def name(self) -> str:
        """Maker, model and chip in one line."""
        maker = "" if self.model.lower().startswith(self.maker.lower()) else f"{self.maker} "
        chip = f" ({self.chip})" if self.chip else ""
        return f"{maker}{self.model}{chip}".strip() or "unknown phone"

    @property
    def system(self) -> str:
        """Android's version, API level and build."""
        api = f" (API {self.api})" if self.api is not None else ""
        return f"Android {self.android or '?'}{api}{f' {self.build}' if self.build else ''}"


def phone_identity(properties: Mapping[str, str]) -> PhoneIdentity:
    """Who the phone is. The chip is the maker's name for it where the phone knows that (Android 12),
    else the board platform."""

    def first(*keys: str) -> str:
        return next((properties[key].strip() for key in keys if properties.get(key)), "")

    api = first("ro.build.version.sdk")
    chip = f"{first('ro.soc.manufacturer')} {first('ro.soc.model')}".strip()
    return PhoneIdentity(
        maker=first("ro.product.manufacturer", "ro.product.brand").title(),
        model=first("ro.product.model", "ro.product.name"),
        chip=chip or first("ro.board.platform", "ro.hardware"),
        android=first("ro.build.version.release_or_codename", "ro.build.version.release"),
        api=int(api) if api.isdecimal() else None,
        build=first("ro.build.id"),
        abis=tuple(first("ro.product.cpu.abilist", "ro.product.cpu.abi").split(",")),
        emulated=is_emulated(properties),
    )


def is_emulated(properties: Mapping[str, str]) -> bool:
    """True for emulators (goldfish, ranchu, cuttlefish and others) and for what says that it is one."""
    flags = ("ro.kernel.qemu", "ro.boot.qemu", EMULATION_MARKER)
    if any(properties.get(flag) == "1" for flag in flags):
        return True
    hardware = {properties.get(key, "").lower() for key in ("ro.hardware", "ro.boot.hardware")}
    return bool(hardware & _EMULATOR_HARDWARE)


@dataclass(frozen=True)
class Battery:
    """What `dumpsys battery` says."""

    temperature_celsius: float | None = None
    level_percent: float | None = None
    is_charging: bool | None = None
    """Charging or full, from the battery's status."""
    is_plugged: bool | None = None


def parse_battery(text: str) -> Battery:
    """Read `dumpsys battery`. Of a key that is printed twice the first counts: some makers append a log
    of past values. A battery that is not there, or whose values somebody has frozen (`dumpsys battery
    unplug`), says nothing."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):  # a maker's log begins
            break
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip().lower(), value.strip())
    if fields.get("present") == "false" or "UPDATES STOPPED" in text:
        return Battery()
    tenths, level = _integer(fields.get("temperature")), _integer(fields.get("level"))
    scale, status = _integer(fields.get("scale")) or 100, _integer(fields.get("status"))
    plugs = [value for key, value in fields.items() if key.endswith(" powered")]
    return Battery(
        temperature_celsius=tenths / 10 if tenths else None,  # emulators print 0
        level_percent=100 * level / scale if level is not None else None,
        is_charging=_CHARGING.get(status) if status is not None else None,
        is_plugged="true" in plugs if plugs else None,
    )


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


@dataclass(frozen=True)
class Thermal:
    """What `dumpsys thermalservice` says."""

    status: int | None = None
    """0 none, 1 light, 2 moderate, 3 severe, 4 critical, 5 emergency, 6 shutdown."""
    temperatures_celsius: dict[str, float] = field(default_factory=dict)
    """Sensor name -> temperature."""


def parse_thermal(text: str) -> Thermal:
    """Read `dumpsys thermalservice`: the hardware's present values, else the cached ones. Sensors of
    voltage, current and charge limits, which share the format, are left out."""
    status = re.search(r"^\s*Thermal Status: (\d+)\s*$", text, re.MULTILINE)
    _, _, current = text.partition("Current temperatures from HAL:")
    current, _, _ = current.partition("Current cooling devices")
    readings: dict[str, float] = {}
    for value, kind, name, _ in _TEMPERATURE.findall(current) or _TEMPERATURE.findall(text):
        try:
            celsius = float(value)
        except ValueError:
            continue
        # an absent sensor reads 0, NaN or absurdly low
        if int(kind) in _TEMPERATURE_TYPES and 0 < celsius < 200:
            readings[name or _TEMPERATURE_TYPES[int(kind)]] = celsius
    return Thermal(int(status[1]) if status else None, readings)


@dataclass(frozen=True)
class Memory:
    """What /proc/meminfo says."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    """What programs can still get without swapping; None before Linux 3.14."""


def parse_meminfo(text: str) -> Memory:
    """Read /proc/meminfo."""
    pairs = re.findall(r"^(\w+): +(\d+) kB$", text.replace("\r\n", "\n"), re.MULTILINE)
    sizes = {key: int(kib) * 1024 for key, kib in pairs}
    return Memory(sizes.get("MemTotal"), sizes.get("MemAvailable"))


def parse_wakefulness(text: str) -> bool | None:
    """True when `dumpsys power` says that the screen is awake, None when it does not say."""
    match = re.search(r"^\s*mWakefulness=(\w+)", text, re.MULTILINE)
    return match[1] == "Awake" if match else None


def parse_cpu_list(text: str) -> list[int]:
    """A kernel list of processors, for example `0-3,6`."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first = int(match[1])
            cpus += range(first, int(match[2] or first) + 1)
    return cpus


def parse_frequencies(text: str) -> dict[int, int]:
    """Processor -> kHz, from `grep -H . /sys/devices/system/cpu/cpu*/cpufreq/FILE`."""
    pairs = re.findall(r"^\S*/cpu(\d+)/cpufreq/\w+:(\d+)$", text, re.MULTILINE)
    return {int(cpu): int(khz) for cpu, khz in pairs}


def parse_free_bytes(text: str) -> int | None:
    """Free space from `stat -f -c '%a %S' FOLDER`: blocks and their size."""
    match = re.fullmatch(r"(\d+) (\d+)", text.strip())
    return int(match[1]) * int(match[2]) if match else None


def fast_cores(max_frequencies_khz: Mapping[int, int], threads: int) -> list[int]:
    """The fastest kinds of core, as many kinds as it takes to hold the threads; none when all cores are
    alike."""
    kinds = sorted(set(max_frequencies_khz.values()), reverse=True)
    cores: list[int] = []
    for kind in kinds:
        if len(cores) >= threads:
            break
        cores += [cpu for cpu, khz in max_frequencies_khz.items() if khz == kind]
    return sorted(cores) if len(cores) < len(max_frequencies_khz) else []
