"""Parsers for the output of adb and of phones: device lists, getprop, dumpsys, /sys.

The functions take text and return values; they access no device. The formats are those of Android 7
to 16 (AOSP: BatteryService, ThermalManagerService, PowerManagerService, toolbox getprop). Makers print
additional lines but do not change these. A value that a phone does not print is None, never a guess.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

EMULATION_MARKER = "debug.nelf.emulated"
"""Property that declares a device emulated; for emulators that look like a real phone."""

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
_CHARGING = {2: True, 5: True, 3: False, 4: False}
_PLAUSIBLE_CELSIUS = (1.0, 130.0)

# `adb devices -l`: "%-22s %s" of serial number and state, then words KEY:VALUE. Both the serial number
# ("adb-X (2)._adb-tls-connect._tcp") and the state ("no permissions (...); see [...]") may contain
# blanks.
_DEVICE_LINE = re.compile(
    r"(?P<serial>\S.*?)\s+(?P<state>no permissions.*?|\S+)(?P<tags>(?:\s\S+:.*)?)"
)

# Names of hardware, products and services of Android in a virtual machine or a container. The patterns
# are matched at the start of the lower-case text.
_VIRTUAL_HARDWARE = re.compile(
    "goldfish|ranchu|cutf|vsoc_|gce_|vbox|ttvm|nox$|memu|ldplayer|mumu|nemu|cheets|bertha|arcvm|"
    "windows_|android_x86|waydroid|anbox|redroid|crosvm|bluestacks|bst"
)
_VIRTUAL_PRODUCT = re.compile(
    "sdk_|google_sdk|emulator|emu64|generic_x86|vbox86|aosp_cf_|cf_x86|vsoc_|waydroid|lineage_waydroid|"
    "redroid|anbox|bluestacks|goldfish|ranchu|"
    "(windows )?subsystem for android|genymotion|android sdk built for"
)
_VIRTUAL_PROPERTY = re.compile(
    r"ro\.boot\.qemu\.|(ro\.)?(genymotion|genyd|androvm|microvirt|waydroid|bst|nemud?|redroid)\.|"
    r"init\.svc\.(qemu|goldfish|ranchu|vbox|genyd|nox|ldinit|bst|microvirt|memu|nemu|waydroid)"
)
_ABI_PROPERTY = re.compile(r"ro\.(\w+\.)?product\.cpu\.abi(list(32|64)?)?")
_HARDWARE_KEYS = ("ro.hardware", "ro.boot.hardware", "ro.board.platform")
_PRODUCT_KEYS = tuple(
    f"ro.{part}{key}"
    for part in ("product.", "product.vendor.", "product.system.")
    for key in ("device", "model", "name", "board")
)

_SERIAL_KEYS = ("ro.serialno", "ro.boot.serialno")
_NO_SERIALS = (
    *("unknown", "none", "null", "(null)", "n/a", "default", "20080411"),
    *("0123456789abcdef", "123456789abcdef", "1234567890abcdef"),
)
"""Placeholders, complete or truncated, of phones that were given no serial number."""
_SHORTEST_SERIAL = 8

_MAKERS = {"samsung": "Samsung", "motorola": "Motorola", "asus": "ASUS", "xiaomi": "Xiaomi"}
"""Proper spelling of makers whose property is spelled differently."""


@dataclass(frozen=True)
class AttachedPhone:
    """A line of `adb devices -l`."""

    serial: str
    state: str
    """`device` if the phone is usable; otherwise `unauthorized`, `offline`, `no permissions`, ..."""
    model: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Values after the state, by key: `usb`, `product`, `model`, `device`, `transport_id`."""

    @property
    def is_ready(self) -> bool:
        """Whether the phone accepts commands."""
        return self.state == "device"

    def is_called(self, name: str) -> bool:
        """Whether a name other than the serial number means this phone, by adb's own rules.

        Such a name is one of the tags (`usb:1-2`, `model:Pixel_8`), or the address without its port or
        with a protocol.
        """
        if name in (f"{key}:{value}" for key, value in self.tags.items()):
            return True
        address = re.sub("^(tcp|udp):", "", name)
        return ":" in self.serial and address in (self.serial, self.serial.rpartition(":")[0])


def parse_device_list(text: str) -> list[AttachedPhone]:
    """Parse the answer to `host:devices-l`."""
    phones: list[AttachedPhone] = []
    for line in text.splitlines():
        if found := _DEVICE_LINE.fullmatch(line.strip()):
            state = "no permissions" if found["state"].startswith("no perm") else found["state"]
            tags = dict(re.findall(r"(\w+):(\S+)", found["tags"]))
            phones.append(AttachedPhone(found["serial"], state, tags.get("model", ""), tags))
    return phones


def parse_getprop(text: str) -> dict[str, str]:
    """Parse all system properties; values may span several lines."""
    return dict(_PROPERTY.findall(text.replace("\r\n", "\n")))


