"""From a schedule to C99: kernels, one function that calls them, an arena, and the weights as a binary file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from lrcompile.backends.c import integer
from lrcompile.backends.c.codegen import HELPERS, HELPERS_WIDE, functions
from lrcompile.backends.c.lower import Lowered, Lowering
from lrcompile.backends.c.toolchain import C_TYPES, include_binary
from lrcompile.dataflow.nest import Nest
from lrcompile.dataflow.program import ARENA, ENTRY, ITEMSIZE, WEIGHTS, Kernel, Port, Program
from lrcompile.dataflow.schedule import Schedule
from lrcompile.dataflow.scratch import Pieces

ALIGN = 16


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


_KEYWORDS = """auto break case char const continue default do double else enum extern float for goto if inline int long
register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while"""
_NAMES = "main model model_run model_arena model_weights pieces exp log sin cos tan pow y0 y1 yn j0 j1 jn gamma"
_RESERVED = {*_KEYWORDS.split(), *_NAMES.split()}


@dataclass(frozen=True)
class _Call:
    """One kernel with its arguments."""

    nest: Nest
    kernel: Lowered
    pieces: Pieces
    label: str


class _Emitter:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.formulas = schedule, schedule.formulas
        taken = set(_RESERVED)
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
        calls = [
            _Call(nest, Lowering(nest, f"k{at}").lower(), pieces, f"k{at}")
            for at, (nest, pieces) in enumerate(zip(self.schedule.nests, self.schedule.pieces, strict=True))
        ]
        texts = functions({call.label: call.kernel for call in calls})
        symbols = self._symbols(calls, texts)
        for call in calls:
            for name in call.kernel.params:
                if name in self.formulas.constants:
                    self._store(name)
        body = self._source(calls, texts, symbols)
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
            kernels=tuple(self._kernel(call, symbols[call.label]) for call in calls),
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
            self.blob += bytes(-len(self.blob) % ALIGN)
            self._known[key] = len(self.blob)
            self.blob += data
        self.weights[name] = self._known[key]

    # -- text ---------------------------------------------------------------------------------

    def _symbols(self, calls: list[_Call], texts: dict[str, tuple[str, str]]) -> dict[str, str]:
        """Call → name of its function; equal functions are written once."""
        known: dict[tuple[str, str], str] = {}
        taken: set[str] = set(_RESERVED)
        symbols = {}
        for call in calls:
            text = texts[call.label]
            if text not in known:
                nodes = call.nest.root.part.nodes
                known[text] = identifier(f"model_{_short(nodes[-1] if nodes else call.nest.root.name)}", taken)
            symbols[call.label] = known[text]
        return symbols

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

    def _source(self, calls: list[_Call], texts: dict[str, tuple[str, str]], symbols: dict[str, str]) -> str:
        kernels = "\n".join(self._functions(calls, texts, symbols))
        lines = ["/* Generated by lrcompile. */", '#include "model.h"', "", "#include <math.h>", "#include <stdbool.h>"]
        lines += ["#include <stdint.h>", "", f"extern const unsigned char {WEIGHTS}[];", ""]
        lines += [HELPERS] if "lrc_f32(" in kernels else []
        lines += [HELPERS_WIDE] if "lrc_f64(" in kernels else []
        lines += integer.helpers(kernels)
        if self.schedule.arena:
            lines += ["#if defined(__GNUC__)", "__attribute__((aligned(16)))", "#endif"]
            lines += [f"unsigned char {ARENA}[{self.schedule.arena}];", ""]
        return "\n".join([*lines, kernels, *self._run(calls, symbols), ""])

    def _functions(
        self, calls: list[_Call], texts: dict[str, tuple[str, str]], symbols: dict[str, str]
    ) -> Iterator[str]:
        written = set()
        for call in calls:
            symbol = symbols[call.label]
            if symbol not in written:
                written.add(symbol)
                params, body = texts[call.label]
                yield f"void {symbol}({params});\nvoid {symbol}({params})\n{{\n{body}}}\n"

    def _run(self, calls: list[_Call], symbols: dict[str, str]) -> Iterator[str]:
        yield f"{self._signature()}\n{{"
        used = {name for call in calls for name in call.kernel.params}
        for port in self.inputs:
            if port.name not in used:
                yield f"    (void){port.symbol};"
        if self.schedule.scratch:
            yield f"    union {{ double align; unsigned char bytes[{self.schedule.scratch}]; }} pieces;"
        for call in calls:
            arguments = ", ".join(self._argument(call, name) for name in call.kernel.params)
            nodes = ", ".join(call.nest.root.part.nodes).replace("*/", "")
            yield f"    /* {nodes} */\n    {symbols[call.label]}({arguments});"
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

    def _kernel(self, call: _Call, symbol: str) -> Kernel:
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
        return Kernel(symbol, root.part.nodes, loops, macs, call.pieces.stack, size)


def _short(name: str) -> str:
    """The last words of a node's name."""
    return re.split(r"[/.]|->", name)[-1].strip() or name
