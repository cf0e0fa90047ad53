"""What all verbs share: output for people or as JSON, errors in one line, exit codes, progress."""

from __future__ import annotations

import json as json_format
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lrcompile.errors import LrcompileError, ResourceError, UsageError
from lrcompile.progress import Progress

_STATUS = {5: "gate_failed", 6: "infeasible"}


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: fields of its JSON object, and how to show it to a person."""

    fields: dict[str, Any]
    show: Callable[[], None]
    status: str = "ok"
    code: int = 0
    seconds: float | None = field(default=None)


class Stop(Exception):  # noqa: N818 - a way out, no error
    """Ends the command with an exit code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def verb(name: str, work: Callable[[], Answer], *, json: bool, debug: bool) -> None:
    """Runs a verb and says what came of it."""
    import time

    start = time.monotonic()
    try:
        answer = work()
    except KeyboardInterrupt:
        _fail(name, 130, "interrupted; nothing was written", "", "", None, json=json, seconds=time.monotonic() - start)
        raise Stop(130) from None
    except (LrcompileError, MemoryError, OSError) as error:
        if debug:
            traceback.print_exc()
        known = _typed(error)
        seconds = time.monotonic() - start
        _fail(name, known.code, known.message, known.hint, known.where, known.report, json=json, seconds=seconds)
        raise Stop(known.code) from None
    if json:
        from lrcompile.report import jsonable, versions

        head = {"schema": f"lrcompile.{name}/1", "status": answer.status, "seconds": time.monotonic() - start}
        _print(jsonable(head) | {"versions": versions()} | answer.fields)
    else:
        answer.show()
    if answer.code:
        raise Stop(answer.code)


def _typed(error: BaseException) -> LrcompileError:
    """Errors of the system as ours."""
    if isinstance(error, LrcompileError):
        return error
    if isinstance(error, OSError):
        from lrcompile.files import write_error

        return write_error(error, error.filename or "")
    return ResourceError("not enough memory", hint="calibrate with fewer samples, or on a larger machine")


def _fail(
    name: str, code: int, message: str, hint: str, where: str, report: Any, *, json: bool, seconds: float
) -> None:
    if json:
        from lrcompile.report import jsonable, to_json, versions

        found = {} if report is None else to_json(report)
        found |= {"schema": f"lrcompile.{name}/1", "status": _STATUS.get(code, "error"), "seconds": jsonable(seconds)}
        found["versions"] = versions()
        if name == "optimize":
            found["output"] = None
        found["error"] = {"code": code, "message": message, "hint": hint, "where": where}
        _print(found)
    line = f"error: {where}: {message}" if where else f"error: {message}"
    print(" ".join(line.split()), file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def _print(found: dict[str, Any]) -> None:
    print(json_format.dumps(found, indent=2, allow_nan=False))


def guard(command: Callable[..., Any], arguments: list[str]) -> int:
    """Runs the parsed command; turns whatever ends it into an exit code."""
    try:
        command(args=arguments, prog_name="lrcompile", standalone_mode=False)
    except Stop as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _usage(error, arguments)
    return 0


def _usage(error: Exception, arguments: Sequence[str]) -> int:
    """Errors of the argument parser: exit code 2, as JSON too where it was asked for."""
    show = getattr(error, "format_message", None)
    if show is None:
        if getattr(error, "exit_code", None) is not None:
            return int(error.exit_code)  # type: ignore[attr-defined]
        if type(error).__name__ == "Abort":
            return 130
        raise error
    name = next((word for word in arguments if not word.startswith("-")), "lrcompile")
    known = UsageError(show(), hint=f"lrcompile {name} --help" if name != "lrcompile" else "lrcompile --help")
    _fail(name, 2, known.message, known.hint, "", None, json="--json" in arguments, seconds=0.0)
    return 2


# -- progress ----------------------------------------------------------------------------------


def progress(quiet: bool) -> Progress:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Progress()
    if sys.stderr.isatty() and os.environ.get("CI") != "true":
        return _Bars()
    return _Lines()


class _Lines(Progress):
    def __call__(self, text: str, total: int | None = None) -> None:
        print(f"lrcompile: {text}", file=sys.stderr, flush=True)


class _Bars(Progress):
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._rich = Rich(*columns, console=Console(stderr=True), transient=True)
        self._task: Any = None

    def __call__(self, text: str, total: int | None = None) -> None:
        if self._task is None:
            self._rich.start()
        else:
            self._rich.remove_task(self._task)
        self._task = self._rich.add_task(text, total=total)

    def advance(self) -> None:
        if self._task is not None:
            self._rich.advance(self._task)

    def __del__(self) -> None:
        if self._task is not None:
            self._rich.stop()
