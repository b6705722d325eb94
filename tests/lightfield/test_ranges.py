"""Range checks of settings: accepted values, refused values, and messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from lightfield.errors import ConfigError
from lightfield.ranges import SEED, SEEDS, Range, check_ranges, later_seed, range_of


@dataclass(frozen=True)
class Oven:
    """Settings with ranges of every kind."""

    minutes: Annotated[int, Range(1, 90)] = 20
    heat: Annotated[float | None, Range(0, 1, above=True)] = None
    cooling: Annotated[float, Range(0, 1, below=True)] = 0.0
    shelves: Annotated[tuple[int, ...], Range(1, 5, most_items=2)] = ()
    bread: str = "rye"
    note: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, "oven")


@pytest.mark.parametrize(
    "settings",
    [
        {"minutes": 1}, {"minutes": 90}, {"heat": 1}, {"heat": 1e-9}, {"cooling": 0},
        {"shelves": (5, 1)}, {"bread": "Fladenbrot, süß"},
    ],
)  # fmt: skip
def test_values_in_range_are_accepted(settings):
    Oven(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"minutes": 0}, "oven.minutes: 0 is out of range; give a whole number, 1 to 90"),
        ({"minutes": 91}, "oven.minutes: 91 is"),
        ({"minutes": 2.5}, "oven.minutes: 2.5 is"),
        ({"minutes": "7"}, "oven.minutes: '7' is"),
        ({"minutes": 10**300}, "oven.minutes: 1" + 79 * "0" + "... is"),
        ({"heat": 0.0}, "oven.heat: 0.0 is out of range; give a number, more than 0, at most 1"),
        ({"heat": math.nan}, "oven.heat: nan is"),
        ({"heat": math.inf}, "oven.heat: inf is"),
        ({"cooling": 1.0}, "oven.cooling: 1.0 is out of range; give a number, at least 0, less than 1"),
        ({"shelves": (1, 6)}, "oven.shelves: 6 is"),
        ({"shelves": (1, 2, 3)}, "oven.shelves: 3 values are given, but at most 2 are allowed"),
        ({"bread": ""}, "oven.bread: the text is empty"),
        ({"bread": "a\nb"}, "oven.bread: the text"),
        ({"bread": "a\udce9"}, "oven.bread: the text"),
        ({"note": 5000 * "x"}, "oven.note: the text"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_the_error_for_a_value_out_of_range_names_the_field(settings: dict[str, Any], said):
    with pytest.raises(ConfigError) as refusal:
        Oven(**settings)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 200


def test_an_annotation_without_a_range_gives_none():
    assert range_of(int) is None
    assert range_of(Annotated[int, "minutes"]) is None
    assert range_of(Annotated[int, Range(2, 3)]) == Range(2, 3)


def test_a_later_seed_is_in_the_range_of_seeds():
    assert later_seed(3, 4) == 7
    assert later_seed(SEEDS - 1, 1) == 0
    assert later_seed(SEEDS - 1, 10**12) in SEED
