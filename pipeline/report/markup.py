"""HTML by construction: whatever is not `Html` is escaped, so text from files is never markup."""

from __future__ import annotations

import html

VOID = {"col", "img", "meta"}
BLOCKS = {
    "body", "dd", "details", "div", "dl", "dt", "figcaption", "figure", "footer", "h1", "h2", "h3",
    "head", "header", "html", "img", "li", "main", "meta", "nav", "ol", "p", "pre", "section",
    "style", "summary", "table", "tbody", "td", "th", "thead", "title", "tr", "ul",
}  # fmt: skip
"""Elements after which a line ends, so that two reports can be compared line by line."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Markup that shows the text; markup stays what it is."""
    return text if isinstance(text, Html) else Html(html.escape(text))


def fragment(*children: str | None) -> Html:
    """Children after each other, without an element around them."""
    return Html("".join(escaped(child) for child in children if child is not None))


def element(tag: str, *children: str | None, **attributes: str | int | bool | None) -> Html:
    """An element; `class_` stands for class, `_` for `-`, and None or False leaves one out."""
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        plain = name.rstrip("_").replace("_", "-")
        words.append(plain if value is True else f'{plain}="{html.escape(str(value))}"')
    text = f"<{' '.join(words)}>"
    if tag not in VOID:
        text += f"{fragment(*children)}</{tag}>"
    return Html(text + "\n" if tag in BLOCKS else text)
