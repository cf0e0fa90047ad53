"""The report as one HTML file that opens offline and runs no code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lrcompile.report import charts
from lrcompile.report.document import document, section
from lrcompile.report.record import Decision, FileInfo, Report, jsonable
from lrcompile.report.summary import (
    Row,
    budget_rows,
    comparison,
    drift_rows,
    drift_verdict,
    evenly,
    keep_text,
    site_counts,
    what,
)
from lrcompile.report.svg import Markup, join, tag
from lrcompile.report.text import human_bytes, human_float, human_seconds, shape_text, shorten

SPECTRA = 24
DECISIONS = 2000
_GOOD = {"ok": "good", "unchanged": "calm", "gate_failed": "bad", "infeasible": "warn"}


def page(report: Report) -> str:
    """The whole page."""
    name = report.input.path if report.input else ""
    parts = (_header, _tiles, _comparison, _budget, _ranks, _spectra, _drift, _decisions, _passes, _memory, _origin)
    return document(f"lrcompile {report.verb} {_base(name)}", *(part(report) for part in parts))


def _base(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def rows_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = (), class_: str = ""
) -> Markup:
    """A table; columns named in ``right`` hold numbers."""
    numbers = frozenset(right)
    head = [tag("th", each, class_="num" if index in numbers else None) for index, each in enumerate(headings)]
    body = [
        tag("tr", *(tag("td", cell, class_="num" if index in numbers else None) for index, cell in enumerate(row)))
        for row in rows
    ]
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_=class_ or None)
    return tag("div", table, class_="scroll")


def _header(report: Report) -> Markup:
    badge = tag("span", report.status.replace("_", " "), class_=f"badge {_GOOD.get(report.status, 'bad')}")
    files = [_file(role, info) for role, info in (("input", report.input), ("output", report.output)) if info]
    facts = [human_seconds(report.seconds), site_counts(report) if report.sites else None]
    facts += [
        f"preset {report.preset}" if report.preset else None,
        None if report.seed is None else f"seed {report.seed}",
    ]
    return tag(
        "header",
        tag("h1", tag("span", "lrcompile", class_="brand"), f" {report.verb} ", badge),
        tag("p", " · ".join(fact for fact in facts if fact), class_="hint"),
        tag("div", *files, class_="files") if files else None,
        _error(report.error),
        tag("ul", *(tag("li", note) for note in report.notes), class_="notes") if report.notes else None,
    )


def _file(role: str, info: FileInfo) -> Markup:
    return tag(
        "div",
        tag("span", role, class_="role"),
        tag("span", info.path, class_="path"),
        tag("span", human_bytes(info.bytes), class_="size"),
        tag("code", f"sha256 {info.sha256}"),
        class_="file",
    )


def _error(error: dict[str, Any] | None) -> Markup | None:
    if error is None:
        return None
    where = f"{error['where']}: " if error.get("where") else ""
    hint = tag("div", error["hint"], class_="hint") if error.get("hint") else None
    return tag("div", tag("strong", f"{where}{error.get('message') or 'failed'}"), hint, class_="error")


def _tiles(report: Report) -> Markup | None:
    found = [_tile(row, report.verb) for row in comparison(report) if row.ratio is not None]
    if report.drift is not None and report.drift.relative_l2 is not None:
        limit = "no limit" if report.drift.limit is None else f"limit {human_float(report.drift.limit)}"
        mood = {True: "better", False: "worse", None: "same"}[report.drift.passed]
        found.append(_tile_of("drift", human_float(report.drift.relative_l2), limit, mood))
    return tag("div", *found, class_="tiles") if found else None


def _tile(row: Row, verb: str) -> Markup:
    big = row.change.partition(" [")[0]
    return _tile_of(row.label, big or row.after, f"{row.before} → {row.after}", row.verdict)


def _tile_of(name: str, big: str, small: str, mood: str) -> Markup:
    parts = [tag("div", name, class_="role"), tag("div", big, class_=f"big {mood}"), tag("div", small, class_="hint")]
    return tag("div", *parts, class_="tile")


def _comparison(report: Report) -> Markup | None:
    rows = comparison(report)
    if not rows:
        return None
    after = "planned" if report.verb == "plan" else "after"
    cells = [
        (
            row.label,
            row.before,
            row.after,
            tag("span", row.change, class_=f"change {row.verdict}"),
            charts.ratio_bar(row),
        )
        for row in rows
    ]
    hint = "The pale track is the model before. The whisker on the latency is the measured interval of its ratio."
    measured = any(row.interval for row in rows)
    table = rows_table(("", "before", after, "change", ""), cells, (1, 2, 3), "compare")
    return section("Before and after", table, hint=hint if measured else None)


def _budget(report: Report) -> Markup | None:
    if not report.budget:
        return None
    verdict = {True: "All limits hold.", False: "No plan holds all limits; this is the best found.", None: None}
    return section(
        "Budget",
        rows_table(("limit", "asked", "reached"), budget_rows(report), (1, 2), "narrow"),
        hint=verdict[report.feasible],
    )


def _ranks(report: Report) -> Markup | None:
    if not report.decisions:
        return None
    classes = charts.colours(report.decisions)
    keys = [tag("span", tag("i", class_=f"swatch {shade}"), name, class_="key") for name, shade in classes.items()]
    if any(not each.pass_ for each in report.decisions):
        keys.append(tag("span", tag("i", class_="swatch dense"), "stays dense", class_="key"))
    more = len(report.decisions) - charts.BARS
    hint = f"The first {charts.BARS} sites; {more} more are in the table below." if more > 0 else None
    chart = tag("div", charts.keep_bars(report.decisions), class_="scroll tall")
    return section("Kept per layer", tag("div", *keys, class_="legend"), chart, hint=hint)


def _spectra(report: Report) -> Markup | None:
    if not report.spectra:
        return None
    classes = charts.colours(report.decisions)
    shades = {each.site: classes[each.pass_] for each in report.decisions if each.pass_}
    chosen = evenly(report.spectra, SPECTRA)
    cells = [
        tag("div", _name(each.site), charts.tail_curve(each, shades.get(each.site, _shade(each.rank))), class_="cell")
        for each in chosen
    ]
    hint = (
        "The share of a layer's output energy that is lost if only the first ranks stay: rank 0 left, full rank right."
    )
    if len(chosen) < len(report.spectra):
        hint += f" {len(chosen)} of {len(report.spectra)} layers, evenly chosen."
    return section("Spectra", tag("div", *cells, class_="grid-of"), hint=hint)


def _shade(rank: int | None) -> str:
    return "plain" if rank is None else "c0"


def _name(site: str) -> Markup:
    """A site's name that may break after its separators."""
    parts = re.findall(r"[^/.:]*[/.:]|[^/.:]+", shorten(site, 300))
    return tag("code", join(each for part in parts for each in (part, tag("wbr"))))


