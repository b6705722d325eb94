"""Processor names from the text of /proc/cpuinfo.

x86 kernels print a `model name`. Arm kernels print the implementer (0x41 is Arm, 0x51 Qualcomm) and the
part number of every core; some add a `Hardware` line with the name of the chip.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_ARM, _QUALCOMM = 0x41, 0x51
_ARM_CORES = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
    0xD4B: "Cortex-A78C",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD4F: "Neoverse-V2",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
    0xD85: "Cortex-X925",
    0xD87: "Cortex-A725",
}
_QUALCOMM_CORES = {
    0x001: "Oryon",
    0x002: "Oryon 2",
    0x800: "Kryo 2xx Gold",
    0x801: "Kryo 2xx Silver",
    0x802: "Kryo 3xx Gold",
    0x803: "Kryo 3xx Silver",
    0x804: "Kryo 4xx Gold",
    0x805: "Kryo 4xx Silver",
}
_CORES = {_ARM: _ARM_CORES, _QUALCOMM: _QUALCOMM_CORES}


@dataclass(frozen=True)
class Processor:
    """Cores and chip of a machine."""

    cores: tuple[str, ...]
    """One name per core, in the kernel's order."""
    chip: str | None
    """Text of the `Hardware` line."""

    def __str__(self) -> str:
        counts = Counter(self.cores)
        parts = [name if len(counts) == 1 else f"{n}x {name}" for name, n in counts.items()]
        return " + ".join(parts) or self.chip or "unknown processor"


def parse_cpuinfo(text: str) -> Processor:
    """Parse /proc/cpuinfo of an x86 or Arm kernel."""
    cores: list[str] = []
    chip = None
    for block in text.split("\n\n"):
        fields = _fields(block)
        chip = fields.get("Hardware", chip)
        if "processor" not in fields:
            continue
        cores.append(_arm_core(fields) or fields.get("model name") or _arm_numbers(fields))
    return Processor(tuple(cores), chip)


def _fields(block: str) -> dict[str, str]:
    pairs = [line.split(":", 1) for line in block.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def _arm_core(fields: dict[str, str]) -> str | None:
    """Name of an Arm core by its part number; the `model name` of some Arm kernels is not specific."""
    numbers = _numbers(fields)
    return None if numbers is None else _CORES.get(numbers[0], {}).get(numbers[1])


def _arm_numbers(fields: dict[str, str]) -> str:
    numbers = _numbers(fields)
    return "unknown core" if numbers is None else f"core {numbers[0]:#04x}/{numbers[1]:#05x}"


def _numbers(fields: dict[str, str]) -> tuple[int, int] | None:
    try:
        return int(fields["CPU implementer"], 0), int(fields["CPU part"], 0)
    except (KeyError, ValueError):
        return None
