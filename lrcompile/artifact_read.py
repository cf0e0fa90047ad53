"""Reading an artefact's files: sizes, types and names are checked before anything is built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompile.errors import InvalidInputError, UnsupportedError

SCHEMA = "lrcompile.artifact/1"
TARGET = "lrcompile.json"
WEIGHTS = "lrcompile.safetensors"
PROGRAM = "program.json"
CONFIG = "config.json"
LIMIT = 2**28
"""Largest JSON file that is read, in bytes."""
_HINT = "the folder is incomplete or was changed; save the model again"


def resolve(folder: Path, name: str) -> Path:
    """A file of the folder, links resolved.

    Raises:
        InvalidInputError: missing, not a plain file, or outside of the folder.
    """
    path = (folder / name).resolve()
    if not path.is_file():
        raise InvalidInputError("there is no such file", where=str(folder / name), hint=_HINT)
    if not path.is_relative_to(folder.resolve()):
        raise InvalidInputError("the file leads out of the folder", where=str(folder / name), hint="copy it there")
    return path


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file.

    Raises:
        InvalidInputError: missing, too large, or not JSON.
    """
    path = resolve(folder, name)
    if path.stat().st_size > LIMIT:
        raise InvalidInputError(f"above the limit of {LIMIT} bytes", where=str(path))
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidInputError(f"not readable as JSON: {str(error)[:200]}", where=str(path), hint=_HINT) from error


_TYPES: dict[str, type] = {
    "content": str,
    "model": dict,
    "aliases": dict,
    "sites": list,
    "buffers": dict,
    "parameters": list,
}
_SITE: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "kind": str,
    "structure": list,
    "tensors": dict,
    "bias": (str, type(None)),
    "stride": list,
    "trainable": bool,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """``lrcompile.json``, its form verified.

    Raises:
        InvalidInputError: unreadable or malformed.
        UnsupportedError: written by a later version.
    """
    manifest = read_json(folder, TARGET)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, str) or not schema.startswith("lrcompile.artifact/"):
        raise InvalidInputError("not an artefact of lrcompile", where=str(folder / TARGET))
    if schema != SCHEMA:
        raise UnsupportedError(f"schema {schema}; this version reads {SCHEMA}", where=str(folder / TARGET))
    _check(manifest, _TYPES, TARGET)
    if not all(isinstance(manifest["model"].get(key), str) for key in ("module", "class")):
        raise InvalidInputError("malformed entry 'model'", where=TARGET)
    for table in ("aliases", "buffers"):
        if not all(isinstance(value, str) for value in manifest[table].values()):
            raise InvalidInputError(f"malformed entry '{table}'", where=TARGET)
    for site in manifest["sites"]:
        _check(site, _SITE, f"{TARGET}: sites")
        names_ok = all(isinstance(name, str) for name in site["tensors"].values())
        if not names_ok or not all(type(step) is int and step > 0 for step in site["stride"]):
            raise InvalidInputError("malformed site", where=site["path"])
    return manifest


def _check(entry: Any, types: dict[str, Any], where: str) -> None:
    if not isinstance(entry, dict):
        raise InvalidInputError("malformed entry", where=where)
    for name, kind in types.items():
        if not isinstance(entry.get(name), kind) or name not in entry:
            raise InvalidInputError(f"malformed entry '{name}'", where=where)


def read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """All stored tensors by name, mapped from the file.

    Raises:
        InvalidInputError: corrupt, or not the file that belongs to the manifest.
    """
    from safetensors import SafetensorError, safe_open

    path = resolve(folder, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as stream:
            content = (stream.metadata() or {}).get("lrcompile")
            held = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInputError(f"corrupt weights: {str(error)[:200]}", where=str(path), hint=_HINT) from error
    if content != manifest["content"]:
        raise InvalidInputError(f"does not belong to {TARGET}", where=str(path), hint=_HINT)
    return held
