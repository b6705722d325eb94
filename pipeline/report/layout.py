"""The few shapes that sections are made of: tables, figures with captions, facts, reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lightfield.errors import NelfError
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import NOT_AVAILABLE


def section(identifier: str, title: str, *children: str | None) -> Html:
    """A part of the page with its heading."""
    return element("section", element("h2", title), *children, id=identifier)


def unavailable(reason: str, subject: str = "") -> Html:
    """What stands where something is missing."""
    return element("p", f"{subject} {NOT_AVAILABLE}: {reason}".lstrip(), class_="missing")


def outdated(sources: Sequence[str]) -> Html | None:
    """A warning above figures that were made from something older than what the run holds."""
    if not sources:
        return None
    text = f"Outdated: made before the present {' and '.join(sources)}; run this stage again."
    return element("p", text, class_="warning")


def or_reason(build: Callable[[], Html]) -> Html:
    """What `build` makes, or why it cannot; the reason names no path of the machine that ran."""
    try:
        return build()
    except NelfError as error:
        return unavailable(error.what)


def figure(content: str, *caption: str) -> Html:
    """Something to look at, and what it shows."""
    return element("figure", content, element("figcaption", *caption))


def side_by_side(*children: str | None) -> Html:
    """Figures in two columns where there is room."""
    return element("div", *children, class_="pair")


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, words: Iterable[int] = (0,)
) -> Html:
    """A table that scrolls sideways on a narrow screen; columns in `words` hold text, not numbers."""
    text = set(words)

    def cell(tag: str, column: int, content: str, **attributes: str | None) -> Html:
        name = None if column in text else "number"
        return element(tag, content, class_=name, **attributes)

    def line(row: Sequence[str]) -> Html:
        first, *others = row
        cells = [cell("td", i, content) for i, content in enumerate(others, 1)]
        return element("tr", cell("th", 0, first, scope="row"), *cells)

    titles = [cell("th", i, title, scope="col") for i, title in enumerate(head)]
    content = element(
        "table",
        element("thead", element("tr", *titles)),
        element("tbody", *(line(row) for row in rows)),
    )
    name = "table: " + ", ".join(filter(None, head))
    # focusable, so that a keyboard can scroll it
    scroll = element("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)
    return element("figure", scroll, element("figcaption", caption), class_="tabular")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and what they are."""
    return element(
        "dl", *(fragment(element("dt", name), element("dd", value)) for name, value in pairs)
    )


def folded(summary: str, *children: str | None) -> Html:
    """Something for those who want to know, closed at first."""
    return element("details", element("summary", summary), *children)
