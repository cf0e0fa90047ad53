"""The report on a terminal."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING, TextIO

from lrcompile.report.record import Report
from lrcompile.report.summary import budget_rows, comparison, drift_rows, drift_verdict, keep_text, site_counts
from lrcompile.report.text import ascii_text, human_float, human_seconds, shape_text, shorten, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_DECISIONS = 40
PLAIN_WIDTH = 100
_COLOURS = {"better": "green", "worse": "red", "same": "", "": ""}
_STATUS = {"ok": "green", "unchanged": "cyan", "gate_failed": "red", "infeasible": "yellow"}


def render(report: Report, stream: TextIO | None = None, *, width: int | None = None) -> None:
    """Prints the report to ``stream`` (standard output).

    Colours appear only on a terminal and never under ``NO_COLOR``; elsewhere the text is 100 columns wide.
    What the stream's encoding cannot say is spelled in ASCII.
    """
    from rich.console import Console

    out: TextIO = sys.stdout if stream is None else stream
    console = Console(file=out, highlight=False, markup=False, emoji=False)
    if width is not None or not console.is_terminal:
        console.width = width or PLAIN_WIDTH
    with console.capture() as captured:
        _fill(console, report)
    text = _trimmed(captured.get())
    try:
        text.encode(getattr(out, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = ascii_text(text)
    out.write(text)


def plain(report: Report, *, width: int = PLAIN_WIDTH) -> str:
    """The same without any colour, as text of at most ``width`` columns."""
    from rich.console import Console

    buffer = StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, highlight=False)
    _fill(console, report)
    return _trimmed(buffer.getvalue())


def _trimmed(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _fill(console: Console, report: Report) -> None:
    from rich.text import Text

    title = Text.assemble((f"{report.verb}: ", "bold"), (visible(report.status), _STATUS.get(report.status, "red")))
    title.append(f"  ({human_seconds(report.seconds)})")
    console.print(title)
    if report.error is not None:
        _print_error(console, report.error)
    if comparison(report) or report.drift is not None:
        console.print(_comparison_table(report))
    if report.drift is not None:
        console.print(Text(f"drift: {drift_verdict(report.drift)}", _drift_colour(report.drift.passed)))
    for name, asked, reached in budget_rows(report):
        console.print(Text(f"budget {name}: {asked} asked, {reached} reached"))
    if report.decisions:
        console.print(Text(site_counts(report)))
        console.print(_decision_table(report))
        more = len(report.decisions) - MOST_DECISIONS
        if more > 0:
            console.print(Text(f"… and {more} more in {visible(report.report or 'report.json')}"))
    for note in report.notes:
        console.print(Text(f"note: {visible(note)}"))


def _print_error(console: Console, error: dict) -> None:
    from rich.text import Text

    where = f"{visible(str(error['where']))}: " if error.get("where") else ""
    console.print(Text(f"error: {where}{visible(str(error.get('message') or ''))}", "red"))
    if error.get("hint"):
        console.print(Text(f"hint: {visible(str(error['hint']))}"))


def _drift_colour(passed: bool | None) -> str:
    return {True: "green", False: "red", None: "yellow"}[passed]


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, header_style="bold")


def _comparison_table(report: Report) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("")
    for name in ("before", "planned" if report.verb == "plan" else "after", "change"):
        table.add_column(name, justify="right")
    for row in comparison(report):
        table.add_row(Text(row.label), Text(row.before), Text(row.after), Text(row.change, _COLOURS[row.verdict]))
    for row in drift_rows(report.drift):
        limit = "" if row.limit is None else f"limit {human_float(row.limit)}"
        table.add_row(Text(f"drift, {row.label}"), Text(""), Text(row.text), Text(limit))
    return table


def _decision_table(report: Report) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("site", no_wrap=True, min_width=12)
    table.add_column("shape", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("keep", justify="right", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("reason", ratio=1)
    for each in report.decisions[:MOST_DECISIONS]:
        style = "" if each.pass_ else "dim"
        cells = (
            shorten(each.site, 36),
            shape_text(each.shape),
            shorten(each.pass_ or "stays dense", 24),
            keep_text(each),
            human_float(each.predicted, 2),
            shorten(each.reason or (each.structure or ""), 160),
        )
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table
