"""ONNX's own test cases of single operators, computed by the emitted C on this machine."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table, write
from lrcompile.dataflow.program import Program

PER_FILE = 60


@dataclass(frozen=True)
class Case:
    """A model of one node with inputs and the outputs that the standard states."""

    name: str
    model: Any
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    rtol: float
    atol: float


def cases() -> Iterator[Case]:
    """All node cases of the installed onnx package whose inputs and outputs are tensors of numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind="node")
    for each in found:
        given, wanted = each.data_sets[0]
        if all(isinstance(value, np.ndarray) for value in (*given, *wanted)):
            graph = each.model.graph
            yield Case(
                each.name,
                each.model,
                {value.name: np.asarray(array) for value, array in zip(graph.input, given, strict=False)},
                {value.name: np.asarray(array) for value, array in zip(graph.output, wanted, strict=False)},
                each.rtol,
                each.atol,
            )


def program(case: Case) -> Program:
    """The emitted program of a case.

    Raises:
        UnsupportedError: an operator without a formula, named.
    """
    from lrcompile.backends.c.emit import emit
    from lrcompile.dataflow.fuse import fuse, refine
    from lrcompile.dataflow.schedule import plain
    from lrcompile.graphs.onnx.formulas import build
    from lrcompile.graphs.onnx.load import from_proto

    shapes = {name: array.shape for name, array in case.inputs.items()}
    return emit(plain(refine(fuse(build(from_proto(case.model), shapes)))))


def text(made: Program, prefix: str) -> str:
    """Header, source and weights of a program as one text, with names of its own."""
    header, source, weights = (made.files[name] for name in ("model.h", "model.c", "weights.bin"))
    assert isinstance(header, str) and isinstance(source, str) and isinstance(weights, bytes)
    numbers = ",".join(map(str, weights))
    body = source.replace('#include "model.h"', header)
    body = re.sub(r"extern const unsigned char model_weights\[\];", "", body)
    array = f"static const unsigned char model_weights[] __attribute__((aligned(16))) = {{{numbers}}};"
    lines = (array + body).replace("MODEL_H", f"{prefix}_H")
    lines = re.sub(r"^#define MODEL_\w+_(SIZE|BYTES).*$", "", lines, flags=re.M)
    return re.sub(r"\b(model|lrc)_", rf"{prefix}_\1_", lines)


def library(programs: Iterable[Program], folder: Path, compiler: list[str]) -> ctypes.CDLL:
    """All programs in one shared library; the entry of number n is ``c<n>_model_run``."""
    chunks: list[list[str]] = [[]]
    for at, made in enumerate(programs):
        if len(chunks[-1]) == PER_FILE:
            chunks.append([])
        chunks[-1].append(text(made, f"c{at}"))
    sources = []
    for at, chunk in enumerate(chunks):
        sources.append(folder / f"cases{at}.c")
        head = "#include <math.h>\n#include <stdbool.h>\n#include <stdint.h>\n"
        sources[-1].write_text(head + "\n".join(chunk), encoding="utf-8")
    flags = [
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-Wno-unused-const-variable",
    ]
    out = folder / "cases.so"
    subprocess.run([*compiler, *flags, *map(str, sources), "-lm", "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def run(found: ctypes.CDLL, at: int, made: Program, case: Case) -> str:
    """Runs one case; the empty string, or what is wrong."""
    given = [np.ascontiguousarray(case.inputs[port.name]).reshape(port.shape) for port in made.inputs]
    outputs = [np.zeros(port.shape, port.dtype) for port in made.outputs]
    function = getattr(found, f"c{at}_model_run")
    function.restype = None
    function(*(ctypes.c_void_p(each.ctypes.data) for each in (*given, *outputs)))
    for value, wanted in zip(outputs, case.outputs.values(), strict=True):
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            return f"{value.dtype}{value.shape}, not {wanted.dtype}{wanted.shape}"
        if not np.allclose(value, wanted, rtol=case.rtol, atol=max(case.atol, 1e-7), equal_nan=True):
            return "wrong values"
    return ""


def check(chosen: Iterable[Case], compiler: list[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """(passed, wrong with what, refused with the reason)."""
    from lrcompile.errors import LrcompileError

    passed: list[str] = []
    wrong: dict[str, str] = {}
    refused: dict[str, str] = {}
    made: list[tuple[Case, Program]] = []
    for case in chosen:
        try:
            made.append((case, program(case)))
        except LrcompileError as error:
            refused[case.name] = error.message
        except Exception as error:
            wrong[case.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = library([each for _, each in made], Path(folder), compiler)
        for at, (case, each) in enumerate(made):
            problem = run(found, at, each, case)
            if problem:
                wrong[case.name] = problem
            else:
                passed.append(case.name)
    return passed, wrong, refused


def compiler() -> list[str]:
    """The C compiler of this machine, or the one of the ``mcu`` extra."""
    import shutil

    found = shutil.which("cc")
    return [found] if found else [sys.executable, "-m", "ziglang", "cc"]


def main() -> None:
    """Writes the table."""
    passed, wrong, refused = check(cases(), compiler())
    counts = [["passed", len(passed)], ["wrong", len(wrong)], ["refused, operator named", len(refused)]]
    reasons = [[reason, count] for reason, count in Counter(refused.values()).most_common()]
    parts = ["Compared under the tolerance that each case states; compiled and run on this machine."]
    parts += [table(["", "cases"], counts), "## Wrong", table(["case", "what"], [list(item) for item in wrong.items()])]
    parts += ["## Refused", table(["reason", "cases"], reasons), "## Passed", ", ".join(f"`{each}`" for each in passed)]
    write("conformance", "ONNX node cases in emitted C", parts)
