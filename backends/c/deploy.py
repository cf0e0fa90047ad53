"""From an ONNX file to a folder of firmware that fits a board, and its run in the emulator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.backends.c.emit import ALIGN, emit
from lrcompile.backends.c.target import LEAST_STACK, Memory, Target
from lrcompile.backends.c.toolchain import Firmware, build, compiler_version
from lrcompile.dataflow.fuse import fuse
from lrcompile.dataflow.options import Options
from lrcompile.dataflow.program import Program
from lrcompile.dataflow.refine import refine
from lrcompile.dataflow.schedule import Schedule, Step
from lrcompile.dataflow.search import Search, schedule
from lrcompile.dataflow.stage import Formulas
from lrcompile.errors import GateError, InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.formulas import build as formulas_of
from lrcompile.graphs.onnx.load import read
from lrcompile.graphs.onnx.quantise import integer_model, is_quantised

FRAMES = 1024
"""Bytes of stack for the frames of kernels and of the mathematics they call; pieces on the stack come on top."""
PIECES = (2048, 1024, 512, 0)  # bytes of small pieces on the stack, the arena being the slower to address
TRIES = 6  # searches, each under a limit that is smaller by half of what the one before was too large
UNLIMITED = 2**27  # bytes of a memory that nobody limited
TOLERANCE = 1e-3
"""Relative L2 distance to ONNX Runtime above which an output of a sample counts as wrong."""
SMALL = 1e-5  # an absolute error that is none, whatever an output's magnitude
TOLERANCE_CODES = 0.05
"""The same for a quantised model, over all samples together. Every unit is within one code of ONNX Runtime's and
nearly all codes are equal, but one that is not may turn others after it: of 359 digits 316 are equal to the bit,
the farthest is 0.04 away; 12 blocks of DeiT-tiny are 0.03 away."""


@dataclass(frozen=True)
class Board:
    """What the firmware must fit.

    Args:
        ram, flash, external: bytes, or None where there is no limit; ``external`` flash holds the weights.
        stack: bytes of stack; None reserves what the kernels need.
    """

    target: Target
    ram: int | None = None
    flash: int | None = None
    external: int | None = None
    stack: int | None = None


@dataclass
class Check:
    """What the emulator and ONNX Runtime say about a number of samples.

    Args:
        instructions: of the costliest sample.
        max_error: largest absolute difference of an element of an output.
        distance: relative L2 distance of the worst output to ONNX Runtime's, over all samples together.
        stack: most bytes of stack that were in use.
    """

    samples: int = 0
    instructions: int = 0
    max_error: float = 0.0
    distance: float = 0.0
    stack: int = 0
    violations: list[str] = field(default_factory=list)
    functions: dict[str, int] = field(default_factory=dict)


def formulas(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Formulas:
    """The model's stages after exact fusion.

    Args:
        shapes: static shapes of inputs that the file leaves open.

    Raises:
        InvalidInputError: unreadable or unsound model, weights that are no numbers.
        UnsupportedError: an operator without a formula (named, with its node), or a dynamic shape.
    """
    model = read(path)
    built = formulas_of(integer_model(model, shapes) if is_quantised(model) else model, shapes)
    for name, array in built.constants.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InvalidInputError("the weight holds NaN", where=name, hint="train or export the model again")
    return refine(fuse(built))


def plan(model: Formulas, board: Board) -> Schedule:
    """The schedule of least work that leaves room for stack, inputs and outputs.

    Raises:
        UnsupportedError: none of those found fits; says by how much, and at which node.
    """
    if board.ram is None:
        return schedule(model)
    room = board.ram - _io(model)
    least = FRAMES if board.stack is None else max(board.stack, LEAST_STACK)
    if room < least:
        raise UnsupportedError(
            f"{board.ram} bytes of RAM leave {max(room, 0)} for stack and arena beside {_io(model)} bytes of inputs "
            f"and outputs; the stack alone needs {least}",
            where="--ram",
            hint=f"give at least {_io(model) + least} bytes, or a model with smaller inputs",
        )
    sizes = [size for size in PIECES if board.stack is None or size + FRAMES <= board.stack] or [0]
    limit, options, found = max(room - least, 0), Options(model), []
    spare = 0 if board.stack is None else sizes[0]  # pieces may lie in a stack that is reserved anyway
    for tried in range(TRIES if spare else 1):
        found.append(_placed(model, Search(model, limit + spare, options).run().steps, sizes, board, room))
        over = found[-1].arena + _stack(found[-1], board) - room
        if over <= 0 or spare == 0:
            break
        spare = 0 if tried == TRIES - 2 else max(spare - over // 2, 0)
    best = min(found, key=lambda each: (max(each.arena + _stack(each, board) - room, 0), each.work))
    total = best.arena + _stack(best, board)
    if total > room:
        raise UnsupportedError(
            f"needs {total + _io(model)} bytes of RAM, {total - room} more than there are: {_busiest(best)}",
            where="--ram",
            hint="give more RAM, quantise the model, or lower its rank, its tokens or its width",
        )
    return best


def _placed(model: Formulas, steps: Sequence[Step], sizes: Sequence[int], board: Board, room: int) -> Schedule:
    """With as many pieces on the stack as fit, since the arena is slower to address."""
    choices = [Schedule(model, steps, stack=size) for size in sizes]
    fits = (each for each in choices if each.arena + _stack(each, board) <= room)
    return next(fits, None) or min(choices, key=lambda each: each.arena + _stack(each, board))


def _io(model: Formulas) -> int:
    """Bytes of inputs and outputs, each up to the next boundary that the linker takes."""
    ports = [*model.inputs.values(), *((model.shape(name), model.dtype(name)) for name in model.outputs)]
    return sum(-(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGN) * ALIGN for shape, dtype in ports)


def _stack(found: Schedule, board: Board) -> int:
    return board.stack if board.stack is not None else -(-(found.scratch + FRAMES) // 8) * 8


def _busiest(found: Schedule) -> str:
    """The step that needs the most memory, with what is alive there."""
    most, time = max(
        ((sum(each.size for each in found.requests.values() if each.first <= at <= each.last), at))
        for at in range(len(found.nests))
    )
    alive = [f"{name} {each.size}" for name, each in found.requests.items() if each.first <= time <= each.last]
    nodes = found.nests[time].root.part.nodes
    return f"node {nodes[-1] if nodes else found.nests[time].root.name} has {most} bytes alive ({', '.join(alive)})"


def compile_to(folder: Path, found: Schedule, board: Board) -> Firmware:
    """Emits, compiles and links in a folder.

    Raises:
        UnsupportedError: it does not fit RAM or flash; the message says by how many bytes.
        MissingExtraError: the compiler is not installed.
    """
    memory = Memory(
        ram=board.ram or UNLIMITED,
        flash=board.flash or UNLIMITED,
        stack=_stack(found, board),
        external=board.external or 0,
    )
    program = emit(found)
    _check_weights(program, memory)
    return build(program, board.target, memory, folder)


def _check_weights(program: Program, memory: Memory) -> None:
    room = memory.external or memory.flash
    if program.weights > room:
        largest = max(program.kernels, key=lambda kernel: kernel.weights)
        raise UnsupportedError(
            f"the weights take {program.weights} bytes, {program.weights - room} more than the flash has; "
            f"{largest.weights} of them are of node {largest.nodes[-1]}",
            where="--external" if memory.external else "--flash",
            hint="quantise them (--int8), lower their rank (--keep), or give flash outside the chip (--external)",
        )


def check(firmware: Firmware, model: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> Check:
    """Runs every sample in the emulator and in ONNX Runtime.

    Args:
        batches: inputs of the model's own, fixed shapes.

    Raises:
        GateError: the firmware leaves its memory, or its results are not those of ONNX Runtime.
    """
    import onnxruntime as ort

    from lrcompile.backends.c.emulator import GARBAGE, Emulator

    options = ort.SessionOptions()
    options.log_severity_level = 3
    coded = quantised(model)
    if coded:  # kernels that ONNX Runtime fuses round differently from what the nodes say
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    emulator, found = Emulator(firmware), Check()
    names = [port.name for port in firmware.program.outputs]
    squares: dict[str, np.ndarray] = {}
    for inputs in batches:
        run = emulator.run(inputs)
        if not found.samples and not run.violations:
            again = emulator.run(inputs, garbage=GARBAGE[1])
            if any(not np.array_equal(run.outputs[n], again.outputs[n], equal_nan=True) for n in names):
                found.violations.append("reads memory that it never wrote")
        found.samples += 1
        found.stack = max(found.stack, run.stack)
        found.violations += [each for each in run.violations if each not in found.violations]
        if run.instructions > found.instructions:
            found.instructions, found.functions = run.instructions, run.functions
        if found.violations:
            raise GateError(f"the firmware is not sound: {found.violations[0]}", where=str(model))
        expected = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        for name, sums in _differences(found, run.outputs, expected).items():
            squares[name] = squares.get(name, np.zeros(2)) + sums
            if not coded:
                _judge(sums, TOLERANCE, f"{name}, sample {found.samples}")
        found.distance = max(map(_distance, squares.values()), default=0.0)
    for name, sums in squares.items():
        _judge(sums, TOLERANCE_CODES if coded else TOLERANCE, name)
    return found


def quantised(path: Path) -> bool:
    """Whether the file holds Q/DQ pairs, so that it is computed in integers."""
    return is_quantised(read(path))


def _differences(found: Check, outputs: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Output → sums of the squares of its error, and of what was expected."""
    sums = {}
    for name, value in expected.items():
        wide, ours = np.asarray(value, np.float64), np.asarray(outputs[name], np.float64)
        error = np.abs(np.where(wide == ours, 0.0, wide - ours))
        found.max_error = max(found.max_error, float(error.max(initial=0.0)))
        error = error if not error.max(initial=0.0) <= SMALL else np.zeros_like(error)
        sums[name] = np.array([np.sum(error**2), np.sum(wide**2)])
    return sums


def _distance(sums: np.ndarray) -> float:
    return float(np.sqrt(sums[0]) / max(np.sqrt(sums[1]), 1e-12))


def _judge(sums: np.ndarray, tolerance: float, where: str) -> None:
    if not _distance(sums) <= tolerance:
        raise GateError(
            f"differs from ONNX Runtime by {_distance(sums):.2g} (relative L2, {tolerance:g} is allowed)", where=where
        )


def versions() -> dict[str, str]:
    """The compiler and the emulator, for reports."""
    from importlib.metadata import version

    return {"toolchain": compiler_version(), "emulator": f"unicorn {version('unicorn')}"}
