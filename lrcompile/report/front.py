"""What a search found as one HTML file that opens offline: drift against each cost, the front, every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrcompile.report.document import document, section
from lrcompile.report.html import rows_table
from lrcompile.report.svg import Markup, label, line, path, picture, tag

AXES = (("flash", "flash, B"), ("ram", "RAM, B"), ("instructions", "instructions"))
_WIDE, _HIGH, _LEFT, _TOP = 290.0, 220.0, 52.0, 14.0


def page(fields: dict[str, Any]) -> str:
    """The whole page, from the fields of the verb's JSON object."""
    ran = [each for each in fields["candidates"] if not each["reason"]]
    charts = [_chart(ran, key, title, _limit(fields, key)) for key, title in AXES]
    parts = section("Pareto front", _legend(), *charts), section("Candidates", _table(fields))
    return document(f"lrcompile search {fields['model']}", _header(fields), *parts)


def _header(fields: dict[str, Any]) -> Markup:
    limit = fields["limit"]
    flash = "" if limit["flash"] is None else f", flash {limit['flash']:,} B"
    told = (
        f"{fields['target']}, RAM {limit['ram']:,} B{flash}, drift {limit['drift']:g} at most; best: {fields['best']}"
    )
    brand = tag("span", "lrcompile", class_="brand")
    return tag("header", tag("h1", brand, f" search {fields['model']}"), tag("p", told, class_="hint"))


def _legend() -> Markup:
    return tag(
        "p",
        "Every dot was compiled and executed in the emulator. Blue: float32, orange: int8; joined by a line: no "
        "candidate has less drift and less of this cost. The dashed line is the limit.",
        class_="hint",
    )


def _cost(each: dict[str, Any], key: str) -> float:
    found = each[key]
    return float(found["total"] if isinstance(found, dict) else found)


def _loss(each: dict[str, Any]) -> float:
    drift = each["drift"]
    return float(drift["relative_l2"] if drift["metric"] is None else drift["metric"])


def _limit(fields: dict[str, Any], key: str) -> float | None:
    return fields["limit"].get(key)


def _chart(ran: Sequence[dict[str, Any]], key: str, title: str, limit: float | None) -> Markup:
    """Drift over one cost."""
    top_x = max([_cost(each, key) for each in ran] + ([limit] if limit else [])) * 1.08
    top_y = max([_loss(each) for each in ran] + [1e-6]) * 1.15

    def at(each: dict[str, Any]) -> tuple[float, float]:
        return _LEFT + _WIDE * _cost(each, key) / top_x, _TOP + _HIGH * (1 - _loss(each) / top_y)

    parts = [*_grid(top_x, top_y, title)]
    if limit:
        x = _LEFT + _WIDE * limit / top_x
        parts.append(tag("line", x1=x, y1=_TOP, x2=x, y2=_TOP + _HIGH, class_="mark", stroke_dasharray="4 3"))
    best = _stairs(ran, key)
    if len(best) > 1:
        parts.append(path([at(each) for each in best], "curve c2"))
    for each in ran:
        shade = "c0" if each["precision"] == "float32" else "c1"
        x, y = at(each)
        told = f"{each['name']}: {_cost(each, key):,.0f}, drift {_loss(each):.3g}"
        parts.append(tag("circle", tag("title", told), cx=x, cy=y, r=5, class_=f"dot {shade}"))
    return picture(_LEFT + _WIDE + 14, _TOP + _HIGH + 40, *parts, label=f"drift against {title}")


def _stairs(ran: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for each in sorted(ran, key=lambda each: (_cost(each, key), _loss(each))):
        if not found or _loss(each) < _loss(found[-1]):
            found.append(each)
    return found


def _grid(top_x: float, top_y: float, title: str) -> list[Markup]:
    parts = []
    for step in range(5):
        x, y = _LEFT + _WIDE * step / 4, _TOP + _HIGH * (1 - step / 4)
        parts += [
            line((_LEFT, y), (_LEFT + _WIDE, y), "grid"),
            label(_LEFT - 6, y + 4, f"{top_y * step / 4:.2g}", "tick", "end"),
        ]
        parts.append(label(x, _TOP + _HIGH + 16, _short(top_x * step / 4), "tick", "middle"))
    return [*parts, label(_LEFT + _WIDE / 2, _TOP + _HIGH + 33, f"drift over {title}", "name", "middle")]


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _table(fields: dict[str, Any]) -> Markup:
    rows = []
    for each in fields["candidates"]:
        drift = "" if each["drift"] is None else f"{_loss(each):.4g}"
        sizes = (
            ["", "", ""] if each["reason"] else [f"{_cost(each, key):,.0f}" for key, _ in (AXES[1], AXES[0], AXES[2])]
        )
        task = ", ".join(f"{name} {value:.4f}" for name, value in (each["task"] or {}).items())
        verdict = each["reason"] or (
            "best" if each["name"] == fields["best"] else "front" if each["front"] else "beaten"
        )
        rows.append([f"keep {each['keep']:g}", each["precision"], drift, *sizes, task, verdict])
    heads = ("ranks", "precision", "drift", "RAM, B", "flash, B", "instructions", "task", "verdict")
    return rows_table(heads, rows, (2, 3, 4, 5))
