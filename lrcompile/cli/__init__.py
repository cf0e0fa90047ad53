"""The command line."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; exits with the documented codes."""
    import signal

    from lrcompile.cli.app import run
    from lrcompile.memory import stay_small

    signal.signal(signal.SIGTERM, _terminated)
    stay_small()
    raise SystemExit(run())


def _terminated(number: int, _: object) -> None:
    """Ends the program as an exception does, so that no half-written file is left."""
    raise SystemExit(128 + number)