@dataclass(frozen=True)
class PhoneIdentity:
    """Maker, model, chip, Android version and processor types of a phone."""

    maker: str
    model: str
    chip: str
    android: str
    api: int | None
    build: str
    abis: tuple[str, ...]
    emulated: bool
    unit: str
    """Hash that identifies the phone without revealing its serial number; it does not depend on how the
    phone is attached."""

    @property
    def name(self) -> str:
        """Maker, model and chip."""
        maker = "" if self.model.lower().startswith(self.maker.lower()) else f"{self.maker} "
        chip = f" ({self.chip})" if self.chip else ""
        return f"{maker}{self.model}{chip}".strip() or "unknown phone"

    @property
    def system(self) -> str:
        """Android's version, API level and build."""
        api = f" (API {self.api})" if self.api is not None else ""
        return f"Android {self.android or '?'}{api}{f' {self.build}' if self.build else ''}"


def phone_identity(
    properties: Mapping[str, str], *, android_id: str = "", cpuinfo: str = ""
) -> PhoneIdentity:
    """Derive the phone's identity from its properties.

    The chip is the maker's name of the chip (Android 12 or later), otherwise the board platform.

    Args:
        properties: system properties, as getprop prints them.
        android_id: random identifier from the setup of Android; empty if unknown.
        cpuinfo: text of /proc/cpuinfo; empty if it cannot be read.
    """

    def first(*keys: str) -> str:
        return next((properties[key].strip() for key in keys if properties.get(key)), "")

    api = first("ro.build.version.sdk")
    chip = f"{first('ro.soc.manufacturer')} {first('ro.soc.model')}".strip()
    maker = first("ro.product.manufacturer", "ro.product.brand")
    return PhoneIdentity(
        maker=_MAKERS.get(maker, maker),
        model=first("ro.product.model", "ro.product.name"),
        chip=chip or first("ro.board.platform", "ro.hardware"),
        android=first("ro.build.version.release_or_codename", "ro.build.version.release"),
        api=int(api) if api.isdecimal() else None,
        build=first("ro.build.id"),
        abis=tuple(first("ro.product.cpu.abilist", "ro.product.cpu.abi").split(",")),
        emulated=is_emulated(properties, cpuinfo),
        unit=_unit(properties, android_id),
    )


def serial_number(properties: Mapping[str, str]) -> str:
    """The serial number that the maker gave the phone, whatever name adb uses; empty without one."""
    numbers = (properties.get(key, "").strip() for key in _SERIAL_KEYS)
    return next((number for number in numbers if _is_own(number.lower())), "")


def _is_own(number: str) -> bool:
    is_beginning = len(number) >= _SHORTEST_SERIAL and any(
        s.startswith(number) for s in _NO_SERIALS
    )
    return len(set(number)) > 1 and number not in _NO_SERIALS and not is_beginning


def _unit(properties: Mapping[str, str], android_id: str) -> str:
    """Eight digits of a hash of the most specific identifier that the phone has."""
    known = serial_number(properties) or android_id
    if not known:
        keys = (*_SERIAL_KEYS, *_HARDWARE_KEYS, *_PRODUCT_KEYS, "ro.build.fingerprint")
        known = "\n".join(properties.get(key, "") for key in keys)
    return hashlib.sha256(f"nelf:{known}".encode()).hexdigest()[:8]


def is_emulated(properties: Mapping[str, str], cpuinfo: str = "") -> bool:
    """Whether latencies of the device are meaningless.

    That is so for emulators, for Android in a virtual machine or a container on a computer, for
    processors that translate Arm code, and for devices with a property that declares them emulated.
    """
    flags = ("ro.kernel.qemu", "ro.boot.qemu", EMULATION_MARKER)
    return (
        any(properties.get(flag) == "1" for flag in flags)
        or any(_VIRTUAL_HARDWARE.match(properties.get(key, "").lower()) for key in _HARDWARE_KEYS)
        or any(_VIRTUAL_PRODUCT.match(properties.get(key, "").lower()) for key in _PRODUCT_KEYS)
        or any(_VIRTUAL_PROPERTY.match(key.lower()) for key in properties)
        or "emulator" in properties.get("ro.build.characteristics", "")
        or _translates_arm(properties, cpuinfo)
    )


def _translates_arm(properties: Mapping[str, str], cpuinfo: str) -> bool:
    """Whether the processor is not an Arm processor and translates Arm code.

    An Arm phone lists only Arm ABIs and has no Arm translator, and an Arm kernel prints no `vendor_id`.
    """
    lists = (value for key, value in properties.items() if _ABI_PROPERTY.fullmatch(key))
    abis = [abi.strip() for each in lists for abi in each.split(",")]
    has_vendor = re.search(r"^vendor_id\s*:", cpuinfo, re.MULTILINE) is not None
    bridge = properties.get("ro.dalvik.vm.native.bridge", "")
    is_translated = re.search("houdini|ndk_translation", bridge) is not None
    return has_vendor or is_translated or any(abi and not abi.startswith("arm") for abi in abis)


