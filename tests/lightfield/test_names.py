from __future__ import annotations

import pytest

from lightfield.errors import ConfigError
from lightfield.names import LONGEST_NAME, checked_folder, checked_name, in_a_line, printable


@pytest.mark.parametrize(
    "name", ["lego", "my car 2", "Größe", "\U0001f600", "a.b", "x" * LONGEST_NAME]
)
def test_names_that_can_be_carried(name):
    assert checked_name(f" {name}\t") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "..",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x1b[31m",
        "\udce9",
        "a\u2029b",
        "x" * (LONGEST_NAME + 1),
    ],
)
def test_names_that_cannot_are_refused_in_words_that_can_be_printed(name):
    with pytest.raises(ConfigError, match="cannot be a scene's name") as refused:
        checked_name(name)
    assert str(refused.value).encode().decode().isprintable()


def test_a_folder_below_one_that_is_not_utf8_is_refused(tmp_path):
    assert checked_folder(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="not UTF-8"):
        checked_folder(tmp_path / "caf\udce9" / "run")
    assert printable("caf\udce9") == "caf?"


def test_text_of_others_stays_in_its_line():
    assert in_a_line("café [bold] \t\x1b[2J\n\udce9") == r"café [bold] \t\x1b[2J\n\udce9"
