"""Microcontrollers: memory, flash, instructions and errors of firmware that was executed, and planners compared.

RAM and flash are read from the ELF file, instructions and the highest stack use come from the emulator, the error is
the largest absolute difference to ONNX Runtime on the same model file (for int8: the Q/DQ model). One row is one
firmware.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.common import WORK, table, write
from benchmarks.mcu_graphs import OTHERS, path, samples
from benchmarks.mcu_references import onnx2c, requests, tensors, tflm
from lrcompile.errors import LrcompileError

STACK, FLASH, EXTERNAL = 2048, 1 << 20, 16 << 20
FIRMWARE = [
    *("firmware", "arena, B", "stack used, B", "inputs and outputs, B", "other static, B", "weights, B", "code, B"),
    *("instructions, M", "largest error", "largest output", "samples", "minutes"),
]


@dataclass(frozen=True)
class Case:
    """One firmware.

    Args:
        name: of the row.
        model: makes the model.
        inputs: what it is run on.
        arena: bytes that the arena may have.
        external: weights stand in external flash.
    """

    name: str
    model: Callable[[], ir.Model]
    inputs: Callable[[], Sequence[dict[str, np.ndarray]]]
    arena: int
    external: bool = False


def main() -> None:
    """Measures everything; the file is written after each row, so an interrupted run leaves what it has."""
    parts = [_planners()]
    write("mcu", TITLE, parts)
    rows: list[list[object]] = []
    for case in cases():
        rows.append(_row(case))
        write("mcu", TITLE, [*parts, *_text(rows)])
    write("mcu", TITLE, [*parts, *_text(rows), _accuracy()])


TITLE = "Microcontrollers: firmware and planners"


def _text(rows: Sequence[Sequence[object]]) -> list[str]:
    from lrcompile.backends.c.toolchain import FLAGS, compiler_version

    flags = f"{compiler_version()} `{' '.join(FLAGS)}`, linked with ReleaseFast; unicorn as a Cortex-M7."
    return [f"Toolchain: {flags} All weights and inputs are random (seed 0).", table(FIRMWARE, rows), _plans(rows)]


# -- firmware --------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """The rows, the quick ones first."""
    one = lambda name: lambda: samples(name, 1, seed=9)  # noqa: E731
    found = [
        Case("vit32 int8", lambda: quantised("vit32"), one("vit32"), 10_752),
        Case("vit32 fp32, arena at most 41,600 B", lambda: loaded("vit32"), one("vit32"), 41_600),
        Case("vit32 fp32, arena at most 66,560 B", lambda: loaded("vit32"), one("vit32"), 66_560),
        Case("vit32 keep 0.5, int8", lambda: quantised("vit32", 0.5), one("vit32"), 10_752),
    ]
    for name in OTHERS:
        limit = int(0.4 * onnx2c(tensors(onnx.load(path(name)))))
        found.append(Case(f"{name} fp32", lambda name=name: loaded(name), one(name), limit))
    found.append(Case("deit int8", lambda: quantised("deit"), one("deit"), 105 << 10, external=True))
    return found


@cache
def loaded(name: str) -> ir.Model:
    """A graph as it is."""
    from lrcompile.graphs.onnx.graph import OnnxGraph

    return OnnxGraph.load(path(name)).model


@cache
def quantised(name: str, keep: float | None = None) -> ir.Model:
    """A graph in int8, compressed before where ``keep`` is given; random weights have no low rank, so at any drift."""
    from lrcompile import Budget, Options, optimize
    from lrcompile.graphs.onnx.quantise import quantise

    model, given = loaded(name), samples(name, 2 if name == "deit" else 8)
    if keep is not None:
        batch = {key: np.concatenate([each[key] for each in given]) for key in given[0]}
        options = Options(max_drift=100.0, latency=False)
        model = optimize(path(name), Budget(keep=keep), calibration=batch, options=options).model
    return quantise(model, given)


def _row(case: Case) -> list[object]:
    start = time.monotonic()
    try:
        made = _deployed(case)
    except LrcompileError as error:
        return [case.name, f"failed: {error}", *[""] * (len(FIRMWARE) - 3), round((time.monotonic() - start) / 60, 1)]
    ram, flash, proof = made.ram, made.flash, made.proof
    sizes = [ram["arena"], proof.stack, ram["io"], ram["static"], flash["weights"], flash["code"]]
    minutes = round((time.monotonic() - start) / 60, 1)
    run = [f"{proof.instructions / 1e6:.2f}", f"{proof.max_error:.2g}", f"{proof.scale:.3g}", proof.samples, minutes]
    return [case.name, *(f"{each:,}" for each in sizes), *run]


def _deployed(case: Case) -> Any:
    from lrcompile.backends.c.deploy import deploy
    from lrcompile.backends.c.target import Memory, target_named

    inputs = case.inputs()
    model = case.model()
    external = EXTERNAL if case.external else 0
    memory = Memory(case.arena + STACK + _io(model, inputs[0]), FLASH, STACK, external)
    out = WORK / "mcu" / "firmware"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    return deploy(model, target_named("cortex-m7"), memory, Path(out).resolve(), samples=inputs, limit=np.inf)


def _io(model: ir.Model, inputs: dict[str, np.ndarray]) -> int:
    from lrcompile.graphs.onnx.session import Session

    outputs = Session(model.graph.clone(), model).run(inputs)
    return sum(each.nbytes for each in (*inputs.values(), *outputs.values()))


# -- planners --------------------------------------------------------------------------------------


def _plans(rows: Sequence[Sequence[object]]) -> str:
    """Arenas of the fp32 rows against what others' planning of the same graph takes."""
    head = [
        "graph",
        "onnx2c's unions, B",
        "TFLM's greedy, B",
        "largest live set, B",
        "ours, executed, B",
        "ours / onnx2c",
    ]
    lines = []
    for row in rows:
        name = str(row[0]).split()[0]
        if "fp32" in str(row[0]):
            found = tensors(onnx.load(path(name)))
            numbers = [onnx2c(found), tflm(requests(found)), _live(name)]
            ours = str(row[1]).replace(",", "")
            share = f"{int(ours) / numbers[0]:.2f}" if ours.isdigit() else ""
            lines.append([row[0], *(f"{each:,}" for each in numbers), row[1], share])
    return table(head, lines)


