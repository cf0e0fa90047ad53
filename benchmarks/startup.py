"""How long the command line takes to say what it can do."""

from __future__ import annotations

import statistics

from benchmarks.common import run, table, write

RUNS = 15


def main() -> None:
    """Times ``lrcompile --help``, and an empty Python for comparison, in turns."""
    help_seconds, empty_seconds = [], []
    for _ in range(RUNS):
        help_seconds.append(run(["lrcompile", "--help"]).seconds)
        empty_seconds.append(run(["this"]).seconds)
    rows = [
        [what, f"{min(times):.2f}", f"{statistics.median(times):.2f}", f"{max(times):.2f}"]
        for what, times in (("`lrcompile --help`", help_seconds), ("`python -m this`", empty_seconds))
    ]
    head = ["command", "least, s", "median, s", "most, s"]
    write("startup", "Start-up time", [f"{RUNS} runs each, in turns; resolution 0.02 s.", table(head, rows)])
