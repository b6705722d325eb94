"""The vocabulary of Lens Studio's text files: the keys of each type, and the values of each key.

Each type has its keys in a fixed order. `lens_template/ordered_keys.json` lists every order that
occurs in projects saved by Lens Studio 5.15.4, and `newer_keys.json` lists the keys that 5.16 to
5.24 add. `vocabulary.json` lists the values of Lens Studio's declarations for editor plugins and
the values that occur in saved projects. The name of a type without a tag is the path of keys that
leads to it: `esproj/metaInfo`, `MLInput/Transformer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

KNOWN_EDITOR = (5, 15)
"""Major and minor version of Lens Studio whose keys and orders are known in full."""
KINDS = {
    "<integer>": re.compile(r"[-+]?\d+"),
    "<empty>": re.compile(""),
    "<number>": re.compile(r"[-+]?(\d+(\.\d*)?([eE][-+]?\d+)?|\.inf|\.nan)"),
}


@cache
def ordered_keys() -> dict[str, list[list[str]]]:
    """The possible orders of keys of each known type, the most frequent order first."""
    orders = _table("ordered_keys.json")
    return {name: [keys.split() for keys in each] for name, each in orders.items()}


@cache
def _newer_keys() -> dict[str, list[str]]:
    return {name: keys.split() for name, keys in _table("newer_keys.json").items()}


@cache
def _vocabulary() -> dict[str, list[str]]:
    return {key: words.split() for key, words in _table("vocabulary.json").items()}


def _table(name: str) -> dict:
    return json.loads(resources.files("lens_template").joinpath(name).read_text("utf-8"))


def unknown_keys(name: str, found: list[str]) -> list[str]:
    """Keys of a known type that no known editor writes; empty for unknown types."""
    return [key for key in found if key not in _known_keys(name)] if name in ordered_keys() else []


def order_fault(name: str, found: list[str]) -> str | None:
    """Missing keys or a wrong order, compared with the known editor; None when neither applies."""
    orders = ordered_keys().get(name)
    if orders is None:
        return None
    older = [key for key in found if any(key in order for order in orders)]
    if older in orders:
        return None
    if missing := [key for key in orders[0] if key not in older]:
        return f"{name} lacks {', '.join(missing)}"
    return f"the keys of {name} are out of order"


def allowed_values(name: str, key: str) -> list[str] | None:
    """The possible values of a key, as words or as names of `KINDS`; None when unknown."""
    words = _vocabulary()
    return words.get(f"{name}.{key}") or (words.get(key) if key in _known_keys(name) else None)


def is_allowed(value: str, allowed: list[str]) -> bool:
    """Whether a value is one of the words, or matches one of the kinds."""
    return any(KINDS[word].fullmatch(value) if word in KINDS else word == value for word in allowed)


def choices(allowed: list[str]) -> str:
    """The allowed values as text; long lists are summarized by their length."""
    return " or ".join(allowed) if len(allowed) <= 8 else f"one of {len(allowed)} known values"


@cache
def _known_keys(name: str) -> frozenset[str]:
    def all_keys() -> Iterator[str]:
        for order in ordered_keys().get(name, ()):
            yield from order
        yield from _newer_keys().get(name, ())

    return frozenset(all_keys())
