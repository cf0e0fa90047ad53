"""The same C on this machine: quick to build and to call, for tests that ask only for results."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lrcompile.backends.c.toolchain import zig
from lrcompile.dataflow.program import ENTRY, Port, Program
from lrcompile.errors import InvalidInputError, ResourceError

FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-ffp-contract=off")


def shared_library(sources: Sequence[Path], folder: Path, *, remove: bool = False) -> ctypes.CDLL:
    """Compiles C (and ``.S``) with ``$CC``, a compiler that is installed, or the one of the ``mcu`` extra.

    Args:
        folder: where the library is written.
        remove: delete the folder once the library is loaded.

    Raises:
        ResourceError: the compiler failed; the hint holds what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "model.so"
    paths = [f"-I{path}" for path in {source.parent: None for source in sources}]
    _compile([*FLAGS, *paths, *map(str, sources), "-lm", "-o", str(out)], folder)
    library = ctypes.CDLL(str(out))
    if remove:
        shutil.rmtree(folder, ignore_errors=True)
    return library


def _compile(arguments: list[str], folder: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        zig(["cc", *arguments], folder)
        return
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError("the C compiler failed", where=compiler, hint=done.stderr.strip()[-4000:])


def build(program: Program, folder: Path) -> ctypes.CDLL:
    """A program as a library on this machine; its files are written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    program.write(folder)
    return shared_library([folder / name for name in program.sources], folder)


def call(library: ctypes.CDLL, program: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calls the model's function; outputs by port name.

    Raises:
        InvalidInputError: an input has another shape or type than its port.
    """
    given = [checked(port, inputs) for port in program.inputs]
    outputs = {port.name: np.empty(port.shape, port.dtype) for port in program.outputs}
    function = getattr(library, ENTRY)
    function.restype = None
    function(*(ctypes.c_void_p(each.ctypes.data) for each in [*given, *outputs.values()]))
    return outputs


def checked(port: Port, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of an input in C order.

    Raises:
        InvalidInputError: it is missing, or has another shape or type than its port.
    """
    if port.name not in inputs:
        raise InvalidInputError("no value for this input", where=port.name, hint=f"given: {', '.join(inputs)}")
    value = np.asarray(inputs[port.name], order="C")
    if value.dtype != port.dtype or value.shape != port.shape:
        wanted = f"{port.dtype} {list(port.shape)}"
        raise InvalidInputError(f"wants {wanted}, not {value.dtype} {list(value.shape)}", where=port.name)
    return value