def is_temperature(celsius: float) -> bool:
    """Whether a value is plausible as a temperature in a running phone.

    An absent sensor reads 0, NaN, absolute zero, or a meaningless number.
    """
    coldest, hottest = _PLAUSIBLE_CELSIUS
    return coldest <= celsius <= hottest


@dataclass(frozen=True)
class Battery:
    """Battery state from `dumpsys battery`."""

    temperature_celsius: float | None = None
    level_percent: float | None = None
    is_charging: bool | None = None
    """Whether the battery's status is charging or full."""
    is_plugged: bool | None = None


def parse_battery(text: str) -> Battery:
    """Parse `dumpsys battery`.

    If a key is printed twice, the first one counts, because some makers append a log of past values. All
    values are None if there is no battery, or if its values are frozen (`dumpsys battery unplug`).
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):  # start of a maker's log
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
        temperature_celsius=tenths / 10 if tenths and is_temperature(tenths / 10) else None,
        level_percent=100 * level / scale if level is not None else None,
        is_charging=_CHARGING.get(status) if status is not None else None,
        is_plugged="true" in plugs if plugs else None,
    )


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


@dataclass(frozen=True)
class Thermal:
    """Thermal state from `dumpsys thermalservice`."""

    status: int | None = None
    """0 none, 1 light, 2 moderate, 3 severe, 4 critical, 5 emergency, 6 shutdown."""
    temperatures_celsius: dict[str, float] = field(default_factory=dict)
    """Sensor name -> temperature."""


def parse_thermal(text: str) -> Thermal:
    """Parse `dumpsys thermalservice`: the current values of the hardware, otherwise the cached ones.

    Sensors of voltage, current and charge limits have the same format and are left out.
    """
    status = re.search(r"^\s*Thermal Status: (\d+)\s*$", text, re.MULTILINE)
    _, _, current = text.partition("Current temperatures from HAL:")
    current, _, _ = current.partition("Current cooling devices")
    readings: dict[str, float] = {}
    for value, kind, name, _ in _TEMPERATURE.findall(current) or _TEMPERATURE.findall(text):
        try:
            celsius = float(value)
        except ValueError:
            continue
        if int(kind) in _TEMPERATURE_TYPES and is_temperature(celsius):
            readings[name or _TEMPERATURE_TYPES[int(kind)]] = celsius
    return Thermal(int(status[1]) if status else None, readings)


@dataclass(frozen=True)
class Memory:
    """Memory sizes from /proc/meminfo."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    """Memory that programs can still use without swapping; None before Linux 3.14."""


def parse_meminfo(text: str) -> Memory:
    """Parse /proc/meminfo."""
    pairs = re.findall(r"^(\w+): +(\d+) kB$", text.replace("\r\n", "\n"), re.MULTILINE)
    sizes = {key: int(kib) * 1024 for key, kib in pairs}
    return Memory(sizes.get("MemTotal"), sizes.get("MemAvailable"))


def parse_wakefulness(text: str) -> bool | None:
    """Whether the screen is awake according to `dumpsys power`; None if it does not tell."""
    match = re.search(r"^\s*mWakefulness=(\w+)", text, re.MULTILINE)
    return match[1] == "Awake" if match else None


def parse_cpu_list(text: str) -> list[int]:
    """Parse a kernel list of processors, for example `0-3,6`."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first = int(match[1])
            cpus += range(first, int(match[2] or first) + 1)
    return cpus


def parse_frequencies(text: str) -> dict[int, int]:
    """Parse `grep -H . /sys/devices/system/cpu/cpu*/cpufreq/FILE`: processor -> kHz."""
    pairs = re.findall(r"^\S*/cpu(\d+)/cpufreq/\w+:(\d+)$", text, re.MULTILINE)
    return {int(cpu): int(khz) for cpu, khz in pairs}


def mount_options(text: str, folder: str) -> set[str]:
    """Mount options of the file system that holds a folder, from /proc/mounts; empty if unknown."""
    mounts = [line.split() for line in text.splitlines()]
    over = [m for m in mounts if len(m) > 3 and f"{folder}/".startswith(f"{m[1].rstrip('/')}/")]
    return set(max(over, key=lambda m: len(m[1]))[3].split(",")) if over else set()


def parse_free_bytes(text: str) -> int | None:
    """Parse the free space from `stat -f -c '%a %S' FOLDER`: number of blocks and their size."""
    match = re.fullmatch(r"(\d+) (\d+)", text.strip())
    return int(match[1]) * int(match[2]) if match else None


def fast_cores(max_frequencies_khz: Mapping[int, int], threads: int) -> list[int]:
    """The fastest cores: as many kinds of cores as the threads need; none if all are of one kind."""
    kinds = sorted(set(max_frequencies_khz.values()), reverse=True)
    cores: list[int] = []
    for kind in kinds:
        if len(cores) >= threads:
            break
        cores += [cpu for cpu, khz in max_frequencies_khz.items() if khz == kind]
    return sorted(cores) if len(cores) < len(max_frequencies_khz) else []
