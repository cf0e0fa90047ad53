"""The frame of every report: one HTML file that opens offline and loads nothing."""

from __future__ import annotations

from importlib import resources

from lrcompile.report.svg import Markup, tag

# Even if escaping failed somewhere, the page could neither run nor load anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def document(title: str, *children: object) -> str:
    """A whole page with the reports' style and a content security policy; nothing that is None appears."""
    style = resources.files("lrcompile.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', *children)), lang='en')}\n"


def section(title: str, *children: object, hint: object = None) -> Markup:
    """A part of a page with its heading and, above the rest, what the reader should know."""
    return tag("section", tag("h2", title), tag("p", hint, class_="hint") if hint else None, *children)
