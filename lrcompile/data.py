"""Samples for calibration and evaluation: read lazily, checked against a model's inputs, split, cut into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lrcompile.data_sources import Chunk, Part, open_source
from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError, nearest


@dataclass(frozen=True)
class InputSpec:
    """What a model expects of one input.

    Args:
        name: of the graph input.
        dtype: None accepts any.
        shape: an int is a fixed dimension, a name or None a free one; the first counts samples. An empty
            shape means unknown and accepts any.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", np.dtype(self.dtype))


class Batches:
    """Samples as often as they are wanted, as dicts of arrays of at most ``batch`` rows; a view, not a copy.

    ``source`` is one of

    * an ``.npz`` file keyed by graph input name (leading dimension = samples), or an ``.npy`` file for a model
      of one input, or a folder of them (sorted by name);
    * one mapping, array or torch tensor of samples;
    * an iterable of batches: mappings, arrays, torch tensors, or tuples in the order of the inputs. It is gone
      through once, and its batches are kept by reference;
    * an ONNX Runtime ``CalibrationDataReader`` (``get_next``).

    Files are read in pieces whenever the view is iterated. Batches of several parts are joined where their
    shapes allow it; a part of another sequence length starts a new batch.

    Attributes:
        notes: what the user should be told, such as dropped samples.

    Raises:
        InvalidInputError: unreadable data, pickles, no numbers, different sample counts, zero samples.
    """

    def __init__(self, source: Any, *, batch: int = 8) -> None:
        if batch < 1:
            raise UsageError(f"a batch of {batch} samples", hint="at least 1")
        self._start(open_source(source), batch, 0, None, (), False)
        if not self.samples:
            raise InvalidInputError("there are zero samples", where=str(source) if isinstance(source, str) else "")

    def _start(
        self, parts: list[Part], batch: int, start: int, stop: int | None, specs: Sequence[InputSpec], exact: bool
    ) -> None:
        self._parts, self.batch, self._specs, self._exact = parts, batch, tuple(specs), exact
        self._sizes = [next(iter(part.columns.values())).shape[0] for part in parts]
        self._first, self._last = start, sum(self._sizes) if stop is None else stop
        self.notes: list[str] = []

    @property
    def samples(self) -> int:
        """Number of samples that an iteration yields."""
        return self._last - self._first

    @property
    def names(self) -> list[str]:
        """Names of the inputs that the samples come with; empty where they have none."""
        return sorted({str(name) for part in self._parts for name in part.columns})

    @cached_property
    def sha256(self) -> str:
        """A digest of names, types, shapes and values; the same however the data is packed or batched."""
        hashes: dict[str, Any] = {}
        shapes: dict[str, tuple] = {}
        for chunk in self._raw(None, 64):
            for name, array in chunk.items():
                digest = hashes.setdefault(name, hashlib.sha256())
                form = (array.dtype.newbyteorder("<").str, array.shape[1:])
                if shapes.get(name) != form:
                    shapes[name] = form
                    digest.update(repr(form).encode())
                digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        whole = hashlib.sha256(repr(self.samples).encode())
        for name in sorted(hashes):
            whole.update(f"{len(name)} {name} {hashes[name].hexdigest()}".encode())
        return whole.hexdigest()

    def __iter__(self) -> Iterator[Chunk]:
        """Yields dicts of arrays; after :meth:`check` with the model's names, types and fixed batch."""
        names = [spec.name for spec in self._specs] or None
        dtypes = {spec.name: spec.dtype for spec in self._specs if spec.dtype is not None}
        cast = (_cast(chunk, dtypes) for chunk in self._raw(names, self.batch))
        yield from _rebatch(cast, self.batch, self._exact)

    def split(self, fraction: float = 0.2, at_least: int = 1) -> tuple[Batches, Batches]:
        """(calibration, evaluation): the last ``fraction`` of the samples, rounded down, is held out.

        Raises:
            UsageError: too few samples (or whole batches, for a model of fixed batch) for both.
        """
        if not 0 < fraction < 1:
            raise UsageError(f"cannot hold out {fraction} of the samples", hint="a number between 0 and 1")
        unit = self.batch if self._exact else 1
        units = self.samples // unit
        held = max(-(-at_least // unit), int(units * fraction + 1e-9), 1)
        if units <= held:
            raise UsageError(
                f"{self.samples} samples are too few to calibrate and to hold out {held * unit}",
                hint="give more samples, or separate ones with --evaluation",
            )
        middle = self._last - held * unit
        return self._view(self._first, middle), self._view(middle, self._last)

    def cut(self, batch: int) -> Batches:
        """The same samples in batches of at most ``batch``, where the model's batch is not fixed."""
        view = self._view(self._first, self._last)
        view.batch = view.batch if self._exact else min(view.batch, max(batch, 1))
        return view

    def check(self, specs: Sequence[InputSpec]) -> Batches:
        """Binds the samples to a model's inputs, and goes through all of them once; returns itself.

        Types: integers are widened where nothing is lost, floats of any width converted to each other
        (values must stay finite); everything else is refused. A fixed leading dimension fixes the batch, and a
        remainder is dropped with a note. Arrays without names take those of the inputs, in order.

        Raises:
            InvalidInputError: wrong names, rank, dimensions or type, NaN or infinity, fewer samples than one batch.
            UnsupportedError: the inputs have different fixed leading dimensions.
        """
        for part in self._parts:
            if not part.positional:
                _check_names(part, specs)
            elif len(part.columns) != len(specs):
                names = ", ".join(spec.name for spec in specs)
                raise InvalidInputError(
                    f"{len(part.columns)} unnamed array(s) for {len(specs)} inputs",
                    where=part.where,
                    hint=f"give a .npz file or dicts with the names {names}",
                )
            for index, spec in enumerate(specs):
                _check_column(part, str(index) if part.positional else spec.name, spec)
        self._fix_batch(specs)
        self._specs = tuple(specs)
        self._check_values()
        return self

    def _fix_batch(self, specs: Sequence[InputSpec]) -> None:
        fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
        if len(fixed) > 1:
            raise UnsupportedError(f"inputs have different fixed leading dimensions: {sorted(map(str, fixed))}")
        if not fixed:
            return
        size = max(int(fixed.pop() or 1), 1)
        usable = self.samples // size * size
        if not usable:
            raise InvalidInputError(f"the model's batch is fixed at {size}, there are {self.samples} samples")
        if usable < self.samples:
            self.notes.append(
                f"dropped {self.samples - usable} of {self.samples} samples: the model's batch is fixed at {size}"
            )
        self.batch, self._exact, self._last = size, True, self._first + usable
        self.__dict__.pop("sha256", None)

    def _check_values(self) -> None:
        row = self._first
        for chunk in self:
            for name, array in chunk.items():
                if array.dtype.kind in "iub":
                    continue
                finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
                if not finite.all():
                    sample = row + int(np.flatnonzero(~finite)[0])
                    raise InvalidInputError(
                        f"sample {sample} holds NaN or infinity, or leaves the range of {array.dtype}", where=name
                    )
            row += len(next(iter(chunk.values())))

    def _view(self, start: int, stop: int) -> Batches:
        view = Batches.__new__(Batches)
        view._start(self._parts, self.batch, start, stop, self._specs, self._exact)
        view.notes = list(self.notes)
        return view

    def _raw(self, names: Sequence[str] | None, size: int) -> Iterator[Chunk]:
        """Chunks of the view's rows, part by part, under the names of the inputs where they are known."""
        offset = 0
        for part, rows in zip(self._parts, self._sizes, strict=True):
            start, stop = max(self._first - offset, 0), min(self._last - offset, rows)
            offset += rows
            if start >= stop:
                continue
            keys = list(part.columns) if names is None or part.positional else list(names)
            labels = list(names) if names is not None else keys
            for chunk in part.chunks(keys, start, stop, size):
                yield {label: chunk[key] for label, key in zip(labels, keys, strict=True)}


def _cast(chunk: Chunk, dtypes: dict[str, np.dtype]) -> Chunk:
    with np.errstate(over="ignore"):  # what overflows is found, and named, by the check for infinity
        return {name: array.astype(dtypes.get(name, array.dtype), copy=False) for name, array in chunk.items()}


def _rebatch(chunks: Iterator[Chunk], size: int, exact: bool) -> Iterator[Chunk]:
    """Joins and cuts chunks to ``size`` rows; other row shapes start anew, and the last may be smaller."""
    held: list[Chunk] = []
    rows = 0
    for chunk in chunks:
        if held and _forms(held[0]) != _forms(chunk):
            if exact:
                reason = f"the model's batch is fixed at {size}, but samples of one shape end after {rows}"
                raise InvalidInputError(reason, hint="pad all samples to one shape")
            yield _join(held)
            held, rows = [], 0
        begin, count = 0, _rows(chunk)
        while begin < count:
            end = min(count, begin + size - rows)
            held.append({name: array[begin:end] for name, array in chunk.items()})
            rows += end - begin
            begin = end
            if rows == size:
                yield _join(held)
                held, rows = [], 0
    if held:
        yield _join(held)


def _rows(chunk: Chunk) -> int:
    return len(next(iter(chunk.values())))


def _forms(chunk: Chunk) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape[1:]) for name, array in chunk.items()]


