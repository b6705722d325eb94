"""`nelf inspect`: the contents of an exported file, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from export.inspection import Inspection, inspect
from lightfield.names import in_a_line
from pipeline.console import Console


def print_inspection(path: Path, console: Console, *, as_json: bool) -> None:
    """Print the contents of a file, as a table or as one line of JSON.

    Raises:
        ExportError: when the file is missing, or is neither ONNX nor CoreML.
    """
    found = inspect(path)
    if as_json:
        console.say(json.dumps(found.to_json()))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, Text(in_a_line(value)))
    console.rich.print(table)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    rows = [("file", f"{found.path} ({found.kind}, {found.size_bytes:,} bytes)")]
    if found.ir_version is not None:
        opset = "not stated" if found.opset is None else found.opset
        rows.append(("opset", f"{opset}, IR {found.ir_version}"))
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for name, shape in tensors.items():
            rows.append((kind, f"{name} [{', '.join(map(str, shape))}]"))
    rows.append(("operators", _counts(found.operators, "{1} {0}")))
    rows.append(("weights", _counts(found.weights, "{1:,} {0}")))
    rows.append(("MACs", f"{found.macs:,}" if found.macs is not None else _unknown(found)))
    rows.append(("SnapML", "; ".join(found.snapml_faults) or "fits"))
    return rows


def _counts(counts: dict[str, int] | None, template: str) -> str:
    if counts is None:
        return "unknown"
    return ", ".join(template.format(name, count) for name, count in counts.items()) or "none"


def _unknown(found: Inspection) -> str:
    return f"unknown: {found.macs_unknown}"
