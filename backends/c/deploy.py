"""From a model to a folder of firmware: formulas, schedule under the RAM limit, C, and the proof by execution."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.backends.c.artifacts import artifacts
from lrcompile.backends.c.target import Memory, Target
from lrcompile.dataflow.fuse import fuse, refine
from lrcompile.dataflow.program import Program
from lrcompile.dataflow.schedule import Schedule
from lrcompile.dataflow.options import Options
from lrcompile.dataflow.search import Search
from lrcompile.dataflow.stage import Formulas
from lrcompile.errors import MissingExtraError, UnsupportedError
from lrcompile.files import made_folder
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.formulas import build as formulas_of
from lrcompile.graphs.onnx.load import check_finite
from lrcompile.graphs.onnx.quantise import integer_model, is_quantised
from lrcompile.progress import Progress

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Proof:
    """What running the firmware in the emulator showed.

    Args:
        instructions: of one sample, the most.
        max_error: largest absolute difference to ONNX Runtime's outputs.
        scale: largest absolute value of those outputs.
        samples: how many were run.
        stack: most bytes of stack in use.
        functions: instructions by function, of the last sample.
        violations: accesses outside of the memory that the firmware has.
    """

    instructions: int
    max_error: float
    scale: float
    samples: int
    stack: int
    functions: Mapping[str, int]
    violations: tuple[str, ...]


@dataclass(frozen=True)
class Deployment:
    """A program that fits, with what is known about it.

    Args:
        ram, flash: bytes by kind, from the ELF file; None where no toolchain is installed.
        precision: ``float32`` or ``int8``.
    """

    schedule: Schedule
    program: Program
    ram: Mapping[str, int] | None
    flash: Mapping[str, int] | None
    proof: Proof | None
    precision: str
    files: tuple[str, ...]


def arrange(model: ir.Model, memory: Memory, shapes: Shapes | None = None) -> Schedule:
    """The schedule of least work under the RAM that inputs, outputs and stack leave.

    Raises:
        UnsupportedError: an operator without a formula, a dynamic shape, or it does not fit.
        InvalidInputError: a weight is NaN or infinite.
    """
    check_finite(model)
    if is_quantised(model):
        model = integer_model(model, shapes)
    formulas = refine(fuse(formulas_of(model, shapes)))
    _check_weights(formulas, memory)
    room = memory.ram - memory.stack - _io(formulas)
    pieces = max(memory.stack - RESERVE, 0)
    options, found = Options(formulas), None
    for limit in (room, room + pieces) if room > 0 else ():  # pieces on the stack are a reserve that is tried last
        found = Search(formulas, limit, options).run()
        found.stack = pieces
        if found.arena <= room:
            found.notes += _reasons(found)
            return found
    raise _does_not_fit(formulas, found, memory)


def _reasons(schedule: Schedule) -> list[str]:
    """Why the arena is not smaller, in a few words."""
    if not schedule.arena:
        return ["nothing needs the arena"]
    step, live = schedule.peak
    words = ", ".join(f"{name} ({size})" for name, size in live[:5])
    tight = "no placement of its buffers is smaller" if schedule.layout.optimal else "placed near its bound"
    where = [f"most is alive in {step}: {words}", tight]
    return [*where, "of the plans that fit, this one has the least estimated work; less --ram asks for a smaller one"]


RESERVE = 640
"""Bytes of the stack that are left for frames: the rest may hold pieces of nests."""


def _io(formulas: Formulas) -> int:
    from math import prod

    from lrcompile.dataflow.program import ITEMSIZE

    ports = [*formulas.inputs.values(), *((formulas.shape(name), formulas.dtype(name)) for name in formulas.outputs)]
    return sum(prod(shape) * ITEMSIZE[dtype] for shape, dtype in ports)


def _check_weights(formulas: Formulas, memory: Memory) -> None:
    size = sum(array.nbytes for array in {id(each): each for each in formulas.constants.values()}.values())
    room = memory.external or memory.flash
    if size > room:
        largest = max(formulas.constants, key=lambda name: formulas.constants[name].nbytes)
        raise UnsupportedError(
            f"the weights take {size} bytes, {size - room} more than the flash has",
            where=f"largest: {largest}, {formulas.constants[largest].nbytes} bytes",
            hint="compress it (`lrcompile optimize --keep`), quantise it (`--int8`), or give --external-flash",
        )


def _does_not_fit(formulas: Formulas, found: Schedule | None, memory: Memory) -> UnsupportedError:
    own = _io(formulas)
    if found is None:
        return UnsupportedError(
            f"inputs and outputs ({own} bytes) and the stack ({memory.stack}) leave nothing of {memory.ram} bytes of RAM",
            hint="a smaller input, a smaller --stack, or more --ram",
        )
    need = found.arena + memory.stack + own
    step, live = found.peak
    words = ", ".join(f"{name} {size}" for name, size in live[:4])
    return UnsupportedError(
        f"needs {need} bytes of RAM ({found.arena} arena, {memory.stack} stack, {own} inputs and outputs), "
        f"{need - memory.ram} more than there are",
        where=f"{step}: {words}",
        hint="quantise it (`--int8 --calib`: a quarter of the arena), compress it, or give more --ram",
    )


def deploy(
    model: ir.Model,
    target: Target,
    memory: Memory,
    out: Path,
    *,
    shapes: Shapes | None = None,
    samples: Iterable[Inputs] | None = None,
    limit: float | None = None,
    tell: Progress | None = None,
) -> Deployment:
    """Writes a folder of firmware; nothing is left there if anything fails.

    Args:
        samples: inputs to run in the emulator, compared with ONNX Runtime.
        limit: largest error allowed, absolute; None for the precision's own.

    Raises:
        UnsupportedError: it does not fit, or cannot be expressed.
        GateError: the run was wrong, or touched memory that it must not.
    """
    from lrcompile.backends.c.emit import emit

    tell = tell or Progress()
    tell("arranging the model in memory")
    schedule = arrange(model, memory, shapes)
    precision = "int8" if is_quantised(model) else "float32"
    tell("writing kernels")
    program = emit(schedule)
    with made_folder(out), tempfile.TemporaryDirectory(prefix=".lrcompile-", dir=out.parent) as scratch:
        work = Path(scratch) / "work"
        tell("compiling")
        firmware = _firmware(program, target, memory, work, needed=samples is not None)
        proof = None
        if samples is not None:
            tell("running in the emulator")
            proof = _prove(model, firmware, samples, limit, precision)
        made = Deployment(
            schedule,
            program,
            None if firmware is None else firmware.board.ram(),
            None if firmware is None else firmware.board.flash(),
            proof,
            precision,
            (),
        )
        names = _publish(made, target, memory, work, out, firmware is not None)
    return Deployment(**{**vars(made), "files": tuple(names)})


def _firmware(program: Program, target: Target, memory: Memory, work: Path, *, needed: bool) -> Any:
    from lrcompile.backends.c.toolchain import build

    try:
        return build(program, target, memory, work)
    except MissingExtraError:
        if needed:
            raise
        work.mkdir(parents=True, exist_ok=True)
        program.write(work)
        return None


def _publish(made: Deployment, target: Target, memory: Memory, work: Path, out: Path, linked: bool) -> list[str]:
    """Moves the finished files into the folder, all or none."""
    names = [*made.program.files, *(["firmware.elf"] if linked else [])]
    for name, content in artifacts(made, target, memory).items():
        (work / name).write_text(content, encoding="utf-8")
        names.append(name)
    moved: list[Path] = []
    try:
        for name in names:
            moved.append(out / name)
            shutil.copyfile(work / name, out / name)
    except BaseException:
        for path in moved:
            with suppress(OSError):
                path.unlink()
        raise
    return names


def _prove(model: ir.Model, firmware: Any, samples: Iterable[Inputs], limit: float | None, precision: str) -> Proof:
    from lrcompile.backends.c.emulator import Emulator
    from lrcompile.errors import GateError
    from lrcompile.graphs.onnx.session import Session

    session = Session(model.graph.clone(), model)
    machine, count, error, scale, most, stack = Emulator(firmware), 0, 0.0, 0.0, 0, 0
    violations: list[str] = []
    functions: Mapping[str, int] = {}
    for sample in samples:
        run, wanted = machine.run(sample), session.run(sample)
        for name, value in wanted.items():
            error = max(error, _difference(run.outputs[name], value))
            scale = max(scale, float(np.abs(np.asarray(value, np.float64)).max(initial=0)))
        count, most, stack = count + 1, max(most, run.instructions), max(stack, run.stack)
        violations += run.violations
        functions = run.functions
    proof = Proof(most, error, scale, count, stack, functions, tuple(violations))
    allowed = limit if limit is not None else {"float32": 1e-4, "int8": 0.1}[precision] * max(scale, 1.0)
    if violations:
        raise GateError(f"the firmware touched memory that it must not: {violations[0]}", hint="this is a bug")
    if not error <= allowed:
        raise GateError(f"the largest error is {error:.3g}, {allowed:.3g} is allowed", hint="give --max-error")
    return proof


def _difference(found: Any, wanted: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(a - b).max(initial=0))
