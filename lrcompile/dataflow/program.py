"""An emitted program, as plain values: what a toolchain compiles and what an emulator needs to know to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

ENTRY = "model_run"
ARENA = "model_arena"
WEIGHTS = "model_weights"

ITEMSIZE = {
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bool": 1,
}
"""Bytes of one element of every type that a buffer can have, by numpy's name."""


@dataclass(frozen=True)
class Port:
    """An input or output of the model, in the order of the parameters of the entry function.

    Args:
        name: as in the model.
        symbol: the C identifier of the parameter.
        dtype: numpy's name of the element type.
        shape: static; a scalar has ``()``. Elements lie in C order without gaps.
    """

    name: str
    symbol: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Slot:
    """A buffer in the arena.

    Args:
        name: the value that lies there.
        offset, nbytes: where, in bytes from the start of the arena.
        first, last: indices of the first and the last kernel during which it must keep its contents.
    """

    name: str
    offset: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Kernel:
    """One C function of the program, run once, in order.

    Args:
        symbol: its C name; a non-static function, so that it can be found in the ELF file.
        nodes: the model's nodes that it computes (wholly or in part).
        loops: what is iterated in pieces, for people: ``"heads by 1, rows by 5"``.
        macs: multiply–accumulates, recomputation included.
        stack: bytes of its local arrays (its frame is larger).
        weights: bytes of the constants that it reads.
    """

    symbol: str
    nodes: tuple[str, ...]
    loops: str
    macs: int
    stack: int
    weights: int


@dataclass(frozen=True)
class Program:
    """C99 sources of one model with what is known about them.

    ``void model_run(const T *input…, T *output…)`` (parameters: all inputs, then all outputs, in the model's order) is
    the only function to call. It uses ``unsigned char model_arena[]`` (``arena`` bytes, 16-byte aligned, no other
    static memory) and reads ``const unsigned char model_weights[]`` (16-byte aligned, in flash).

    Args:
        files: name → content of every file: ``model.h``, ``model.c``, ``weights.S`` (includes ``weights.bin``).
        sources: those of them to compile and link, ``.c`` and ``.S``.
        arena: bytes.
        inputs, outputs: not in the arena; the caller owns them.
        weights: bytes of ``weights.bin``.
        slots: the plan of the arena.
        kernels: in the order of execution.
        bound: bytes that this order of kernels needs at least, whatever the offsets.
        notes: for people: why the plan is as it is.
    """

    files: Mapping[str, str | bytes]
    sources: tuple[str, ...]
    arena: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: int
    slots: tuple[Slot, ...]
    kernels: tuple[Kernel, ...]
    bound: int
    notes: tuple[str, ...] = field(default=())

    @property
    def io(self) -> int:
        """Bytes of all inputs and outputs."""
        return sum(port.nbytes for port in (*self.inputs, *self.outputs))

    def write(self, folder: Path) -> list[Path]:
        """Writes all files into an existing folder and returns their paths."""
        paths = []
        for name, content in self.files.items():
            path = folder / name
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            paths.append(path)
        return paths