def _drift(report: Report) -> Markup | None:
    if report.drift is None:
        return None
    rows = [(row.label, row.text, charts.drift_bar(row, report.drift.passed)) for row in drift_rows(report.drift)]
    hint = drift_verdict(report.drift)
    if report.calibration is None:
        hint += " · uncalibrated"
    else:
        hint += f" · calibrated with {report.calibration.kind}"
        if report.calibration.samples is not None:
            hint += f", {report.calibration.samples} samples"
    return section("Drift", rows_table(("measure", "value", ""), rows, (1,), "compare"), hint=hint)


def _decisions(report: Report) -> Markup | None:
    if not report.decisions:
        return None
    headings = ("site", "shape", "pass", "structure", "keep", "predicted", "error", "reason")
    table = rows_table(headings, (_decision(each) for each in report.decisions[:DECISIONS]), (4, 5, 6), "decisions")
    more = len(report.decisions) - DECISIONS
    hint = f"The first {DECISIONS}; {more} more are in the JSON report." if more > 0 else None
    return section("Decisions", tag("div", table, class_="tall"), hint=hint)


def _decision(each: Decision) -> tuple[object, ...]:
    name = each.pass_ or tag("span", what(each), class_="quiet")
    numbers = (keep_text(each), human_float(each.predicted), human_float(each.error))
    return (_name(each.site), shape_text(each.shape), name, each.structure or "", *numbers, each.reason)


def _passes(report: Report) -> Markup | None:
    if not report.passes:
        return None
    rows = [
        (
            each.name,
            "exact" if each.exact else "lossy",
            each.rewritten,
            each.refused,
            human_seconds(each.seconds),
            tag("span", f"rolled back: {each.rolled_back}", class_="worse") if each.rolled_back else "",
        )
        for each in report.passes
    ]
    return section("Passes", rows_table(("pass", "promise", "rewritten", "refused", "time", ""), rows, (2, 3, 4)))


def _memory(report: Report) -> Markup | None:
    if len(report.memory) < 2:
        return None
    return section("Memory over time", tag("div", charts.memory_curve(report.memory), class_="scroll"))


def _origin(report: Report) -> Markup | None:
    pairs = [(name, value or "–") for name, value in report.versions.items()] + list(report.machine.items())
    known = tag("dl", join(tag("div", tag("dt", key), tag("dd", value)) for key, value in pairs)) if pairs else None
    config = None
    if report.config:
        lines = json.dumps(jsonable(report.config), indent=2, ensure_ascii=False).split("\n")
        config = tag("pre", *(_config_line(text) for text in lines))
    if known is None and config is None:
        return None
    return section("How to get this again", known, config)


def _config_line(line: str) -> Markup:
    """Leading spaces and the line's end stay; escaping would fold them."""
    body = line.lstrip(" ")
    return join((Markup(" " * (len(line) - len(body))), body, Markup("\n")))
