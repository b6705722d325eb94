"""Help texts and error messages of options, beyond what tyro makes of their dataclasses.

The help of an option with a range shows the range after the default. tyro's error boxes of many
lines become one line, and the error for a mistyped name suggests the most similar one.
"""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lightfield.errors import ConfigError
from lightfield.ranges import Range, range_of

FRAME, RULE = " │╭╮╰╯|+", "─-"
"""Characters of tyro's boxes, on Unicode terminals and on others."""
LONGEST_STATEMENT = 400
LONG_OPTION = re.compile(r"--[a-z][\w.-]*\w")

OPTION_RULES = ConstructorRegistry()
"""The registry that `tyro.cli` takes."""
_in_progress: list[StructTypeInfo] = []


@OPTION_RULES.primitive_rule
def _paths(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths that are not empty: an unset shell variable would mean the working folder."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _path(word: str) -> Path:
    if not word:
        raise ConfigError("the path of an option is empty", remedy="name a file or a folder")
    return Path(word)


@OPTION_RULES.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's specification of a dataclass, with ranges and unbroken help texts; else None."""
    if not is_dataclass(info.type) or info in _in_progress:
        return None
    _in_progress.append(info)  # this rule now returns None, so that tyro's own rule answers
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _in_progress.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    return replace(spec, fields=tuple(_option(field) for field in spec.fields))


def _option(field: StructFieldSpec) -> StructFieldSpec:
    """The option with its help text on one line, which tyro wraps, and with its range."""
    text = field.helptext
    field = replace(field, helptext=lambda: _unbroken(text() if callable(text) else text))
    allowed = range_of(field.type)
    if allowed is None:
        return field
    hint = tyro.conf.arg(help_behavior_hint=_hint(allowed))
    described: Any = Annotated[field.type, hint]
    return replace(field, type=described)


def _unbroken(text: str | None) -> str | None:
    return text and " ".join(text.split())


def _hint(allowed: Range) -> Any:
    return lambda default: f"(default: {default}; allowed: {allowed})"


def first_statement(box: str) -> str:
    """The first statement of tyro's error box as one line, without the help that follows."""
    _title, *lines = [line.strip(FRAME) for line in box.strip().splitlines()]
    body = itertools.dropwhile(_is_rule, lines)
    statement = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    return textwrap.shorten(statement.rstrip(" .:"), LONGEST_STATEMENT, placeholder=" ...")


def listed_options(page: str) -> list[str]:
    """The options that a help page names, such as `--distill.steps`, without repetitions."""
    return list(dict.fromkeys(LONG_OPTION.findall(page)))


def suggestion(word: str, known: Sequence[str]) -> str:
    """The beginning of a remedy that suggests the known word most similar to `word`; empty when no
    known word is similar.

    The last part of an option matches the whole option: `--steps` matches `--distill.steps`.
    """
    spellings = {spelling for name in known for spelling in _spellings(name)}
    similar = difflib.get_close_matches(word, sorted(spellings), n=1, cutoff=0.7)
    meant = [name for name in known if similar and similar[0] in _spellings(name)]
    return f"did you mean {' or '.join(meant)}? " if meant else ""


def _spellings(name: str) -> set[str]:
    return {name, f"--{name.rpartition('.')[2]}"} if "." in name else {name}


def _is_rule(line: str) -> bool:
    return not line.strip(RULE)
