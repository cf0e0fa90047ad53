"""Microcontrollers: memory, flash, instructions and errors of firmware that was executed.

RAM and flash are read from the ELF file, instructions and the highest stack use come from the emulator, the error is
the largest absolute difference to ONNX Runtime on the same model file. One row is one firmware.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import onnx

from benchmarks.common import WORK, table, write
from benchmarks.mcu_graphs import OTHERS, graph
from benchmarks.mcu_planners import buffers, onnx2c
from lrcompile.errors import LrcompileError

HEAD = [
    *("graph", "arena allowed, B", "arena, B", "stack used, B", "inputs and outputs, B", "other static, B"),
    *("weights, B", "code, B", "instructions, M", "largest error", "onnx2c's unions, B", "arena / onnx2c", "seconds"),
]
STACK = 3072
TITLE = "Microcontrollers: executed firmware"
LIMITS = (("vit8", 10_880), ("vit32", 66_560), ("vit32", 41_600))


def inputs(model: onnx.ModelProto, seed: int = 9) -> dict[str, np.ndarray]:
    """Normal floats; token numbers below 1000; a mask whose last quarter is padding."""
    rng = np.random.default_rng(seed)
    made = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        whole = info.type.tensor_type.elem_type == onnx.TensorProto.INT64
        made[info.name] = rng.integers(0, 1000, shape) if whole else rng.standard_normal(shape).astype(np.float32)
        if info.name == "mask":
            made[info.name] = (np.arange(shape[-1]) < shape[-1] * 3 // 4).astype(np.int64).reshape(shape)
    return made


def row(name: str, arena: int | None) -> list[object]:
    """Deploys a graph under a limit, ``None``: 0.4 of what onnx2c takes; executes it once."""
    from lrcompile.backends.c.deploy import Board, check, compile_to, formulas, plan
    from lrcompile.backends.c.target import target_named

    start = time.monotonic()
    path = WORK / "mcu" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = graph(name)
    onnx.save(proto, path)
    unions = sum(onnx2c(buffers(proto)))
    allowed = int(0.4 * unions) if arena is None else arena
    sample = inputs(proto)
    model = formulas(path)
    io = sum(each.nbytes for each in sample.values()) + sum(4 * int(np.prod(model.shape(out))) for out in model.outputs)
    board = Board(target_named("cortex-m7"), ram=allowed + STACK + io, stack=STACK)
    folder = (WORK / "mcu" / "firmware").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        firmware = compile_to(folder, plan(model, board), board)
        found = check(firmware, Path(path), [sample])
    except LrcompileError as error:
        seconds = f"{time.monotonic() - start:.0f}"
        return [name, f"{allowed:,}", f"failed: {error.message}", *[""] * 7, f"{unions:,}", "", seconds]
    ram, flash = firmware.board.ram(), firmware.board.flash()
    sizes = [ram["arena"], found.stack, ram["io"], ram["static"], flash["weights"], flash["code"]]
    run = [f"{found.instructions / 1e6:.2f}", f"{found.max_error:.2g}"]
    share = f"{ram['arena'] / unions:.3f}"
    seconds = f"{time.monotonic() - start:.0f}"
    return [name, f"{allowed:,}", *(f"{each:,}" for each in sizes), *run, f"{unions:,}", share, seconds]


def main() -> None:
    """One row after the other; the file is written after each, so that an interrupted run leaves what it has."""
    from lrcompile.backends.c.toolchain import FLAGS, compiler_version

    text = (
        f"Toolchain: {compiler_version()} `{' '.join(FLAGS)}`, linked with ReleaseFast, for a Cortex-M7; executed by "
        f"unicorn. All weights and inputs are random, one sample each, {STACK} bytes of stack. The limits of the last "
        "five are 0.4 of the bytes that onnx2c's unions take for the same file (re-stated in `mcu_planners.py`)."
    )
    rows: list[list[object]] = []
    for name, arena in (*LIMITS, *((other, None) for other in OTHERS)):
        rows.append(row(name, arena))
        write("mcu", TITLE, [text, table(HEAD, rows)])
