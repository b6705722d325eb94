"""`nelf inspect`: what an exported file holds, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from export.inspection import Inspection, inspect
from pipeline.console import Console


def print_inspection(path: Path, console: Console, *, as_json: bool) -> None:
    """A table of a file's facts and SnapML's verdict, or JSON on one line.

    Raises:
        ExportError: when it is missing, or neither ONNX nor CoreML.
    """
    found = inspect(path)
    if as_json:
        console.say(json.dumps(found.to_json()))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, Text(value))
    console.rich.print(table)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    rows = [("file", f"{found.path} ({found.kind}, {found.size_bytes:,} bytes)")]
    if found.opset is not None:
        rows.append(("opset", f"{found.opset}, IR {found.ir_version}"))
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for name, shape in tensors.items():
            rows.append((kind, f"{name} [{', '.join(map(str, shape))}]"))
    counted = ", ".join(f"{count} {name}" for name, count in found.operators.items())
    rows.append(("operators", counted))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.weights.items())
    rows.append(("weights", kinds or "none"))
    macs = "unknown: a size is not in the graph" if found.macs is None else f"{found.macs:,}"
    rows.append(("MACs", macs))
    rows.append(("SnapML", "; ".join(found.snapml_faults) or "fits"))
    return rows
