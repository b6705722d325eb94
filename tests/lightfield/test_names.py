from __future__ import annotations

import pytest

from lightfield.errors import ConfigError
from lightfield.names import LONGEST_NAME, checked_folder, checked_name, in_a_line, printable


@pytest.mark.parametrize(
    "name", ["lego", "my car 2", "Größe", "\U0001f600", "a.b", "x" * LONGEST_NAME]
)
def test_valid_names_are_accepted(name):
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
def test_invalid_names_are_refused_with_a_printable_message(name):
    with pytest.raises(ConfigError, match="cannot be a scene's name") as refused:
        checked_name(name)
    assert str(refused.value).encode().decode().isprintable()


def test_a_folder_below_a_folder_that_is_not_utf8_is_refused(tmp_path):
    assert checked_folder(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="not UTF-8"):
        checked_folder(tmp_path / "caf\udce9" / "run")
    assert printable("caf\udce9") == "caf?"


def test_quoted_text_stays_on_one_line():
    assert in_a_line("café [bold] \t\x1b[2J\n\udce9") == r"café [bold] \t\x1b[2J\n\udce9"
