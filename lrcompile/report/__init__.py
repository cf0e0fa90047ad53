"""What happened, told three ways: JSON for machines, a table for terminals, one HTML file for people.

The records are plain data and import nothing heavy; the tellers are imported when they are called.
Nothing here writes a file: the texts go wherever the caller stages them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lrcompile.report.environment import machine, versions
from lrcompile.report.record import (
    BudgetLine,
    Calibration,
    Decision,
    Drift,
    FileInfo,
    PassRecord,
    Ratio,
    Report,
    Size,
    Spectrum,
    jsonable,
    to_json,
)
from lrcompile.report.text import human_bytes, human_count

if TYPE_CHECKING:
    from typing import TextIO

__all__ = [
    "BudgetLine",
    "Calibration",
    "Decision",
    "Drift",
    "FileInfo",
    "PassRecord",
    "Ratio",
    "Report",
    "Size",
    "Spectrum",
    "html_text",
    "human_bytes",
    "human_count",
    "json_text",
    "jsonable",
    "machine",
    "print_report",
    "table_text",
    "to_json",
    "versions",
]


def json_text(report: Report | dict[str, Any]) -> str:
    """The JSON object of :func:`to_json`, indented, ASCII only, with a final newline."""
    return json.dumps(report if isinstance(report, dict) else to_json(report), indent=2, allow_nan=False) + "\n"


def html_text(report: Report) -> str:
    """One HTML file that opens offline: no scripts, no references, pictures as inline SVG."""
    from lrcompile.report.html import page

    return page(report)


def table_text(report: Report, *, width: int = 100) -> str:
    """The terminal's tables as plain text, without colours, at most ``width`` columns wide."""
    from lrcompile.report.table import plain

    return plain(report, width=width)


def print_report(report: Report, stream: TextIO | None = None) -> None:
    """Prints the tables to ``stream`` (standard output); colours only on a terminal, never under ``NO_COLOR``."""
    from lrcompile.report.table import render

    render(report, stream)
