"""The top of the report: the hero image, the result and the size of the exported student."""

from __future__ import annotations

from dataclasses import dataclass

from lightfield.errors import CheckpointError
from pipeline.report.page_images import PageImage, page_image, shown_width
from pipeline.report.run_data import RunData, Unavailable, available
from prune.measurement import Trial

HERO_PIXELS = 400
CREDIT_FIELDS = ("credit", "attribution", "author", "license", "licence")
RENDERERS = {"prune": "pruned student", "student": "student", "teacher": "teacher"}
"""Stages whose images can be the hero image, the preferred one first."""


@dataclass(frozen=True)
class Summary:
    """What the top of the page shows besides metrics of the manifests."""

    view: str
    """The test view of the hero image."""
    renderer: str
    """What rendered the hero image; empty for a test image itself."""
    hero: PageImage | Unavailable
    final: Trial | None
    """The measurement of the pruned student."""
    onnx_bytes: object | Unavailable
    credit: str


def summary_of(run: RunData) -> Summary:
    """The data at the top of the page."""
    provenance, stage = run.scene.provenance, next((s for s in RENDERERS if s in run.artifacts), "")
    view, renderer = run.scene.test.names[run.shown_views()[0]], RENDERERS.get(stage, "")
    return Summary(
        view=view,
        renderer=renderer,
        hero=available(lambda: _hero(run, stage, view, renderer)),
        final=run.final_trial(),
        onnx_bytes=available(lambda: _onnx_bytes(run)),
        credit="; ".join(str(provenance[f]) for f in CREDIT_FIELDS if provenance.get(f)),
    )


def _hero(run: RunData, stage: str, view: str, renderer: str) -> PageImage:
    pixels = run.renders(stage)[0] if stage else run.scene.test.images[0]
    columns = pixels.shape[1]
    source = f"rendered by the {renderer}" if renderer else "a test image of the scene"
    alt = f"{run.scene.name}, view {view}, {source}"
    quality = 90 if columns > HERO_PIXELS else None
    return page_image(pixels, alt, quality, width=shown_width(columns, HERO_PIXELS))


def _onnx_bytes(run: RunData) -> object:
    graphs = [g for g in run.graphs() if "for ONNX Runtime" in str(g.get("purpose"))]
    if changed := run.outdated("export"):
        raise CheckpointError(f"exported before the present {' and '.join(changed)}")
    if not graphs:
        raise CheckpointError("no graph for ONNX Runtime was exported")
    return graphs[0].get("size_bytes")
