"""From a schedule to C99: kernels, one function that calls them, an arena, and the weights as a binary file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from lrcompile.backends.c import integer
from lrcompile.backends.c.codegen import helpers
from lrcompile.backends.c.kernels import Kernels, kernels
from lrcompile.backends.c.lower import Lowered
from lrcompile.backends.c.sharing import Shared
from lrcompile.backends.c.toolchain import C_TYPES, include_binary
from lrcompile.dataflow.nest import Nest
from lrcompile.dataflow.program import ARENA, ENTRY, ITEMSIZE, WEIGHTS, Kernel, Port, Program
from lrcompile.dataflow.schedule import Schedule
from lrcompile.dataflow.scratch import Pieces

ALIGN = 16
WORD = 4  # bytes; kernels load words of bytes
ATTRIBUTES = """#if defined(__clang__)
#define LRC_KERNEL __attribute__((noinline))
#define LRC_SHORT __attribute__((noinline, minsize))
#elif defined(__GNUC__)
#define LRC_KERNEL __attribute__((noinline))
#define LRC_SHORT __attribute__((noinline, cold))
#else
#define LRC_KERNEL
#define LRC_SHORT
#endif
"""


def emit(schedule: Schedule) -> Program:
    """Lowers every nest and writes the program's files.

    Raises:
        UnsupportedError: an operation or a type that C99 does not have.
    """
    return _Emitter(schedule).program()


def identifier(name: str, taken: set[str]) -> str:
    """A C identifier for a name that nothing in ``taken`` has yet; it is added."""
    text = re.sub(r"\W+", "_", name, flags=re.A).strip("_") or "value"
    text = f"v_{text}" if text[0].isdigit() else text
    symbol, count = text, 1
    while symbol in taken:
        count += 1
        symbol = f"{text}_{count}"
    taken.add(symbol)
    return symbol


_RESERVED = frozenset(
    """
    auto break case char const continue default do double else enum extern float for goto if inline int long
    register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    main model model_run model_arena model_weights pieces exp log sin cos tan pow y0 y1 yn j0 j1 jn gamma
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class _Call:
    """One kernel with its arguments."""

    nest: Nest
    kernel: Lowered
    pieces: Pieces
    shared: Shared
    symbol: str


