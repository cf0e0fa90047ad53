"""The command line."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; exits with the documented codes."""
    from lrcompile.cli.app import run

    raise SystemExit(run())
