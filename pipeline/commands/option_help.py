"""What the command line says of options, beyond what tyro makes of their dataclasses.

The help of an option with a range shows the range beside the default. What tyro refuses, in a box of
many lines, becomes one line, and a mistyped name comes with the one that is nearest to it.
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
"""What tyro draws boxes with, on terminals that can show lines and on others."""
LONGEST_STATEMENT = 400
LONG_OPTION = re.compile(r"--[a-z][\w.-]*\w")

OPTION_RULES = ConstructorRegistry()
"""To be given to `tyro.cli`."""
_asked: list[StructTypeInfo] = []


@OPTION_RULES.primitive_rule
def _paths(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths that are not empty: a shell's unset variable would be the working folder."""
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
        raise ConfigError("an option has an empty path", remedy="name a file or a folder")
    return Path(word)


@OPTION_RULES.struct_rule
def _with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own description of a dataclass, its options' ranges added; None of anything else."""
    if not is_dataclass(info.type) or info in _asked:
        return None
    _asked.append(info)  # so that this rule passes, and tyro's own answers
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    return replace(spec, fields=tuple(_with_range(field) for field in spec.fields))


def _with_range(field: StructFieldSpec) -> StructFieldSpec:
    allowed = range_of(field.type)
    if allowed is None:
        return field
    hint = tyro.conf.arg(help_behavior_hint=_hint(allowed))
    described: Any = Annotated[field.type, hint]
    return replace(field, type=described)


def _hint(allowed: Range) -> Any:
    return lambda default: f"(default: {default}; allowed: {allowed})"


def first_statement(box: str) -> str:
    """The first statement of an error box as one line, without the help that follows it."""
    _title, *lines = [line.strip(FRAME) for line in box.strip().splitlines()]
    body = itertools.dropwhile(_is_rule, lines)
    statement = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    return textwrap.shorten(statement.rstrip(" .:"), LONGEST_STATEMENT, placeholder=" ...")


def listed_options(page: str) -> list[str]:
    """The options that a help page names, such as `--distill.steps`, each once."""
    return list(dict.fromkeys(LONG_OPTION.findall(page)))


def suggestion(word: str, known: Sequence[str]) -> str:
    """The beginning of a remedy that tells which known word was meant, or nothing when none is near.

    The last part of an option stands for the whole of it: `--steps` for `--distill.steps`.
    """
    spellings = {spelling for name in known for spelling in _spellings(name)}
    near = difflib.get_close_matches(word, sorted(spellings), n=1, cutoff=0.7)
    meant = [name for name in known if near and near[0] in _spellings(name)]
    return f"perhaps {' or '.join(meant)} is meant; " if meant else ""


def _spellings(name: str) -> set[str]:
    return {name, f"--{name.rpartition('.')[2]}"} if "." in name else {name}


def _is_rule(line: str) -> bool:
    return not line.strip(RULE)
