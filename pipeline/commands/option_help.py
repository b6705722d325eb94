"""What the command line says of options, beyond what tyro makes of their dataclasses.

The help of an option with a range shows the range beside the default. What tyro refuses, in a box of
many lines, becomes one line.
"""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import is_dataclass, replace
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lightfield.ranges import Range, range_of

FRAME, RULE = " │╭╮╰╯|+", "─-"
"""What tyro draws boxes with, on terminals that can show lines and on others."""
LONGEST_STATEMENT = 400

OPTION_RULES = ConstructorRegistry()
"""To be given to `tyro.cli`."""
_asked: list[StructTypeInfo] = []


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
    return textwrap.shorten(statement, LONGEST_STATEMENT, placeholder=" ...")


def _is_rule(line: str) -> bool:
    return not line.strip(RULE)
