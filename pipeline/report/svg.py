"""Matplotlib figures as inline SVG that follows the page's colors and fonts.

Figures are drawn in colors that stand for CSS variables (`PAINTS`), so a chart is right in the light
and in the dark. The same data give the same text: no date, no random ids.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.report.markup import Html, element, escaped

PAINTS = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "card": "#010104",
    "teacher": "#010105",
    "student": "#010106",
    "pruned": "#010107",
    "bad": "#010108",
}
"""CSS variable of style.css -> the color that stands for it while matplotlib draws."""
INK, MUTED, LINE, CARD, TEACHER, STUDENT, PRUNED, BAD = PAINTS.values()
WIDTH_INCHES = 5.4
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name from a file may hold dollar signs
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """The style in which figures are made and written; `name` makes a chart's ids its own."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser's fonts draw the text, whatever matplotlib's own lack
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height_inches: float) -> Figure:
    """An empty figure as wide as a column of the report."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def inline_svg(figure: Figure, *, label: str, tooltips: Mapping[str, str] | None = None) -> Html:
    """The figure as an <svg> element; `tooltips` gives artists, by their gid, a <title>."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", body)
    for gid, tooltip in (tooltips or {}).items():
        title = element("title", tooltip).strip()
        body = body.replace(f'<g id="{escaped(gid)}">', f"<g>{title}", 1)
    body = re.sub(r'<g id="[^"]*"/>', "", body)  # ticks that lie outside
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for name, color in PAINTS.items():
        body = body.replace(color, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body).strip()
    return element("svg", Html(body), viewBox=box[1], role="img", aria_label=label, class_="chart")
