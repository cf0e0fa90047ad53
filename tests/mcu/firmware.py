"""A small program of the tests: a matrix times a vector, then erf; with a place for a defect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import special

from lrcompile.backends.c.target import Memory, target_named
from lrcompile.backends.c.toolchain import Firmware, Port, Program, build, include_binary

ROWS, COLUMNS = 24, 10
SOURCE = """#include <math.h>
extern const unsigned char m_weights[];
static float m_arena[{rows}];
static float *const arena = m_arena;
void m_run(const float *x, float *y);
void m_run(const float *x, float *y)
{{
    const float *w = (const float *)(const void *)m_weights;
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


def program(folder: Path, defect: str = "") -> Program:
    """Sources in ``folder``; ``defect`` is a statement at the end of the function."""
    folder.mkdir(exist_ok=True)
    (folder / "m.bin").write_bytes(weights().tobytes())
    (folder / "w.S").write_text(include_binary("m_weights", "m.bin"))
    (folder / "m.c").write_text(SOURCE.format(rows=ROWS, columns=COLUMNS, defect=defect))
    ports = [Port("x", np.dtype(np.float32), (COLUMNS,)), Port("y", np.dtype(np.float32), (ROWS,))]
    return Program((folder / "m.c", folder / "w.S"), "m_run", (ports[0],), (ports[1],))


def firmware(folder: Path, defect: str = "", memory: Memory = MEMORY, target: str = "cortex-m7") -> Firmware:
    return build(program(folder, defect), target_named(target), memory, folder / "build")
