"""Numbers as people read them: sensible digits, a unit, and `not available` instead of a guess.

Values come from files, so every function takes any object.
"""

from __future__ import annotations

import math

NOT_AVAILABLE = "not available"
DOES_NOT_APPLY = "–"


def as_number(value: object) -> float | None:
    """The value as a float; None when it is no number or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def finite(value: object) -> float | None:
    """The value as a float; None when it is no number, NaN or infinite."""
    number = as_number(value)
    return None if number is None or math.isinf(number) else number


def fixed(value: object, digits: int, unit: str = "") -> str:
    """A number with that many digits after the point."""
    number = as_number(value)
    if number is None:
        return NOT_AVAILABLE
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    text = f"{number:,.{digits}f}".replace("-", "−")
    return f"{text} {unit}" if unit else text


def decibels(value: object) -> str:
    """`27.71 dB`."""
    return fixed(value, 2, "dB")


def milliseconds(value: object, unit: str = "ms") -> str:
    """Three significant digits, never more than three after the point: `0.412 ms`, `41.2 ms`."""
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    whole_digits = 1 if abs(number) < 1 else int(math.log10(abs(number))) + 1
    return fixed(number, min(3, max(0, 3 - whole_digits)) if number >= 1 else 3, unit)


def share(value: object) -> str:
    """A ratio with three digits: `0.489`."""
    return fixed(value, 3)


def interval(low: object, high: object) -> str:
    """`0.472 to 0.503`."""
    if as_number(low) is None or as_number(high) is None:
        return f"interval {NOT_AVAILABLE}"
    return f"{share(low)} to {share(high)}"


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
            return f"{number / factor:.3g} {letter}"
    return whole(number)


def size(value: object) -> str:
    """Bytes in decimal units: `412 kB`."""
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{number:.0f} B"


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
