"""Memory that is free for the system, not only for the next call of malloc."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress

PAUSE = 0.03
"""Seconds between two calls that do something: one takes about a millisecond."""
LARGE = 2 * 2**20
"""Bytes of a block that is worth a system call."""

_last = 0.0


def release(*, now: bool = False) -> None:
    """Hands freed memory back to the system; unless ``now``, at most once in :data:`PAUSE` seconds.

    Runs of a model in many sizes leave holes between what stays; the C library would keep them until the end.
    """
    global _last
    if not now and time.monotonic() - _last < PAUSE:
        return
    with suppress(OSError, AttributeError):  # not every system has this function
        ctypes.CDLL(None).malloc_trim(0)
    _last = time.monotonic()


def stay_small() -> None:
    """Tells the C library to hand large blocks back at once, and to keep one heap for all threads.

    By itself it raises the size of what it keeps up to 32 MiB, and gives every thread a heap with holes of its own.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, LARGE)  # M_MMAP_THRESHOLD
        library.mallopt(-8, 1)  # M_ARENA_MAX
