"""Checks of names that users choose for scenes, runs and images.

The names occur in file names, pages and messages.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from lightfield.errors import ConfigError

LONGEST_NAME = 100
"""Characters of a scene's name. An exported file's name adds up to 40, and may have 255 bytes."""
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, surrogates, and line and paragraph separators."""


def checked_name(name: str) -> str:
    """A scene's name without surrounding white space.

    Raises:
        ConfigError: when the name cannot be part of a file name, a page or a line of text.
    """
    name = name.strip()
    if fault := _fault_of(name):
        raise ConfigError(
            f"{printable(name)[:40]!r} cannot be a scene's name: {fault}",
            where="scene.name",
            remedy="give another name with --name",
        )
    return name


def checked_folder(path: Path) -> Path:
    """A folder, after a check that its absolute path is UTF-8.

    Raises:
        ConfigError: when the path is not UTF-8.
    """
    whole = str(path.resolve())
    if not is_utf8(whole):
        raise ConfigError(
            "the path is not UTF-8", where=printable(whole), remedy="rename the folder"
        )
    return path


def _fault_of(name: str) -> str:
    if not name.strip("."):
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it is a path"
    if len(name) > LONGEST_NAME:
        return f"it has {len(name)} characters, but file names allow {LONGEST_NAME}"
    if not is_utf8(name):
        return "it is not UTF-8"
    if any(unicodedata.category(character) in UNPRINTABLE for character in name):
        return "it holds a control character"
    return ""


def is_utf8(text: str) -> bool:
    """Whether text can be encoded as UTF-8; a file name that Python could not decode cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_a_line(text: str) -> str:
    """The text with escapes for line breaks and terminal control characters."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def printable(text: str) -> str:
    """The text with everything that is not UTF-8 replaced by a question mark."""
    return text.encode("utf-8", "replace").decode()
