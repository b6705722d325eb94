"""Matplotlib figures as inline SVG in the colors and fonts of the page.

Matplotlib draws in placeholder colors that become CSS variables (`PAINTS`), so a chart follows the
light or dark page. Equal data give equal text: no date, no random ids.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

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
"""CSS variable of style.css -> its placeholder color in matplotlib."""
INK, MUTED, LINE, CARD, TEACHER, STUDENT, PRUNED, BAD = PAINTS.values()
WIDTH_INCHES = 5.4
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the browser's fonts
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
NOISE = re.compile(
    r"<defs>\s*<style.*?</defs>"  # matplotlib's own style would apply to the whole page
    r'|(?<=<g) id="[^"]*"|font-family: [^;"]*;?|(?<=\n)\s+',
    re.DOTALL,
)
SVG = Markup('<svg viewBox="{}" role="img" aria-label="{}" class="chart">{}</svg>')


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """The style in which figures are made and written; `name` makes a chart's ids its own."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser draws the text, so a glyph that matplotlib's font lacks does not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height_inches: float) -> Figure:
    """An empty figure as wide as a column of the report."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def inline_svg(figure: Figure, *, label: str, tooltips: Mapping[str, str] | None = None) -> Markup:
    """The figure as an <svg> element; `tooltips` gives artists, by their gid, a <title>."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    for gid, tooltip in (tooltips or {}).items():
        title = Markup("<g><title>{}</title>").format(tooltip)
        text = text.replace(f'<g id="{gid}">', title, 1)
    for name, color in PAINTS.items():
        text = text.replace(color, f"var(--{name})")
    whole = re.search(r'viewBox="([^"]+)".*?>(.*)</svg>', NOISE.sub("", text), re.DOTALL)
    assert whole is not None
    return SVG.format(whole[1], label, Markup(whole[2]))  # noqa: S704
