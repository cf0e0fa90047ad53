"""What all verbs share: output for people or as JSON, errors in one line, exit codes, progress."""

from __future__ import annotations

import errno
import json as json_format
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from lrcompile.errors import InvalidInputError, LrcompileError, UsageError, nearest, out_of_memory
from lrcompile.progress import Progress

_STATUS = {5: "gate_failed", 6: "infeasible", 130: "interrupted"}
_READING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class _Interrupted(LrcompileError):
    code: ClassVar[int] = 130


class _UnexpectedError(LrcompileError):
    code: ClassVar[int] = 1


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: fields of its JSON object, how to show it to a person, and what failed, if anything."""

    fields: dict[str, Any]
    show: Callable[[], None]
    status: str = "ok"
    error: LrcompileError | None = None


class Stop(Exception):
    """Ends the command with an exit code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def verb(name: str, work: Callable[[Progress], Answer], *, json: bool, debug: bool, quiet: bool = True) -> None:
    """Runs a verb and says what came of it; what others print meanwhile goes to stderr."""
    start = time.monotonic()
    try:
        with redirect_stdout(sys.stderr), _progress(quiet) as tell:
            answer = work(tell)
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        known = _typed(error)
        if json:
            _print(_failure(name, known, time.monotonic() - start))
        _say(known)
        raise Stop(known.code) from None
    if json:
        _print(_head(name, answer.status, time.monotonic() - start) | _error(answer.error) | answer.fields)
    else:
        answer.show()
    if answer.error is not None:
        _say(answer.error)
        raise Stop(answer.error.code)


def _typed(error: BaseException) -> LrcompileError:
    """Whatever ended a verb, as one of ours."""
    match error:
        case LrcompileError():
            return error
        case KeyboardInterrupt():
            known: LrcompileError = _Interrupted("interrupted; nothing was written")
        case OSError():
            known = _system(error)
        case _:
            text = (str(error).splitlines() or [""])[0][:300]
            hint = "this is a bug: run it again with --debug and report the traceback"
            known = out_of_memory(error) or _UnexpectedError(f"{type(error).__name__}: {text}", hint=hint)
    known.report = getattr(error, "report", None)
    return known


def _system(error: OSError) -> LrcompileError:
    """Writing is typed where it happens; what arrives here was reading, or a full disk beside the output."""
    from lrcompile.files import write_error

    if error.errno in _READING:
        return InvalidInputError(f"cannot be read: {os.strerror(error.errno)}", where=str(error.filename or ""))
    return write_error(error, error.filename or "")


# -- output ------------------------------------------------------------------------------------


def _head(name: str, status: str, seconds: float) -> dict[str, Any]:
    from lrcompile.report import jsonable, versions

    return {
        "schema": f"lrcompile.{name}/1",
        "status": status,
        "seconds": jsonable(seconds),
        "versions": versions(),
    }


def _error(error: LrcompileError | None) -> dict[str, Any]:
    if error is None:
        return {}
    fields = {"code": error.code, "message": error.message, "hint": error.hint, "where": str(error.where)}
    return {"error": fields}


def _failure(name: str, error: LrcompileError, seconds: float) -> dict[str, Any]:
    """The JSON object of a run that stopped: what it found until then, and that nothing was published."""
    from lrcompile.report import to_json

    found = {} if error.report is None else to_json(error.report)
    head = _head(name, _STATUS.get(error.code, "error"), seconds) | _error(error)
    unpublished = dict.fromkeys(("output", "report")) if name == "optimize" else {}
    return head | {key: value for key, value in found.items() if key not in head} | unpublished


def _say(error: LrcompileError) -> None:
    line = f"error: {error.where}: {error.message}" if error.where else f"error: {error.message}"
    print(" ".join(line.split()), file=sys.stderr)
    if error.hint:
        print(f"hint: {' '.join(error.hint.split())}", file=sys.stderr)


def _print(found: dict[str, Any]) -> None:
    try:
        print(json_format.dumps(found, indent=2, allow_nan=False), flush=True)
    except BrokenPipeError:  # nobody listens any more; what happened stays as it is
        _mute()


def _mute() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- parsing -----------------------------------------------------------------------------------


def guard(command: Callable[..., Any], arguments: list[str]) -> int:
    """Parses and runs a command; turns whatever ends it into an exit code."""
    try:
        code = command(args=arguments, prog_name="lrcompile", standalone_mode=False)
    except Stop as stop:
        return stop.code
    except BrokenPipeError:
        _mute()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return _unparsed(error, command, arguments)
    return code if isinstance(code, int) else 0


def _unparsed(error: BaseException, command: Any, arguments: Sequence[str]) -> int:
    """What ended a command before its verb began: mostly unknown words, exit code 2."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    if type(error).__name__ == "Abort":
        error = KeyboardInterrupt()
    known = _usage(error) if hasattr(error, "format_message") else _typed(error)
    if "--json" in arguments:
        name = next((word for word in arguments if word in command.commands), "usage")
        _print(_failure(name, known, 0.0))
    _say(known)
    return known.code


def _usage(error: Any) -> UsageError:
    """The parser's complaint in our words, with the nearest name."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    if command is not None and hasattr(error, "possibilities"):
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        hint = nearest(error.option_name, {name for name in known if name.startswith("--")} | {"--help"})
        return UsageError(f"unknown option '{error.option_name}'", hint=hint)
    text = error.format_message()
    if command is not None and text.startswith("No such command"):
        word = text.split("'")[1]
        return UsageError(f"unknown command '{word}'", hint=nearest(word, command.commands))
    return UsageError(text.rstrip("."), hint=f"{context.command_path if context else 'lrcompile'} --help")


# -- progress ----------------------------------------------------------------------------------


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        yield Progress()
    elif sys.stderr.isatty() and os.environ.get("CI", "").lower() in ("", "0", "false"):
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield _Lines()


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

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._task is not None:
            self._rich.stop()
