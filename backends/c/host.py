"""The same C on this machine: quick to build and to call, for tests that ask only for results."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lrcompile.backends.c.toolchain import Program, zig
from lrcompile.errors import ResourceError, UnsupportedError

FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared", "-ffp-contract=off")


def shared_library(
    sources: Sequence[Path], folder: Path, *, include: Sequence[Path] = (), remove: bool = False
) -> ctypes.CDLL:
    """Compiles C (and ``.S``) with ``$CC``, a compiler that is installed, or the one of the ``mcu`` extra.

    Args:
        folder: where the library is written.
        remove: delete the folder once the library is loaded.

    Raises:
        ResourceError: the compiler failed; the hint holds what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "model.so"
    paths = [f"-I{path}" for path in [*include, *{source.parent: None for source in sources}]]
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


def call(library: ctypes.CDLL, program: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calls the model's function; outputs by port name.

    Raises:
        UnsupportedError: an input has another shape or type than its port.
    """
    given = []
    for port in program.inputs:
        value = np.ascontiguousarray(inputs[port.name])
        if value.dtype != port.dtype or value.shape != port.shape:
            raise UnsupportedError(f"wants {np.dtype(port.dtype)} {list(port.shape)}", where=port.name)
        given.append(value)
    outputs = {port.name: np.empty(port.shape, port.dtype) for port in program.outputs}
    function = getattr(library, program.entry)
    function.restype = None
    function(*(ctypes.c_void_p(each.ctypes.data) for each in [*given, *outputs.values()]))
    return outputs
