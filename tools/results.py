"""Write docs/results.md and the table of README.md from the records in docs/records.

`make results` runs this module. The sentences and the choice of rows and columns are in
`results_tables.py`; every number of a table comes from a record. A record with a missing field or
an unknown unit, and a row or column without a figure, are errors of one line.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from tools.results_schema import Figure, Record, RecordError, load_records
from tools.results_tables import HEADLINE, INTRODUCTION, SECTIONS, Column, Row, Table

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "records"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: make results -->", "<!-- end of table -->"
"""Lines around the generated table in README.md."""
WIDTH = 140
"""Characters a line of prose may have."""
NOTHING = "–"
"""What a cell shows where the record holds no such figure."""


def main() -> int:
    """Write both documents."""
    try:
        records = load_records(RECORDS)
        PAGE.write_text(results_page(records), encoding="utf-8")
        README.write_text(with_table(README.read_text(encoding="utf-8"), records), encoding="utf-8")
    except RecordError as fault:
        print(f"results: {fault}", file=sys.stderr)
        return 2
    print(f"results: wrote {PAGE.name} and the table of {README.name}; {len(records)} records")
    return 0


def results_page(records: dict[str, Record]) -> str:
    """The text of docs/results.md."""
    blocks = ["# Results\n" + _wrapped(INTRODUCTION)]
    for section in SECTIONS:
        text = with_figures(section.text, records)
        blocks.append(f"## {section.heading}\n{_wrapped(text)}")
        blocks += [table_text(table, records) for table in section.tables]
        blocks += section.images
    return "\n\n".join(blocks) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def with_table(readme: str, records: dict[str, Record]) -> str:
    """The README with its table made anew.

    Raises:
        RecordError: when the README has lost the lines around the table.
    """
    before, begin, rest = readme.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RecordError(f"README.md: the lines {BEGIN} and {END} are missing")
    table = table_text(HEADLINE, records, "docs/records")
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def table_text(table: Table, records: dict[str, Record], folder: str = "records") -> str:
    """One Markdown table.

    Raises:
        RecordError: when a row or a column is empty, or a figure has another unit than its column.
    """
    rows = [[cell_text(row, column, records) for column in table.columns] for row in table.rows]
    for row, cells in zip(table.rows, rows, strict=True):
        if all(cell == NOTHING for cell in cells):
            raise RecordError(f"table `{table.head}`: no figure in the row `{row.label}`")
    for column, cells in zip(table.columns, zip(*rows, strict=True), strict=True):
        if all(cell == NOTHING for cell in cells):
            raise RecordError(f"table `{table.head}`: no figure in the column `{column.title}`")
    head = [table.head, *(column.heading for column in table.columns), "record"]
    lines = [head, ["---"] * len(head)]
    for row, cells in zip(table.rows, rows, strict=True):
        lines.append([row.label, *cells, f"[{row.record}]({folder}/{row.record}.json)"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_text(row: Row, column: Column, records: dict[str, Record]) -> str:
    """What a row shows in a column."""
    name = column.record or row.record
    if name not in records:
        raise RecordError(f"docs/records/{name}.json: a table needs this record, which is missing")
    figure = records[name].figures.get(f"{row.part}_{column.figure}")
    if figure is None:
        return NOTHING
    if column.unit and figure.unit != column.unit:
        raise RecordError(f"{name}: {figure.name} is in {figure.unit}, its column in {column.unit}")
    ends = figure.interval if column.interval else (figure.low, figure.high)
    if ends is None:
        return NOTHING
    decimals = column.decimals if figure.decimals is None else figure.decimals
    text = range_text(ends, decimals, column.divisor)
    return text if column.unit else with_unit(text, figure)


def range_text(ends: tuple[float, float], decimals: int, divisor: float = 1) -> str:
    """The lowest and the highest of several numbers, or one number where both are equal."""
    return " to ".join(dict.fromkeys(number_text(end, decimals, divisor) for end in ends))


def number_text(value: float, decimals: int, divisor: float = 1) -> str:
    """A number with commas for thousands.

    Whole numbers have no decimals. Numbers below 0.0001 are written with a power of ten.
    """
    if divisor != 1:
        digits = f"{value / divisor:.4g}"
        missing = decimals - len(digits.partition(".")[2])
        return digits if missing <= 0 else f"{value / divisor:.{decimals}f}"
    if type(value) is int:
        return f"{value:,}"
    if 0 < abs(value) < 1e-4:
        return f"{value:g}".replace("e-0", "e-")
    return f"{value:,.{decimals}f}"


def with_unit(text: str, figure: Figure) -> str:
    """A number followed by its unit; counts and ratios have none."""
    return text if figure.unit == "1" else f"{text} {figure.unit}"


def with_figures(text: str, records: dict[str, Record]) -> str:
    """A sentence whose places `{record:figure}` are filled with the figures.

    Raises:
        RecordError: when a record or a figure is missing.
    """

    def filled(place: re.Match[str]) -> str:
        record, figure = records.get(place[1]), None
        if record is not None:
            figure = record.figures.get(place[2])
        if figure is None:
            raise RecordError(f"a sentence needs the figure {place[0]}, which is missing")
        return with_unit(range_text((figure.low, figure.high), figure.decimals or 0), figure)

    return re.sub(r"\{([\w-]+):(\w+)\}", filled, text)


if __name__ == "__main__":
    raise SystemExit(main())
