"""Typed errors: what happened, where, what to do, and the exit code of the command line.

Every error that a user can cause is a subclass of :class:`LrcompileError`. The command
line prints ``message``, ``where`` and ``hint`` on one line each and exits with ``code``.
"""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class LrcompileError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, in one line.
        where: the site, node, file or option that it concerns.
        hint: what the user can do about it.
    """

    code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.report: Any = None  # what was found before the run stopped

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(LrcompileError):
    """Unknown option, key, pass or extra; an output that exists already."""

    code = 2


class PlanRequired(UsageError):
    """``torch.compile`` showed the backend only a part of the model, and a budget is never split over parts."""


class ReleasedError(LrcompileError):
    """The dense values of a weight were given back; only its factors are left."""


class InvalidInputError(LrcompileError):
    """Unreadable, unsafe or invalid file or data."""

    code = 3


class UnsupportedError(LrcompileError):
    """A model or target that is valid but beyond what is supported."""

    code = 4


class GateError(LrcompileError):
    """The rewritten model failed a check; nothing was published."""

    code = 5


class InfeasibleError(LrcompileError):
    """No plan fits the budget; the message carries the best one found.

    Attributes:
        best: the least that every limit could be, by the limit's name.
    """

    code = 6

    def __init__(
        self, message: str, *, where: str = "", hint: str = "", best: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.best = dict(best or {})


class ResourceError(LrcompileError):
    """Out of memory, out of disk, or out of time."""

    code = 7


class LrcompileWarning(UserWarning):
    """The result is right, but not what the user may expect; the text says what to do."""


_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def warn_once(owner: object, message: str, *, key: str = "") -> None:
    """A warning that comes once for each ``owner`` and ``key`` (by default the message)."""
    said = _said.setdefault(owner, set())
    if (key or message) not in said:
        said.add(key or message)
        warnings.warn(message, LrcompileWarning, stacklevel=2)


_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation", "Failed to allocate memory")


def out_of_memory(error: BaseException) -> ResourceError | None:
    """The typed error where a library says in its own words that memory ran out, else None."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return ResourceError("not enough memory", hint="calibrate with fewer samples, or on a larger machine")
    return None


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed",
            hint=f'pip install "lrcompile[{extra}]"',
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known spelling, or lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
