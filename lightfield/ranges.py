"""Allowed ranges of settings, stated in the annotations of the config dataclasses' fields.

    steps: Annotated[int, Range(1, 100_000_000)] = 4000

`check_ranges` is called when the dataclass is made and refuses values outside of their range. The
command line's help shows the range beside the default. NaN and infinity lie in no range.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from lightfield.errors import ConfigError, quoted

LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold; for a tuple, the numbers that each item may hold."""

    low: float
    high: float
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""
    most_items: int = 16
    """Most items of a tuple."""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.above else value >= self.low
        return above and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = _plain(self.low), _plain(self.high)
        if not self.above and not self.below:
            return f"{low} to {high}"
        low = f"more than {low}" if self.above else f"at least {low}"
        return f"{low}, {'less than' if self.below else 'at most'} {high}"


SEEDS = 2**32
"""Number of seeds."""
SEED = Range(0, SEEDS - 1)
"""Seeds that every random generator accepts."""
STEPS = Range(1, 100_000_000)
"""Steps of a training."""
THREADS = Range(1, 1024)
"""Threads of one operator."""
SHARE = Range(0, 1, above=True)
"""A positive fraction of a whole."""


def later_seed(seed: int, count: int) -> int:
    """The seed plus `count`, modulo the number of seeds."""
    return (seed + count) % SEEDS


def range_of(annotation: Any) -> Range | None:
    """The range that a field's annotation states, or None."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((extra for extra in annotation.__metadata__ if isinstance(extra, Range)), None)


def check_ranges(config: Any, where: str) -> None:
    """Refuse a dataclass that holds a number out of range, or a text that cannot be printed.

    None stands for a value that is not given. A text may be empty only where its default is empty.

    Raises:
        ConfigError: naming the first such field as `where.field`, and its range.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value, place = getattr(config, field.name), f"{where}.{field.name}"
        items = value if isinstance(value, tuple) else (value,)
        allowed = range_of(hints[field.name])
        if allowed is not None:
            _check_numbers(items, allowed, _is_whole(hints[field.name]), place)
        if value != field.default:
            _check_texts([item for item in items if isinstance(item, str)], place)


def _check_numbers(items: tuple[Any, ...], allowed: Range, whole: bool, place: str) -> None:
    if len(items) > allowed.most_items:
        raise ConfigError(
            f"{len(items)} values are given, but at most {allowed.most_items} are allowed",
            where=place,
        )
    for item in items:
        number = isinstance(item, int if whole else int | float)
        if item is not None and not (number and item in allowed):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(
                f"{quoted(repr(item))} is out of range",
                where=place,
                remedy=f"give {kind}, {allowed}",
            )


def _check_texts(texts: list[str], place: str) -> None:
    for text in texts:
        if not text or len(text) > LONGEST_TEXT or not text.isprintable():
            raise ConfigError(
                f"the text is empty, longer than {LONGEST_TEXT} characters, or not printable",
                where=place,
            )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_whole(annotation: Any) -> bool:
    """Whether an annotation allows integers only, including the items of a tuple."""
    return annotation is not float and not any(
        not _is_whole(part) for part in get_args(annotation) if not isinstance(part, Range)
    )


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