def _live(name: str) -> int:
    from lrcompile.dataflow.planner import bound

    return bound(requests(tensors(onnx.load(path(name)))))


def _planners() -> str:
    """Ours against greedy on the ``light`` graphs that the onnx package brings."""
    from lrcompile.dataflow.planner import bound, exact, greedy

    head = ["graph", "tensors", "TFLM's greedy, B", "ours, B", "largest live set, B", "ours / greedy", "seconds"]
    rows = []
    for file in sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx")):
        found = requests(tensors(onnx.load(file)))
        start = time.monotonic()
        ours = exact(found).size
        spent = time.monotonic() - start
        assert greedy(found).size == tflm(found)
        numbers = [f"{each:,}" for each in (tflm(found), ours, bound(found))]
        rows.append([file.stem, len(found), *numbers, f"{ours / tflm(found):.3f}", f"{spent:.2f}"])
    return "Offsets alone, in the files' own order of nodes:\n\n" + table(head, rows)


# -- accuracy --------------------------------------------------------------------------------------


def _accuracy() -> str:
    """The trained digits model in int8: every test digit executed on the emulated device."""
    from lrcompile.backends.c.deploy import arrange
    from lrcompile.backends.c.emit import emit
    from lrcompile.backends.c.emulator import Emulator
    from lrcompile.backends.c.target import Memory, target_named
    from lrcompile.backends.c.toolchain import build
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.quantise import quantise
    from lrcompile.graphs.onnx.session import Session
    from lrcompile.zoo import digits_vit

    images, labels = digits_vit.digits("test")
    whole = OnnxGraph.load(digits_vit.ONNX).model
    shapes = {"images": (1, 1, 8, 8)}
    rows = []
    for name, model in (("fp32", whole), ("int8", quantise(whole, digits_vit.calibration()))):
        wanted = Session(model.graph.clone(), model).run({"images": images})["logits"]
        memory = Memory(16 << 10, FLASH, STACK)
        firmware = build(emit(arrange(model, memory, shapes)), target_named("cortex-m7"), memory, WORK / "mcu" / name)
        machine = Emulator(firmware)
        runs = [machine.run({"images": each[None]}) for each in images]
        got = np.concatenate([run.outputs["logits"] for run in runs])
        ram = firmware.board.ram()
        counts = [int((each.argmax(-1) == labels).sum()) for each in (got, wanted)]
        most = max(run.instructions for run in runs)
        used = max(run.stack for run in runs)
        clean = sum(bool(run.violations) for run in runs)
        rows.append(
            [f"digits ViT {name}", f"{counts[0]} of {len(labels)}", f"{counts[1]} of {len(labels)}",
             int((got.argmax(-1) == wanted.argmax(-1)).sum()), ram["arena"], used, ram["io"], ram["total"],
             f"{most / 1e6:.2f}", clean]
        )  # fmt: skip
    head = ["firmware", "right on the device", "right in ONNX Runtime", "same answer", "arena, B", "stack used, B"]
    head += ["inputs and outputs, B", "RAM with the reserved stack, B", "instructions, M", "runs with violations"]
    return table(head, rows)