def _join(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _check_names(part: Part, specs: Sequence[InputSpec]) -> None:
    known = [spec.name for spec in specs]
    for name in part.columns:
        if name not in known:
            raise InvalidInputError(f"'{name}' is no input of the model", where=part.where, hint=nearest(name, known))
    missing = [name for name in known if name not in part.columns]
    if missing:
        raise InvalidInputError(f"lacks the input(s) {', '.join(missing)}", where=part.where)


def _check_column(part: Part, key: str, spec: InputSpec) -> None:
    column, where = part.columns[key], f"{part.where}: {spec.name}"
    if spec.dtype is not None and not castable(column.dtype, spec.dtype):
        hint = f"convert the samples: array.astype('{spec.dtype}')"
        raise InvalidInputError(f"holds {column.dtype}, the model takes {spec.dtype}", where=where, hint=hint)
    if not spec.shape:
        return
    wanted = ", ".join("?" if dim in (None, "") else str(dim) for dim in spec.shape)
    if len(column.shape) != len(spec.shape):
        hint = "the first dimension counts samples" if len(column.shape) == len(spec.shape) - 1 else ""
        raise InvalidInputError(f"has shape {column.shape}, the model takes ({wanted})", where=where, hint=hint)
    for have, want in zip(column.shape[1:], spec.shape[1:], strict=True):
        if isinstance(want, int) and have != want:
            raise InvalidInputError(f"has shape {column.shape}, the model takes ({wanted})", where=where)


def castable(have: np.dtype, want: np.dtype) -> bool:
    """Whether samples of one type are accepted for an input of another, see :meth:`Batches.check`."""
    if have == want:
        return True
    if have.kind == "f":
        return want.kind == "f" or want.name == "bfloat16"
    return have.kind in "iu" and want.kind in "iu" and np.can_cast(have, want, "safe")
