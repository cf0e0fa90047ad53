"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Sequence

from lrcompile.report.record import Decision, Spectrum
from lrcompile.report.summary import DriftRow, Row, what
from lrcompile.report.svg import Markup, Point, circle, label, line, path, picture, rect, tag
from lrcompile.report.text import human_bytes, human_float, human_seconds, shape_text, shorten

COLOURS = 8
"""Passes beyond this many share the last colour (``c7`` in the style sheet)."""
BARS = 400
_ROW, _LEFT, _WIDE = 20.0, 268.0, 470.0


def colours(decisions: Sequence[Decision]) -> dict[str, str]:
    """Pass → class of its colour, in the order in which the passes appear."""
    names = dict.fromkeys(each.pass_ for each in decisions if each.pass_)
    return {name: f"c{min(index, COLOURS - 1)}" for index, name in enumerate(names)}


def ratio_bar(row: Row) -> Markup | str:
    """After as a part of before (the pale track); the whisker is the measured interval."""
    if row.ratio is None:
        return ""
    wide, high = 190.0, 16.0
    top = max(1.0, row.ratio, row.interval[1] if row.interval else 0.0)
    scale = wide / top
    parts = [rect(0, 4, scale, 8, "track", radius=4), rect(0, 4, row.ratio * scale, 8, f"bar {row.verdict}", radius=4)]
    if top > 1:
        parts.append(line((scale, 1), (scale, 15), "mark"))
    if row.interval:
        low, up = (bound * scale for bound in row.interval)
        up = min(up, wide - 0.75)
        parts += [line((low, 8), (up, 8), "whisker")]
        parts += [line((x, 4.5), (x, 11.5), "whisker") for x in (low, up)]
    return picture(wide, high, *parts, label=f"{row.label}: {row.ratio:.2f} of before")


def keep_bars(decisions: Sequence[Decision]) -> Markup:
    """One bar a site: the share of its values that is kept, in the colour of its pass; dense sites are hatched."""
    shown, classes = list(decisions)[:BARS], colours(decisions)
    top = max(1.0, *(each.keep or 0.0 for each in shown)) if shown else 1.0
    parts: list[Markup] = [_hatch(), *_axis(top, len(shown) * _ROW)]
    for index, each in enumerate(shown):
        parts += _keep_bar(each, 18 + index * _ROW, _WIDE / top, classes)
    return picture(_LEFT + _WIDE + 62, 24 + len(shown) * _ROW, *parts, label="share kept per site", class_="ranks")


def _axis(top: float, height: float) -> list[Markup]:
    parts = []
    for step in range(5):
        x = _LEFT + _WIDE / top * step / 4
        parts += [line((x, 14), (x, 20 + height), "grid"), label(x, 9, f"{step * 25} %", "tick", "middle")]
    return parts


def _keep_bar(each: Decision, y: float, scale: float, classes: dict[str, str]) -> list[Markup]:
    share = 1.0 if each.keep is None else each.keep
    shade = classes[each.pass_] if each.pass_ else "dense"
    hover = f"{each.site} ({shape_text(each.shape)}): {what(each)}" + (f" ({each.reason})" if each.reason else "")
    value = f"{share * 100:.0f} %" if each.pass_ else "dense"
    return [
        label(_LEFT - 10, y + 14, shorten(each.site, 40), "name", "end", title=each.site),
        rect(_LEFT, y + 3, share * scale, 14, f"fill {shade}", hover),
        label(_LEFT + share * scale + 6, y + 14, value, "value"),
    ]


def _hatch() -> Markup:
    stripe = tag("path", d="M0 0V6", class_="stripe")
    pattern = tag(
        "pattern", stripe, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"
    )
    return tag("defs", pattern)


def tail_curve(spectrum: Spectrum, shade: str) -> Markup:
    """The output energy that a rank would lose; the dot is the chosen rank."""
    left, top, wide, high = 2.0, 6.0, 194.0, 74.0
    energies = [min(max(value, 0.0), 1.0) for value in spectrum.energies] or [0.0]
    last = max(len(energies) - 1, 1)
    points = [(left + wide * index / last, top + high * (1 - value)) for index, value in enumerate(energies)]
    parts = [line((left, y), (left + wide, y), "grid") for y in (top, top + high / 2, top + high)]
    parts += [path(points, f"area {shade}", floor=top + high), path(points, f"curve {shade}")]
    caption = "stays dense"
    if spectrum.rank is not None:
        full = spectrum.full or last
        where, lost = _at(points, energies, spectrum.rank / max(full, 1))
        parts += [line((where[0], top), (where[0], top + high), "mark"), circle(where, 3.5, f"dot {shade}")]
        caption = f"rank {spectrum.rank} of {full} · {_share(lost)} lost"
    parts.append(label(left, 98, caption, "tick"))
    return picture(200, 104, *parts, label=f"spectrum of {spectrum.site}: {caption}")


def _share(value: float) -> str:
    return f"{value * 100:.2g} %" if value < 0.995 else "100 %"


def _at(points: Sequence[Point], energies: Sequence[float], position: float) -> tuple[Point, float]:
    """The curve's point and value at a share of its width, interpolated."""
    along = min(max(position, 0.0), 1.0) * (len(points) - 1)
    low = min(int(along), len(points) - 1)
    high, part = min(low + 1, len(points) - 1), along - low
    (x0, y0), (x1, y1) = points[low], points[high]
    value = energies[low] + part * (energies[high] - energies[low])
    return (x0 + part * (x1 - x0), y0 + part * (y1 - y0)), value


def drift_bar(row: DriftRow, passed: bool | None) -> Markup | str:
    """A measure on its scale, with the limit as a mark."""
    if row.scale is None or row.value is None:
        return ""
    wide = 420.0
    unit = wide / row.scale
    share = min(max(row.value * unit, 0.0), wide)
    shade = "" if row.limit is None else {True: "better", False: "worse", None: "same"}[passed]
    parts = [rect(0, 8, wide, 10, "track", radius=5), rect(0, 8, share, 10, f"bar {shade}", radius=5)]
    if row.limit is not None:
        x = min(row.limit * unit, wide)
        parts += [
            line((x, 3), (x, 23), "mark limit"),
            label(x, 34, f"limit {human_float(row.limit)}", "tick", "middle"),
        ]
    return picture(wide, 38 if row.limit is not None else 26, *parts, label=f"{row.label}: {row.text}")


def memory_curve(samples: Sequence[tuple[float, int]]) -> Markup:
    """Resident memory over the run."""
    wide, high, left, top = 720.0, 130.0, 70.0, 12.0
    seconds = max(samples[-1][0], 1e-9)
    most = max(max(size for _, size in samples), 1)
    points = [(left + wide * when / seconds, top + high * (1 - size / most)) for when, size in samples]
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = top + high * (1 - share)
        parts += [
            line((left, y), (left + wide, y), "grid"),
            label(left - 8, y + 4, human_bytes(most * share), "tick", "end"),
        ]
    parts += [path(points, "area c0", floor=top + high), path(points, "curve c0")]
    parts += [
        label(left, top + high + 18, "0", "tick"),
        label(left + wide, top + high + 18, human_seconds(seconds), "tick", "end"),
    ]
    return picture(left + wide + 10, top + high + 26, *parts, label="memory over time")
