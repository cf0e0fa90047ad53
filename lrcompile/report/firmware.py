"""What firmware costs as one HTML file that opens offline: the arena over time, bytes and time of every kernel."""

from __future__ import annotations

from typing import Any

from lrcompile.report.document import document, section
from lrcompile.report.html import rows_table
from lrcompile.report.svg import Markup, label, line, picture, rect, tag

_WIDE, _HIGH, _LEFT, _TOP = 900.0, 260.0, 64.0, 10.0
_SHADES = 8


def page(fields: dict[str, Any]) -> str:
    """The whole page, from the fields of ``report.json``."""
    over_time = tag("div", _arena(fields), class_="scroll")
    return document(
        f"lrcompile deploy {fields['model']}",
        _header(fields),
        section("Bytes", _sizes(fields)),
        section("Arena over time", over_time, hint=_told(fields)),
        section("Kernels in the order of execution", _kernels(fields)),
        section("Functions", _functions(fields)),
    )


def _header(fields: dict[str, Any]) -> Markup:
    told = f"{fields['target']}, {fields['precision']}"
    if "instructions" in fields:
        told += (
            f"; {fields['samples']} samples in the emulator: {fields['instructions']:,} instructions, largest error "
            f"{fields['max_error']:.2g}, {fields['violations']} accesses outside its memory"
        )
    brand = tag("span", "lrcompile", class_="brand")
    return tag("header", tag("h1", brand, f" deploy {fields['model']}"), tag("p", told, class_="hint"))


def _sizes(fields: dict[str, Any]) -> Markup:
    rows = []
    for memory in ("ram", "flash"):
        limit = fields["limit"][memory]
        rows += [(memory, part, f"{size:,}", "") for part, size in fields[memory].items() if part != "total"]
        rows.append((memory, "total", f"{fields[memory]['total']:,}", "" if limit is None else f"{limit:,}"))
    return rows_table(("memory", "part", "bytes", "limit"), rows, (2, 3), "narrow")


def _told(fields: dict[str, Any]) -> str:
    return (
        f"Kernels from left to right, addresses upwards. No placement of these buffers needs fewer than "
        f"{fields['bound']:,} B; the arena has {fields['ram']['arena']:,} B."
    )


def _arena(fields: dict[str, Any]) -> Markup:
    """A rectangle for each buffer."""
    steps, height = max(len(fields["kernels"]), 1), max(fields["ram"]["arena"], 1)
    parts = [line((_LEFT, y), (_LEFT + _WIDE, y), "grid") for y in (_TOP, _TOP + _HIGH)]
    parts += [
        label(_LEFT - 6, _TOP + 8, f"{height:,}", "tick", "end"),
        label(_LEFT - 6, _TOP + _HIGH, "0", "tick", "end"),
    ]
    for at, slot in enumerate(fields["arena"]):
        x, wide = _LEFT + _WIDE * slot["first"] / steps, _WIDE * (slot["last"] - slot["first"] + 1) / steps
        tall = _HIGH * slot["nbytes"] / height
        y = _TOP + _HIGH * (1 - slot["offset"] / height) - tall
        told = f"{slot['name']}: {slot['nbytes']:,} B at {slot['offset']:,}, kernels {slot['first']} to {slot['last']}"
        parts.append(rect(x, y, wide, tall, f"fill c{at % _SHADES}", told))
    return picture(_LEFT + _WIDE + 8, _TOP + _HIGH + 8, *parts, label="buffers of the arena over time")


def _kernels(fields: dict[str, Any]) -> Markup:
    rows = [
        (
            *(at, each["symbol"], ", ".join(each["nodes"]), each["loops"]),
            *(f"{each[key]:,}" for key in ("alive", "stack", "weights", "macs")),
        )
        for at, each in enumerate(fields["kernels"])
    ]
    heads = ("", "function", "nodes", "loops", "arena in use, B", "stack, B", "weights, B", "multiply-adds")
    return rows_table(heads, rows, (4, 5, 6, 7), "decisions")


def _functions(fields: dict[str, Any]) -> Markup:
    rows = []
    for each in sorted(fields["functions"], key=lambda each: -(each["instructions"] or 0)):
        count = "" if each["instructions"] is None else f"{each['instructions']:,}"
        rows.append((each["symbol"], each["calls"], f"{each['code']:,}", count))
    return rows_table(("function", "calls", "code, B", "instructions of all calls"), rows, (1, 2, 3))