class _Emitter:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.formulas = schedule, schedule.formulas
        taken: set[str] = set(_RESERVED)
        self.inputs = [
            Port(name, identifier(name, taken), dtype, shape) for name, (shape, dtype) in self.formulas.inputs.items()
        ]
        self.outputs = [
            Port(name, identifier(name, taken), self.formulas.dtype(name), self.formulas.shape(name))
            for name in self.formulas.outputs
        ]
        self.blob = bytearray()
        self.weights: dict[str, int] = {}
        self._known: dict[bytes, int] = {}

    def program(self) -> Program:
        nests = self.schedule.nests
        made = kernels(nests, sum({id(each): each.nbytes for each in self.formulas.constants.values()}.values()))
        symbols = self._symbols(nests, made)
        calls = [
            _Call(nest, kernel, pieces, shared, symbols[shared.function])
            for nest, kernel, pieces, shared in zip(nests, made.lowered, self.schedule.pieces, made.shared, strict=True)
        ]
        for call in calls:
            for name in call.kernel.params:
                if name in self.formulas.constants:
                    self._store(name)
        body = self._source(calls, made, symbols)
        files: dict[str, str | bytes] = {
            "model.h": self._header(),
            "model.c": body,
            "weights.S": include_binary(WEIGHTS, "weights.bin"),
            "weights.bin": bytes(self.blob) or bytes(ALIGN),
        }
        return Program(
            files=files,
            sources=("model.c", "weights.S"),
            arena=self.schedule.arena,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            weights=len(files["weights.bin"]),
            slots=tuple(self.schedule.slots.values()),
            kernels=tuple(self._kernel(call) for call in calls),
            bound=self.schedule.bound,
            notes=tuple(self.schedule.notes),
        )

    # -- weights ------------------------------------------------------------------------------

    def _store(self, name: str) -> None:
        """Puts a constant into the blob; equal contents are stored once."""
        if name in self.weights:
            return
        array = self.formulas.constants[name]
        data = np.ascontiguousarray(array.astype(np.uint8) if array.dtype == bool else array).tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._known:
            self.blob += bytes(-len(self.blob) % max(array.dtype.itemsize, WORD))
            self._known[key] = len(self.blob)
            self.blob += data
        self.weights[name] = self._known[key]

    # -- text ---------------------------------------------------------------------------------

    def _symbols(self, nests: Sequence[Nest], made: Kernels) -> dict[int, str]:
        """Function → its name, after the last node of the first nest that calls it."""
        found: dict[int, str] = {}
        taken: set[str] = set(_RESERVED)
        for nest, shared in zip(nests, made.shared, strict=True):
            if shared.function not in found:
                nodes = nest.root.part.nodes
                found[shared.function] = identifier(f"model_{_short(nodes[-1] if nodes else nest.root.name)}", taken)
        return found

    def _signature(self) -> str:
        params = [f"const {C_TYPES[port.dtype]} *{port.symbol}" for port in self.inputs]
        params += [f"{C_TYPES[port.dtype]} *{port.symbol}" for port in self.outputs]
        return f"void {ENTRY}({', '.join(params)})"

    def _header(self) -> str:
        lines = ["/* Generated by lrcompile. */", "#ifndef MODEL_H", "#define MODEL_H", "", "#include <stdint.h>", ""]
        lines += [f"#define MODEL_ARENA_BYTES {self.schedule.arena}", f"#define MODEL_WEIGHTS_BYTES {len(self.blob)}"]
        for port in (*self.inputs, *self.outputs):
            shape = " x ".join(map(str, port.shape)) or "one number"
            lines.append(f"#define MODEL_{port.symbol.upper()}_SIZE {max(prod(port.shape), 1)} /* {shape} */")
        lines += ["", "/* Not reentrant: all calls share one arena. Inputs are only read. */", f"{self._signature()};"]
        return "\n".join([*lines, "", "#endif", ""])

    def _source(self, calls: list[_Call], made: Kernels, symbols: dict[int, str]) -> str:
        kernels = "\n".join(
            f"{'LRC_SHORT' if at in made.short else 'LRC_KERNEL'} void {symbols[at]}({params});\n"
            f"void {symbols[at]}({params})\n{{\n{body}}}\n"
            for at, (params, body) in enumerate(made.functions)
        )
        lines = ["/* Generated by lrcompile. */", '#include "model.h"', "", "#include <math.h>", "#include <stdbool.h>"]
        lines += ["#include <stdint.h>", "", f"extern const unsigned char {WEIGHTS}[];", "", ATTRIBUTES]
        lines += [helpers(kernels), *integer.helpers(kernels)]
        if self.schedule.arena:
            lines += ["#if defined(__GNUC__)", "__attribute__((aligned(16)))", "#endif"]
            lines += [f"unsigned char {ARENA}[{self.schedule.arena}];", ""]
        return "\n".join([*lines, kernels, *self._run(calls), ""])

    def _run(self, calls: list[_Call]) -> Iterator[str]:
        yield f"{self._signature()}\n{{"
        if self.schedule.scratch:
            yield f"    union {{ double align; unsigned char bytes[{self.schedule.scratch}]; }} pieces;"
        read = {name for call in calls for name in call.kernel.params}
        for port in self.inputs:
            if port.name not in read:
                yield f"    (void){port.symbol};"
        for call in calls:
            pointers = [self._argument(call, name) for name in call.kernel.params]
            arguments = ", ".join([*pointers, *call.shared.arguments])
            nodes = ", ".join(call.nest.root.part.nodes).replace("*/", "")
            yield f"    /* {nodes} */\n    {call.symbol}({arguments});"
        yield "}"

    def _argument(self, call: _Call, name: str) -> str:
        """Where a parameter of a kernel lies."""
        pieces, formulas = call.pieces, self.formulas
        if name in formulas.constants:
            return self._pointer(formulas.constants[name].dtype.name, WEIGHTS, self.weights[name], const=True)
        for port in (*self.inputs, *self.outputs):
            if port.name == name:
                return port.symbol
        inside = {node.name: node.stage.dtype for node in call.nest.root.nodes() if node is not call.nest.root}
        if name in inside:
            if name in pieces.stack_offsets:
                return self._pointer(inside[name], "pieces.bytes", pieces.stack_offsets[name])
            at = self.schedule.nests.index(call.nest)
            block = self.schedule.slots[f"pieces of {call.nest.root.name}#{at}"].offset
            return self._pointer(inside[name], ARENA, block + pieces.arena_offsets[name])
        offset = self.schedule.offset(name)
        if offset is None:  # it shares the memory of an output
            owner = self.schedule.owners[name]
            port = next(each for each in self.outputs if self.schedule.owners[each.name] == owner)
            return f"({C_TYPES[formulas.dtype(name)]} *){port.symbol}"
        return self._pointer(formulas.dtype(name), ARENA, offset)

    def _pointer(self, dtype: str, base: str, offset: int, *, const: bool = False) -> str:
        kind = f"{'const ' if const else ''}{C_TYPES[dtype]} *"
        return f"({kind})(void *)({base} + {offset})" if not const else f"({kind})(const void *)({base} + {offset})"

    def _kernel(self, call: _Call) -> Kernel:
        root, weights = call.nest.root, self.formulas.constants
        macs = 0
        for node in root.nodes():
            if node.part.body is not None and node.part.combine == "add":
                macs += node.part.size * node.part.reach * node.path[-1].turns
        loops = ", ".join(f"axis {loop.axis} of {root.stage.name} by {loop.tile}" for loop in root.loops)
        size = sum(
            prod(weights[name].shape) * ITEMSIZE[weights[name].dtype.name]
            for name in call.kernel.params
            if name in weights
        )
        return Kernel(call.symbol, root.part.nodes, loops, macs, call.pieces.stack, size)


def _short(name: str) -> str:
    """The last words of a node's name."""
    return re.split(r"[/.]|->", name)[-1].strip() or name
