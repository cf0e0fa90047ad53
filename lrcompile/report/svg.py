"""Building HTML and SVG so that text can never become markup.

Whatever is not :class:`Markup` is escaped, in content and in attributes alike: names of sites and
files come from strangers. Inline SVG inside HTML needs no namespace, so no reference appears at all.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from lrcompile.report.text import visible

_VOID = frozenset({"meta", "wbr"})
Point = tuple[float, float]


class Markup(str):
    """Text that is markup already; only :func:`tag` and :func:`join` make it, and constants of this package."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any value as content or as an attribute in double quotes."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(str(text)), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """The parts one after another, escaped where they are not markup."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """``<name …>children</name>``.

    ``class_`` stands for ``class``, ``stroke_width`` for ``stroke-width``; None and False leave an
    attribute out. Floats are written with at most two decimals.
    """
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{join(children)}</{name}>")


def picture(width: float, height: float, *children: object, label: str, class_: str | None = None) -> Markup:
    """An ``<svg>`` that scales with its box; ``label`` is read out by screen readers."""
    box = f"0 0 {_plain(width)} {_plain(height)}"
    return tag("svg", *children, viewBox=box, width=width, height=height, role="img", aria_label=label, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, title: str = "", radius: float = 2.0) -> Markup:
    inside = [tag("title", title)] if title else []
    return tag("rect", *inside, x=x, y=y, width=max(width, 0.0), height=height, rx=radius, class_=class_)


def line(start: Point, end: Point, class_: str) -> Markup:
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def label(x: float, y: float, text: object, class_: str = "", anchor: str = "start", title: str = "") -> Markup:
    inside = [tag("title", title)] if title else []
    return tag("text", text, *inside, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def circle(at: Point, radius: float, class_: str) -> Markup:
    return tag("circle", cx=at[0], cy=at[1], r=radius, class_=class_)


def path(points: Sequence[Point], class_: str, floor: float | None = None) -> Markup:
    """A line through the points; with ``floor``, the closed area between it and that height."""
    steps = "L".join(f"{_plain(x)} {_plain(y)}" for x, y in points)
    if floor is not None:
        steps += f"L{_plain(points[-1][0])} {_plain(floor)}L{_plain(points[0][0])} {_plain(floor)}Z"
    return tag("path", d=f"M{steps}", class_=class_)


def _plain(value: object) -> object:
    """Floats with two decimals at most; a coordinate that is not finite becomes 0, so that a picture never breaks."""
    if not isinstance(value, float):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else 0
