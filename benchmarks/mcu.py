"""Microcontrollers: memory, flash, instructions and errors of firmware that was executed.

Every row is one ``lrcompile deploy … --run``. RAM and flash are read from the ELF file, instructions and the highest
stack use come from the emulator, the error is the largest absolute difference to ONNX Runtime on the same model file
(for int8: the file with Q/DQ pairs).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from benchmarks.common import WORK, table, write
from benchmarks.mcu_digits import accuracy
from benchmarks.mcu_graphs import OTHERS, graph
from benchmarks.mcu_planners import buffers, onnx2c

HEAD = [
    *("model", "options", "arena allowed, B", "arena, B", "stack used, B", "inputs and outputs, B", "other static, B"),
    *("weights, B", "code, B", "instructions, M", "largest error", "relative L2"),
    *("onnx2c's unions, B", "arena / onnx2c", "seconds"),
]
STACK, ALIGN = 3072, 16
TITLE = "Microcontrollers: executed firmware"
FOLDER = WORK / "mcu"
ANY_DRIFT = ("--max-drift", "100")  # random weights have no low rank
INT8, KEPT = ("--int8",), ("--keep", "0.5", "--int8", *ANY_DRIFT)


@dataclass(frozen=True)
class Case:
    """One firmware.

    Args:
        arena: bytes that the arena may have; None: 0.4 of what onnx2c takes.
        calibration: samples.
    """

    model: str
    arena: int | None
    options: tuple[str, ...] = ()
    calibration: int = 16


PAIR, FEW = 11_264, 2
CASES = (
    Case("vit8", 10_880),
    Case("vit32", 66_560),
    Case("vit32", 41_600),
    Case("vit32", 10_752, INT8),
    Case("vit32", PAIR, INT8),
    Case("vit32", PAIR, KEPT),
    *(Case(name, None) for name in OTHERS),
    Case("deit", 107_520, (*INT8, "--external", "16MB"), FEW),
)


def inputs(model: onnx.ModelProto, count: int = 1, seed: int = 9) -> dict[str, np.ndarray]:
    """Normal floats; token numbers below 1000; a mask whose last quarter is padding."""
    rng = np.random.default_rng(seed)
    made = {}
    for info in model.graph.input:
        shape = [count, *(dim.dim_value for dim in info.type.tensor_type.shape.dim[1:])]
        whole = info.type.tensor_type.elem_type == onnx.TensorProto.INT64
        made[info.name] = rng.integers(0, 1000, shape) if whole else rng.standard_normal(shape).astype(np.float32)
        if info.name == "mask":
            row = (np.arange(shape[-1]) < shape[-1] * 3 // 4).astype(np.int64)
            made[info.name] = np.broadcast_to(row, shape).copy()
    return made


def deployed(case: Case) -> tuple[dict[str, Any], int, int]:
    """(the JSON object of the command, bytes that the arena may have, bytes of onnx2c's unions)."""
    from lrcompile.cli.app import run

    FOLDER.mkdir(parents=True, exist_ok=True)
    path, proto = FOLDER / f"{case.model}.onnx", graph(case.model)
    onnx.save(proto, path)
    unions = sum(onnx2c(buffers(proto)))
    allowed = int(0.4 * unions) if case.arena is None else case.arena
    np.savez(FOLDER / "run.npz", allow_pickle=False, **inputs(proto))
    np.savez(FOLDER / "calib.npz", allow_pickle=False, **inputs(proto, case.calibration, seed=3))
    calibration = ("--calib", str(FOLDER / "calib.npz")) if case.options else ()
    ram = allowed + STACK + _ports(proto)
    shutil.rmtree(FOLDER / "firmware", ignore_errors=True)
    words = ["deploy", str(path), "--to", "c", "-o", str(FOLDER / "firmware"), "--ram", str(ram), "--stack", str(STACK)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run([*words, *case.options, *calibration, "--run", str(FOLDER / "run.npz"), "--json", "--quiet"])
    return json.loads(out.getvalue()), allowed, unions


def _ports(proto: onnx.ModelProto) -> int:
    """Bytes of inputs and outputs, each as the linker aligns it."""
    sizes = []
    for info in (*proto.graph.input, *proto.graph.output):
        wide = 8 if info.type.tensor_type.elem_type == onnx.TensorProto.INT64 else 4
        sizes.append(wide * int(np.prod([dim.dim_value for dim in info.type.tensor_type.shape.dim])))
    return sum(-(-size // ALIGN) * ALIGN for size in sizes)


def row(case: Case) -> tuple[list[object], dict[str, Any]]:
    """A line of the table, and what it is made of."""
    start = time.monotonic()
    found, allowed, unions = deployed(case)
    seconds = f"{time.monotonic() - start:.0f}"
    options = " ".join(case.options) or "float32"
    if found["status"] != "ok":
        failed = f"failed: {found['error']['message']}"
        return [case.model, options, f"{allowed:,}", failed, *[""] * 8, f"{unions:,}", "", seconds], found
    ram, flash = found["ram"], found["flash"]
    sizes = [ram["arena"], found["stack_used"], ram["io"], ram["static"], flash["weights"], flash["code"]]
    run = [f"{found['instructions'] / 1e6:.2f}", f"{found['max_error']:.2g}", f"{found['relative_l2']:.2g}"]
    share = f"{ram['arena'] / unions:.3f}"
    cells: list[object] = [
        case.model,
        options,
        f"{allowed:,}",
        *(f"{each:,}" for each in sizes),
        *run,
        f"{unions:,}",
        share,
        seconds,
    ]
    return cells, found


def compared(dense: dict[str, Any], kept: dict[str, Any]) -> str:
    """What compression saves of the firmware of a model that is in int8 anyway."""
    rows = []
    for name, pick in (
        ("flash", lambda each: each["flash"]["total"]),
        ("weights", lambda each: each["flash"]["weights"]),
        ("code", lambda each: each["flash"]["code"]),
        ("instructions", lambda each: each["instructions"]),
    ):
        rows.append([name, f"{pick(dense):,}", f"{pick(kept):,}", f"{pick(kept) / pick(dense):.3f}"])
    return table(["vit32, arena at most 11 KB", "int8", "keep 0.5, int8", "ratio"], rows)


def main() -> None:
    """One row after the other; the file is written after each, so that an interrupted run leaves what it has."""
    from lrcompile.backends.c.toolchain import FLAGS, compiler_version

    text = (
        f"Toolchain: {compiler_version()} `{' '.join(FLAGS)}`, linked with ReleaseFast, for a Cortex-M7; executed by "
        f"unicorn. All weights and inputs are random, one sample each; {STACK} bytes of stack are reserved, in which "
        "pieces of kernels lie, too. `--ram` is the allowed arena, the stack, inputs and outputs together. onnx2c's "
        "unions are of the float32 file (re-stated in `mcu_planners.py`); five graphs may take 0.4 of them. With "
        "`--external` the weights stand in flash outside the chip. Times are of a machine that did other work."
    )
    rows: list[list[object]] = []
    pair: list[dict[str, Any]] = []
    more: list[str] = []
    for case in CASES:
        if case.calibration == FEW:  # the slowest comes last
            more.append(accuracy())
        cells, found = row(case)
        rows.append(cells)
        pair += [found] if case.arena == PAIR else []
        if len(pair) == 2 and all(each["status"] == "ok" for each in pair):
            more.append(compared(*pair))
            pair.clear()
        write("mcu", TITLE, [text, table(HEAD, rows), *more])
