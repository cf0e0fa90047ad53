"""A small program of the tests: a matrix times a vector, then erf; with a place for a defect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import special

from lrcompile.backends.c.target import Memory, target_named
from lrcompile.backends.c.toolchain import Firmware, build, include_binary
from lrcompile.dataflow.program import Kernel, Port, Program, Slot

ROWS, COLUMNS = 24, 10
SOURCE = """#include <math.h>
extern const unsigned char model_weights[];
static float model_arena[{rows}];
static float *const arena = model_arena;
void model_run(const float *x, float *y);
void model_run(const float *x, float *y)
{{
    const float *w = (const float *)(const void *)model_weights;
    int i, j;
    for (i = 0; i < {rows}; ++i) {{
        arena[i] = 0.0f;
        for (j = 0; j < {columns}; ++j) {{
            arena[i] += w[i * {columns} + j] * x[j];
        }}
    }}
    for (i = 0; i < {rows}; ++i) {{
        y[i] = erff(arena[i]);
    }}
    {defect}
}}
"""
MEMORY = Memory(ram=16384, flash=65536)


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def sample(seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(COLUMNS).astype(np.float32)}


def expected(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return special.erf(weights().astype(np.float64) @ inputs["x"])


def program(defect: str = "") -> Program:
    """``defect`` is a statement at the end of the function."""
    files = {
        "model.h": "void model_run(const float *x, float *y);\n",
        "model.c": SOURCE.format(rows=ROWS, columns=COLUMNS, defect=defect),
        "weights.S": include_binary("model_weights", "weights.bin"),
        "weights.bin": weights().tobytes(),
    }
    ports = [Port("x", "x", "float32", (COLUMNS,)), Port("y", "y", "float32", (ROWS,))]
    slot = Slot("product", 0, 4 * ROWS, 0, 0)
    kernel = Kernel("model_run", ("product", "erf"), "", ROWS * COLUMNS, 0, weights().nbytes)
    io = (ports[0],), (ports[1],)
    sources = ("model.c", "weights.S")
    return Program(files, sources, 4 * ROWS, *io, weights().nbytes, (slot,), (kernel,), 4 * ROWS)


def firmware(folder: Path, defect: str = "", memory: Memory = MEMORY, target: str = "cortex-m7") -> Firmware:
    return build(program(defect), target_named(target), memory, folder)
