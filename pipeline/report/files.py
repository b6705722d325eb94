"""What can be taken away: the exported graphs and the lens project."""

from __future__ import annotations

from typing import Any

from export.parity import ALLOWED_LOSS_DB, FP16_FLOOR_DB, FP32_FLOOR_DB
from pipeline.report.chain import Chain
from pipeline.report.layout import or_reason, outdated, section, table, unavailable
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import (
    DOES_NOT_APPLY,
    NOT_AVAILABLE,
    as_number,
    decibels,
    plural,
    scientific,
    size,
    whole,
)

SHOWN_LOSS_DB = 0.005
"""Less is shown as none."""


def files_section(chain: Chain) -> Html:
    """Exported files, each compared with PyTorch, and the lens."""
    return section(
        "files",
        "Files to use",
        or_reason(lambda: fragment(outdated(chain.outdated("export")), _graphs(chain.graphs()))),
        element("h3", "Lens Studio project"),
        or_reason(lambda: _lens(chain)),
    )


def _graphs(records: list[dict[str, Any]]) -> Html:
    head = [
        "file", "purpose", "precision", "size", "opset", "operators", "PSNR", "max. error", "lost",
        "sha256",
    ]  # fmt: skip
    rows = [_written(g) for g in records if (as_number(g.get("size_bytes")) or 0) > 0]
    absent = [
        unavailable(_text(g, "note").removeprefix(f"{NOT_AVAILABLE}: "), _text(g, "path"))
        for g in records
        if (as_number(g.get("size_bytes")) or 0) <= 0
    ]
    caption = (
        "In the run's folder export/. PSNR and largest error compare each file with PyTorch on real "
        "test poses, the worst of them; ∞ means equal to the last bit. Lost is what its images lose "
        "against the real ones beside PyTorch's, on the mean of the poses. Files below "
        f"{FP32_FLOOR_DB:.0f} dB (fp32) or {FP16_FLOOR_DB:.0f} dB (fp16) are not written; int8 ones "
        f"that lose more than {ALLOWED_LOSS_DB} dB are, and marked unfit."
    )
    return fragment(table(head, rows, caption=caption, words=(0, 1, 2, 5, 9)), *absent)


def _written(graph: dict[str, Any]) -> list[str]:
    opset = graph.get("opset")
    note, lost, unfit = graph.get("note"), graph.get("lost_db"), graph.get("fit") is False
    purpose = fragment(
        _text(graph, "purpose"), element("small", str(note), class_="below") if note else None
    )
    return [
        element("code", _text(graph, "path")),
        purpose,
        fragment(
            _text(graph, "precision"), element("small", "unfit", class_="below") if unfit else None
        ),
        size(graph.get("size_bytes")),
        DOES_NOT_APPLY if opset is None else whole(opset),
        _operators(graph.get("ops")),
        decibels(graph.get("psnr_db")),
        scientific(graph.get("max_error")),
        DOES_NOT_APPLY if lost is None else _lost(lost),
        element("code", _text(graph, "sha256")[:12]),
    ]


def _lost(lost_db: object) -> str:
    number = as_number(lost_db)
    small = number is not None and abs(number) < SHOWN_LOSS_DB
    return decibels(0.0 if small else lost_db)


def _text(graph: dict[str, Any], name: str) -> str:
    return str(graph.get(name) or NOT_AVAILABLE)


def _operators(ops: object) -> Html:
    if not isinstance(ops, dict) or not ops:
        return fragment(NOT_AVAILABLE)
    counts = {str(name): as_number(count) or 0 for name, count in ops.items()}
    listed = ", ".join(f"{name} {whole(counts[name])}" for name in sorted(counts))
    summary = f"{whole(sum(counts.values()))}, {plural(len(counts), 'kind')}"
    return element("details", element("summary", summary), element("small", listed))


def _lens(chain: Chain) -> Html:
    lens = chain.require("lens")
    project = str(chain.detail("lens", "project") or NOT_AVAILABLE)
    opened = next((name for name in lens.manifest["files"] if name.endswith(".esproj")), None)
    if opened is None:
        return unavailable("the lens artifact holds no project file")
    return fragment(
        outdated(chain.outdated("lens")),
        element(
            "p",
            "The folder ", element("code", f"lens/{project}"), " of the run is a Lens Studio project: "
            f"{whole(chain.metric('lens', 'files'))} files, {size(chain.metric('lens', 'size_bytes'))}. "
            "Open ", element("code", f"lens/{opened}"), " in Lens Studio 5.15.4 or newer, wait until "
            "the models are imported, and drag in the preview to turn the object.",
        )
    )  # fmt: skip
