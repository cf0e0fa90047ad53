"""Containers of samples, read a few rows at a time: arrays, ``.npy`` and ``.npz`` files, iterables."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from lrcompile.errors import InvalidInputError

Chunk = dict[str, np.ndarray]
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class Column:
    """The type and shape (rows first) of one array of a part."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Part(Protocol):
    """Arrays with one leading dimension. ``positional`` parts have the keys "0", "1", …, in the inputs' order."""

    where: str
    positional: bool

    @property
    def columns(self) -> Mapping[str, Column]: ...

    def chunks(self, names: Iterable[str], start: int, stop: int, size: int) -> Iterator[Chunk]: ...


class ArrayPart:
    """Arrays in memory, or mapped; chunks are views."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str, *, positional: bool = False) -> None:
        self.where, self.positional, self.arrays = where, positional, dict(arrays)
        self.columns = {name: Column(array.dtype, array.shape) for name, array in self.arrays.items()}
        _check_columns(self.columns, where)

    def chunks(self, names: Iterable[str], start: int, stop: int, size: int) -> Iterator[Chunk]:
        names = list(names)
        for begin in range(start, stop, size):
            yield {name: self.arrays[name][begin : min(begin + size, stop)] for name in names}


class NpzPart:
    """An ``.npz`` file whose members are decompressed row by row, never as a whole."""

    positional = False

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        self._members: dict[str, str] = {}
        self.columns: dict[str, Column] = {}
        with _damage(self.where), zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in self._members:
                    raise InvalidInputError(f"member {info.filename!r} is no array", where=self.where)
                self._members[name] = info.filename
                with archive.open(info) as stream:
                    shape, fortran, dtype = _header(stream, f"{path}: {name}")
                    if stream.tell() + dtype.itemsize * int(np.prod(shape, dtype=object)) != info.file_size:
                        raise InvalidInputError("the array's length disagrees with its shape", where=f"{path}: {name}")
                if fortran and len(shape) > 1:
                    raise InvalidInputError(
                        "the array is in Fortran order", where=f"{path}: {name}", hint="np.ascontiguousarray it"
                    )
                self.columns[name] = Column(dtype, shape)
        _check_columns(self.columns, self.where)

    def chunks(self, names: Iterable[str], start: int, stop: int, size: int) -> Iterator[Chunk]:
        with _damage(self.where), ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            streams: dict[str, IO[bytes]] = {}
            for name in names:
                streams[name] = stack.enter_context(archive.open(self._members[name]))
                _header(streams[name], name)
                streams[name].seek(start * self._row(name), os.SEEK_CUR)
            for begin in range(start, stop, size):
                rows = min(size, stop - begin)
                chunk = {name: self._read(streams[name], name, rows) for name in streams}
                yield chunk

    def _row(self, name: str) -> int:
        column = self.columns[name]
        return column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=object))

    def _read(self, stream: IO[bytes], name: str, rows: int) -> np.ndarray:
        column = self.columns[name]
        data = stream.read(rows * self._row(name))
        return np.frombuffer(bytearray(data), column.dtype).reshape((rows, *column.shape[1:]))


class _damage:
    """Turns what a damaged file makes NumPy and zipfile raise into one typed error."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, _DAMAGE):
            hint = "pickled objects are not read" if "pickle" in str(error).lower() else ""
            raise InvalidInputError(f"cannot be read: {error}", where=self.where, hint=hint) from error


def open_source(source: Any) -> list[Part]:
    """The parts of a path, an array, a mapping, an iterable of batches or a CalibrationDataReader.

    Raises:
        InvalidInputError: missing, damaged or foreign files; anything that is not numbers.
    """
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source))
    if isinstance(source, Mapping) or _is_array(source):
        return [_batch(source, "data")]
    if hasattr(source, "get_next"):
        return [_batch(item, f"batch {i}") for i, item in enumerate(iter(source.get_next, None))]
    if isinstance(source, Iterable):
        return [_batch(item, f"batch {i}") for i, item in enumerate(source)]
    raise InvalidInputError(
        f"cannot take samples from {type(source).__name__}",
        hint="give a .npz or .npy file, a folder of them, or an iterable of dicts or arrays",
    )


def _open_path(path: Path) -> list[Part]:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InvalidInputError("no such file or folder of samples", where=str(path)) from error
    if stat.S_ISDIR(mode):
        files = sorted(entry for entry in path.iterdir() if entry.suffix in (".npz", ".npy"))
        if not files:
            raise InvalidInputError("the folder holds no .npz or .npy file", where=str(path))
        return [_open_file(file) for file in files]
    return [_open_file(path)]


def _open_file(path: Path) -> Part:
    if not path.is_file():
        raise InvalidInputError("is not a regular file", where=str(path))
    if path.suffix == ".npz":
        return NpzPart(path)
    if path.suffix == ".npy":
        with _damage(str(path)):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        return ArrayPart({"0": array}, str(path), positional=True)
    raise InvalidInputError("samples are read from .npz and .npy files", where=str(path))


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or (hasattr(value, "detach") and hasattr(value, "numpy"))


def _batch(item: Any, where: str) -> Part:
    if isinstance(item, Mapping):
        return ArrayPart({str(name): _array(value, f"{where}: {name}") for name, value in item.items()}, where)
    values = list(item) if isinstance(item, tuple | list) else [item]
    arrays = {str(i): _array(value, f"{where}: {i}") for i, value in enumerate(values)}
    return ArrayPart(arrays, where, positional=True)


def _array(value: Any, where: str) -> np.ndarray:
    """A NumPy view of an array or a torch tensor (bfloat16, which NumPy has not, as float32)."""
    with _damage(where):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
            return value.numpy()
        return np.asarray(value)


def _check_columns(columns: Mapping[str, Column], where: str) -> None:
    if not columns:
        raise InvalidInputError("holds no array", where=where)
    for name, column in columns.items():
        label = f"{where}: {name}"
        if column.dtype.kind not in "biuf":
            raise InvalidInputError(f"holds {column.dtype}, not numbers", where=label, hint="pickles are not read")
        if not column.shape:
            raise InvalidInputError("a single number has no dimension of samples", where=label)
    counts = {name: column.shape[0] for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InvalidInputError(f"inputs differ in their number of samples ({listed})", where=where)


_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise InvalidInputError(f"unknown version {version} of the array format", where=where)
    shape, fortran, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise InvalidInputError("holds pickled objects", where=where, hint="pickles are not read")
    if any(dim < 0 for dim in shape):
        raise InvalidInputError("negative dimension", where=where)
    return shape, fortran, dtype
