"""A whole HTML document around its parts: one file that needs no network and no JavaScript."""

from __future__ import annotations

from importlib import resources

from pipeline.report.markup import Html, element

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may do with the page: show it. A second lock behind escaping."""


def document(title: str, *parts: Html) -> str:
    """The page with these parts in its middle."""
    style = resources.files("pipeline.report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *parts))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}"
