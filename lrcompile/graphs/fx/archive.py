"""Reading ``.pt2`` files of strangers: what stands in an archive is looked at before torch reads it.

``torch.export.load`` unpickles, evaluates symbolic expressions, generates code out of names and guards, and resolves
operations by attribute. So an archive is read only if it holds nothing but the files that ``torch.export.save`` writes
for plain tensors, and if every text in it that torch would execute is of a plain form; see
:mod:`lrcompile.graphs.fx.checks`. All of it is read by torch's own reader, so that both see the same files.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError, out_of_memory
from lrcompile.graphs.fx.checks import check_program, check_word

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
REQUIRED = ("archive_format", "archive_version", PROGRAM, SAMPLES, WEIGHTS, CONSTANTS)
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_TRUSTED = "if you trust the file, read it with torch.export.load and pass the program to lrcompile.optimize"


def load(path: Path) -> ExportedProgram:
    """The exported program of a ``.pt2`` file, after a check that nothing in it could run code.

    Raises:
        InvalidInputError: unreadable, truncated, another format, or something that is not plain data.
        UnsupportedError: valid, but of another kind: ahead-of-time compiled, several programs, extra files.
        ResourceError: out of memory.
    """
    try:
        with open(path, "rb") as stream:
            _check(stream, path)
            stream.seek(0)
            return _read(stream, path)
    except OSError as error:
        raise InvalidInputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _read(stream: IO[bytes], path: Path) -> ExportedProgram:
    # torch.export.load would go on with the format of older releases, which is not checked here
    from torch.export.pt2_archive._package import load_pt2

    try:
        return load_pt2(stream).exported_programs["model"]
    except LrcompileError:
        raise
    except Exception as error:  # torch raises anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1].strip()[:300]
        raise out_of_memory(error) or InvalidInputError(f"torch cannot read it: {reason}", where=str(path)) from error


def _check(stream: IO[bytes], path: Path) -> None:
    """Looks at everything but the values of the tensors.

    Raises:
        InvalidInputError, UnsupportedError: see :func:`load`.
    """
    reader, where = _reader(stream, path), str(path)
    names: list[str] = reader.get_all_records()
    _check_names(names, where)
    if reader.get_record("archive_format") != b"pt2":
        raise InvalidInputError("is no .pt2 archive", where=where)
    _check_pickle(reader.get_record(SAMPLES), "the sample inputs", where)
    for config in (WEIGHTS, CONSTANTS):
        _check_payload(reader, names, config, where)
    try:
        check_program(_json(reader, PROGRAM, where))
    except LrcompileError as error:
        error.where = f"{where}: {error.where}".removesuffix(": ")
        error.hint = error.hint or _TRUSTED
        raise


def _reader(stream: IO[bytes], path: Path) -> Any:
    try:
        return torch._C.PyTorchFileReader(stream)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, OSError) as error:
        raise InvalidInputError(
            "is no .pt2 archive, or only a part of one", where=str(path), hint="write it with torch.export.save"
        ) from error


def _check_names(names: Sequence[str], where: str) -> None:
    for prefix, what in (
        ("data/aotinductor/", "compiled code"),
        ("extra/", "extra files"),
        ("data/executorch/", "code"),
    ):
        if any(name.startswith(prefix) for name in names):
            raise UnsupportedError(f"the archive holds {what}", where=where, hint=_TRUSTED)
    missing = [name for name in REQUIRED if name not in names]
    if any(name.startswith("models/") for name in names) and PROGRAM in missing:
        raise UnsupportedError("the archive holds no program called 'model'", where=where, hint=_TRUSTED)
    if missing:
        raise InvalidInputError(f"the archive lacks {missing[0]}", where=where, hint="write it with torch.export.save")
    for name in names:
        if not _KNOWN.fullmatch(name):
            raise InvalidInputError(
                f"the archive holds {name[:80]!r}, which is not plain data", where=where, hint=_TRUSTED
            )
    if len(set(names)) != len(names):
        raise InvalidInputError("the archive holds a name twice", where=where)


def _json(reader: Any, name: str, where: str) -> Any:
    try:
        found = json.loads(reader.get_record(name))
    except (ValueError, RecursionError, RuntimeError) as error:
        raise InvalidInputError(f"{name} cannot be read: {str(error)[:100]}", where=where) from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{name} is malformed", where=where)
    return found


def _check_pickle(data: bytes, what: str, where: str) -> None:
    """A pickle may hold tensors and plain values only."""
    if not data:
        return
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a malicious pickle provokes
        raise InvalidInputError(
            f"{what} are a pickle of something else than tensors", where=where, hint=_TRUSTED
        ) from error
    if not _plain(found):
        raise InvalidInputError(f"{what} hold something else than tensors", where=where, hint=_TRUSTED)


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        for key in value:
            check_word(key)
        return all(_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return (
        value is None or isinstance(value, bool | int | float | Tensor) or (isinstance(value, str) and value.isalnum())
    )


def _check_payload(reader: Any, names: Sequence[str], config: str, where: str) -> None:
    """Stored tensors: raw numbers, or a pickle of one tensor."""
    folder = config.rpartition("/")[0]
    entries = _json(reader, config, where).get("config")
    if not isinstance(entries, dict):
        raise InvalidInputError(f"{config} is malformed", where=where)
    for name, entry in entries.items():
        check_word(name)
        record = f"{folder}/{entry.get('path_name')}" if isinstance(entry, dict) else ""
        if record not in names or record.endswith(".json"):
            raise InvalidInputError(f"the tensor {name!r} is not in the archive", where=where)
        if entry.get("use_pickle"):
            _check_pickle(reader.get_record(record), f"the values of {name!r}", where)
        else:
            _check_meta(name, entry.get("tensor_meta"), reader.get_record_size(record), where)


def _check_meta(name: str, meta: Any, size: int, where: str) -> None:
    """The declared shape fits what is stored: torch would allocate an empty record at any size."""
    try:
        shape = [int(each["as_int"]) for each in meta["sizes"]]
        strides = [int(each["as_int"]) for each in meta["strides"]]
        start = int(meta["storage_offset"]["as_int"])
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidInputError(f"the tensor {name!r} has no plain shape", where=where) from error
    reach = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=False)) + 1 if prod(shape) else 0
    if min([*shape, *strides, start], default=0) < 0 or len(shape) != len(strides) or reach > size:
        raise InvalidInputError(f"the tensor {name!r} is larger than what is stored of it", where=where)
