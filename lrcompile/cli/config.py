"""Options from a TOML file: the same names as the flags, below the command line and the environment.

A report holds the resolved options of its run, so a report is a config file too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrcompile.errors import InvalidInputError, UsageError, nearest

LIMIT = 2**26
"""Largest config file or report that is read, in bytes."""
_NOT_IN_FILES = {"config", "help", "json", "debug"}


def read(path: str | Path, parameters: Iterable[Any]) -> dict[str, Any]:
    """The options of a ``.toml`` file, or of the ``config`` of a report, by the names of a command's parameters.

    Args:
        parameters: of the command, with ``name``, ``opts``, ``secondary_opts`` and ``multiple``.

    Raises:
        UsageError: an unknown key, or a value of the wrong form.
        InvalidInputError: unreadable.
    """
    table, known = _load(Path(path)), _keys(parameters)
    found: dict[str, Any] = {}
    for key, value in table.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            raise UsageError(f"unknown key '{key}'", where=str(path), hint=nearest(key, known))
        if parameter.name in found:
            raise UsageError(f"'{key}' is given twice", where=str(path), hint="under another of its names")
        found[parameter.name] = _value(key, value, parameter, path)
    return found


def _keys(parameters: Iterable[Any]) -> dict[str, Any]:
    """Key → parameter: the long names of its flag, without the dashes."""
    found = {}
    for parameter in parameters:
        names = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
        if parameter.name not in _NOT_IN_FILES:
            found |= dict.fromkeys(names, parameter)
    return found


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > LIMIT:
            raise InvalidInputError(f"above the limit of {LIMIT} bytes", where=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidInputError(f"cannot be read: {reason}", where=str(path)) from error
    try:
        if path.suffix != ".json":
            return tomllib.loads(text)
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"malformed: {error}", where=str(path), hint="for example: keep = 0.8") from error
    config = report.get("config") if isinstance(report, dict) else None
    if not isinstance(config, dict):
        raise InvalidInputError("not a report: it has no 'config'", where=str(path))
    return config


def _value(key: str, value: Any, parameter: Any, path: str | Path) -> Any:
    """Values are numbers, texts and truth values; where a flag may be repeated, one or a list of them."""
    repeated = getattr(parameter, "multiple", False)
    items = value if repeated and isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in items):
        form = "a text or a list of texts" if repeated else "a number, a text, true or false"
        raise UsageError(f"'{key}' takes {form}", where=str(path))
    if getattr(parameter, "is_flag", False) != isinstance(value, bool):
        hint = "true or false" if getattr(parameter, "is_flag", False) else "a number or a text"
        raise UsageError(f"'{key}' takes {hint}, not {json.dumps(value)}", where=str(path))
    return items if repeated else value
