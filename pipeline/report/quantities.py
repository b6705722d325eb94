"""Formatting of numbers for the report's pages: few digits, a unit, `not available` for no number.

Values come from files, so every function accepts any object. The templates use them as filters.
"""

from __future__ import annotations

import math

NOT_AVAILABLE = "not available"
DOES_NOT_APPLY = "–"


def as_number(value: object) -> float | None:
    """The value as a float; None when it is not a number or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def finite(value: object) -> float | None:
    """The value as a float; None when it is not a number, NaN or infinite."""
    number = as_number(value)
    return None if number is None or math.isinf(number) else number


def fixed(value: object, digits: int, unit: str = "") -> str:
    """A number with this many digits after the decimal point."""
    number = as_number(value)
    if number is None:
        return NOT_AVAILABLE
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    text = f"{number:z,.{digits}f}".replace("-", "−")
    return f"{text} {unit}" if unit else text


def decibels(value: object) -> str:
    """`27.71 dB`."""
    return fixed(value, 2, "dB")


def milliseconds(value: object) -> str:
    """Three significant digits, at most three after the point: `0.412 ms`, `41.2 ms`."""
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    digits = max(0, 2 - int(math.log10(number))) if number >= 1 else 3
    return fixed(number, digits, "ms")


def ratio(value: object) -> str:
    """`0.489`."""
    return fixed(value, 3)


def interval(low: object, high: object) -> str:
    """`0.472 to 0.503`."""
    if as_number(low) is None or as_number(high) is None:
        return f"interval {NOT_AVAILABLE}"
    return f"{ratio(low)} to {ratio(high)}"


def whole(value: object) -> str:
    """`104,307`."""
    return fixed(value, 0)


def plural(value: object, noun: str) -> str:
    """`1 thread`, `3 threads`."""
    return f"{whole(value)} {noun}" + ("" if value == 1 else "s")


def large(value: object) -> str:
    """Three significant digits and a letter: `56.1 M`."""
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.0f} {letter}" if scaled >= 100 else f"{scaled:.3g} {letter}"
    return whole(number)


def size(value: object) -> str:
    """Bytes in decimal units: `412 kB`."""
    number = finite(value)
    return f"{large(value)}B" if number and abs(number) >= 1000 else fixed(number, 0, "B")


def duration(value: object) -> str:
    """Seconds up to two minutes, then minutes and hours."""
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    if number < 120:
        return f"{number:.0f} s" if number >= 10 else f"{number:.1f} s"
    minutes = round(number / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def scientific(value: object) -> str:
    """Two significant digits: `3.6e-07`."""
    number = as_number(value)
    if number is None:
        return NOT_AVAILABLE
    return "0" if number == 0 else f"{number:.1e}"


def as_text(value: object) -> str:
    """A value of a manifest or record in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return NOT_AVAILABLE if value is None else str(value)
