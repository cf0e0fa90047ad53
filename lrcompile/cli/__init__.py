"""The command line."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; exits with the documented codes."""
    import signal

    from lrcompile.cli.app import run

    signal.signal(signal.SIGTERM, _terminated)
    _return_memory()
    raise SystemExit(run())


def _return_memory() -> None:
    """Tells the C library to hand large blocks back at once.

    By itself it raises the size of what it keeps up to 32 MiB, and runs of a model in many sizes leave
    hundreds of megabytes of holes behind.
    """
    import ctypes
    from contextlib import suppress

    with suppress(OSError, AttributeError):  # not every system has this function
        ctypes.CDLL(None).mallopt(-3, 4 * 2**20)  # -3: M_MMAP_THRESHOLD


def _terminated(number: int, _: object) -> None:
    """Ends the program as an exception does, so that no half-written file is left."""
    raise SystemExit(128 + number)
