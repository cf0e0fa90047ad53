"""From a loop nest to TVM's loop IR: explicit loops, blocks of results in registers, pieces in scratch buffers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.ir import Var as Pointer

from lrcompile.backends.c import integer
from lrcompile.backends.c.literals import number
from lrcompile.dataflow.blocking import UNROLL, blocks
from lrcompile.dataflow.dot import dot
from lrcompile.dataflow.expr import Call, Const, Datum, Expr, Load, Position, Result
from lrcompile.dataflow.index import Quotient, Sum, Var, bounds, flatten
from lrcompile.dataflow.nest import Loop, Nest, Node
from lrcompile.dataflow.stage import START, Part
from lrcompile.dataflow.stage import start as first_value
from lrcompile.errors import UnsupportedError

Env = dict[Var, Any]
KINDS = {
    **{"add": tirx.Add, "sub": tirx.Sub, "mul": tirx.Mul, "eq": tirx.EQ, "ne": tirx.NE, "lt": tirx.LT, "le": tirx.LE},
    **{"gt": tirx.GT, "ge": tirx.GE, "and": tirx.And, "or": tirx.Or},
}
BITS = {
    **{"bitand": tirx.bitwise_and, "bitor": tirx.bitwise_or, "bitxor": tirx.bitwise_xor},
    **{"shl": tirx.shift_left, "shr": tirx.shift_right},
}
LIBM = {
    name: name
    for name in (
        *("exp", "log", "log1p", "sqrt", "erf", "tanh", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"),
        *("asinh", "acosh", "atanh", "floor", "ceil", "rint", "pow", "fmod"),
    )
}
LIBM |= {"abs": "fabs", "max": "fmax", "min": "fmin"}


@dataclass(frozen=True)
class Lowered:
    """A kernel before it is text.

    Args:
        function: its loops.
        params: tensors and pieces of the nest, in the order of the parameters.
        written: those that it writes.
    """

    function: Any
    params: tuple[str, ...]
    written: frozenset[str]


class Lowering:
    """Lowers one nest. Parameters are numbered, so that nests of equal structure become the same text.

    ``short`` takes one result at a time and unrolls no loop: for a nest whose bytes count for more than its time.
    """

    def __init__(self, nest: Nest, symbol: str, *, short: bool = False) -> None:
        self.nest, self.symbol, self.short = nest, symbol, short
        self.shapes = nest.formulas
        self.buffers: dict[str, Any] = {}
        self.pointers: dict[str, Any] = {}
        self._count = itertools.count()

    def lower(self) -> Lowered:
        """The kernel's function."""
        body = self._node(self.nest.root, {})
        head = [tirx.DeclBuffer(self.buffers[name], data=pointer) for name, pointer in self.pointers.items()]
        function = tirx.PrimFunc(list(self.pointers.values()), _seq([*head, *body]), None)
        names = {node.name for node in self.nest.root.nodes()}
        written = frozenset(name for name in self.pointers if name in names)
        return Lowered(function.with_attr("global_symbol", self.symbol), tuple(self.pointers), written)

    # -- structure ----------------------------------------------------------------------------

    def _node(self, node: Node, env: Env) -> list[Any]:
        env = dict(env)
        variables = []
        for loop in node.loops:
            var = tirx.Var(f"s{next(self._count)}", "int32")
            env[loop.var] = var
            variables.append(var)
        depth = len(node.loops)
        body = [*self._children(node, depth, env), *self._compute(node, env)]
        for level in range(depth, 0, -1):
            body = [
                *self._children(node, level - 1, env),
                *self._loop(node.loops[level - 1], variables[level - 1], body),
            ]
        return body

    def _children(self, node: Node, level: int, env: Env) -> list[Any]:
        return [stmt for at, child in node.children if at == level for stmt in self._node(child, env)]

    def _loop(self, loop: Loop, var: Any, body: list[Any]) -> list[Any]:
        turn: Any = tirx.Var(f"i{next(self._count)}", "int32")
        first: Any = turn * loop.tile if loop.tile > 1 else turn
        if not loop.exact:
            first = tirx.Min(first, _int(loop.var.extent - 1))
        stmt = _seq([tirx.Bind(var, first), *body])
        return [_for(turn, loop.turns, stmt)]

    # -- one stage ----------------------------------------------------------------------------

    def _compute(self, node: Node, env: Env) -> list[Any]:
        part = node.part
        if part.body is None:
            return [self._plain(node, part, env)]
        factors = {} if self.short else {var: factor for var, factor in blocks(part).items() if factor > 1}
        choices = []
        for var, factor in factors.items():
            whole, rest = divmod(var.extent, factor)
            segments = [(0, whole, factor)] + ([(whole * factor, 1, rest)] if rest else [])
            choices.append([(var, *segment) for segment in segments])
        return [self._block(node, part, list(chosen), env) for chosen in itertools.product(*choices)]

    def _plain(self, node: Node, part: Part, env: Env) -> Any:
        env, loops = self._loops([var for var in part.axes if var.extent > 1], env)
        stmt = self._store(node, part, env, None)
        return _wrap(stmt, loops)

    def _block(self, node: Node, part: Part, blocked: list[tuple[Var, int, int, int]], env: Env) -> Any:
        """Results of one block in registers; ``blocked`` has (axis, first, number of blocks, size of a block)."""
        used = {each[0] for each in blocked}
        env, loops = self._loops([var for var in part.axes if var.extent > 1 and var not in used], env)
        bases: list[Any] = []
        for _, first, count, size in blocked:
            if count > 1:
                turn: Any = tirx.Var(f"b{next(self._count)}", "int32")
                loops.append((turn, count))
                bases.append(turn * size + first)
            else:
                bases.append(_int(first))
        points = []
        for offsets in itertools.product(*(range(size) for *_, size in blocked)):
            own = {each[0]: base + offset for each, base, offset in zip(blocked, bases, offsets, strict=True)}
            points.append(dict(env) | own)
        return _wrap(self._reduce(node, part, points), loops)

    def _reduce(self, node: Node, part: Part, points: list[Env]) -> Any:
        body = part.body
        assert body is not None
        total = tirx.decl_buffer((len(points),), _storage(body.dtype), "acc", layout=None)  # type: ignore[arg-type]
        first = self._value(first_value(part.combine, body.dtype), {}, node, None)
        first = tirx.Cast("uint8", first) if body.dtype == "bool" else first
        stmts = [tirx.AllocBuffer(total)]
        stmts += [tirx.BufferStore(total, first, [_int(at)]) for at in range(len(points))]
        inner = [var for var in part.inner if var.extent > 1]
        own, loops = self._loops(inner[:-1], {})
        updates = self._updates(node, part, total, [dict(point) | own for point in points], inner[-1:])
        stmts.append(_wrap(updates, loops))
        for at, point in enumerate(points):
            found = tirx.BufferLoad(total, [_int(at)])
            stmts.append(self._store(node, part, point, _truth(found) if body.dtype == "bool" else found))
        return _seq(stmts)

    def _updates(self, node: Node, part: Part, total: Any, points: list[Env], last: list[Var]) -> Any:
        """The innermost loop, with its first few turns written out."""

        def update(extra: Env) -> list[Any]:
            made = []
            for at, point in enumerate(points):
                assert part.body is not None
                value = self._value(part.body, dict(point) | extra, node, None)
                old = tirx.BufferLoad(total, [_int(at)])
                made.append(tirx.BufferStore(total, self._combine(part, old, value), [_int(at)]))
            return made

        if not last:
            return _seq(update({}))
        found = dot(part)
        if found is not None:
            turn = tirx.Var(f"k{next(self._count)}", "int32")
            return _seq(integer.loop(self, node, found, total, points, update, turn, short=self.short))
        extent, width = last[0].extent, 1 if self.short else max(1, min(UNROLL, 64 // len(points)))
        turn: Any = tirx.Var(f"k{next(self._count)}", "int32")
        whole, rest = divmod(extent, width)
        stmts = []
        if whole:
            steps = [stmt for at in range(width) for stmt in update({last[0]: turn * width + at})]
            stmts.append(_for(turn, whole, _seq(steps)))
        stmts += [stmt for at in range(rest) for stmt in update({last[0]: _int(whole * width + at)})]
        return _seq(stmts)

    def _combine(self, part: Part, old: Any, new: Any) -> Any:
        assert part.body is not None
        dtype = part.body.dtype
        if dtype == "bool":
            return tirx.Cast("uint8", (tirx.Or if part.combine in ("max", "add") else tirx.And)(_truth(old), new))
        if part.combine in START:
            return KINDS[part.combine](old, new)
        if dtype.startswith("float"):
            return _libm(part.combine, dtype, [old, new])
        return _extreme(part.combine, dtype, [old, new])

    def _loops(self, variables: list[Var], env: Env) -> tuple[dict[Var, Any], list[tuple[Any, int]]]:
        made = dict(env)
        loops = []
        for var in variables:
            made[var] = tirx.Var(f"i{next(self._count)}", "int32")
            loops.append((made[var], var.extent))
        return made, loops

    def _store(self, node: Node, part: Part, env: Env, result: Any) -> Any:
        value = self._value(part.finish, env, node, result)
        if part.finish.dtype == "bool":
            value = tirx.Cast("uint8", value)
        if node is self.nest.root:
            index = flatten(part.store, node.stage.shape)
        else:
            index = flatten(_relative(part.store, node), node.region.extents)
        return tirx.BufferStore(
            self._buffer(node.name, part.finish.dtype, node), value, [self._index(index, env, node)]
        )

    # -- values -------------------------------------------------------------------------------

    def _buffer(self, name: str, dtype: str, node: Node | None) -> Any:
        """The buffer of a node of this nest, or of a tensor outside."""
        if name not in self.buffers:
            symbol = f"t{len(self.buffers)}"
            inside = node is not None and node is not self.nest.root
            shape = node.region.extents if node is not None and inside else self.shapes.shape(name)
            buffer = tirx.decl_buffer((max(prod(shape), 1),), _storage(dtype), f"{symbol}_view", layout=None)  # type: ignore[arg-type]
            self.buffers[name] = buffer
            self.pointers[name] = Pointer(symbol, PointerType(PrimType(_storage(dtype)), "global"))
        return self.buffers[name]

    def _index(self, index: Sum, env: Env, node: Node, result: Any = None) -> Any:
        total: Any = None
        for atom, factor in index.terms:
            if isinstance(atom, Var):
                value = env[atom] if atom in env else _int(0)
                if atom not in env and atom.extent > 1:
                    raise AssertionError(f"{node.name}: {atom} is not bound")
            elif isinstance(atom, Datum):
                value = tirx.Cast("int32", self._value(atom.value, env, node, result))
            else:
                inner = self._index(atom.value, env, node, result)
                kind = tirx.FloorDiv if isinstance(atom, Quotient) else tirx.FloorMod
                if (bounds(atom.value) or (0, 0))[0] >= 0:
                    kind = tirx.Div if isinstance(atom, Quotient) else tirx.Mod
                value = kind(inner, _int(atom.divisor))
            value = value if factor == 1 else value * factor
            total = value if total is None else total + value
        if total is None:
            return _int(index.constant)
        return total + index.constant if index.constant else total

    def _value(self, value: Expr, env: Env, node: Node, result: Any) -> Any:
        match value:
            case Const():
                return number(value)
            case Result():
                return result
            case Position():
                return tirx.Cast(value.dtype, self._index(value.index, env, node, result))
            case Load():
                return self._load(value, env, node, result)
            case Call():
                return self._call(value, [self._value(arg, env, node, result) for arg in value.args])

    def _load(self, load: Load, env: Env, node: Node, result: Any) -> Any:
        found = self.element(load, env, node, result)
        return tirx.NE(found, tirx.const(0, "uint8")) if load.dtype == "bool" else found

    def element(self, load: Load, env: Env, node: Node, result: Any = None) -> Any:
        """What a load reads, as it is stored."""
        source = node.sources.get(load.tensor)
        if source is None:
            index, name = flatten(load.index, self.shapes.shape(load.tensor)), load.tensor
        else:
            index, name = flatten(_relative(load.index, source), source.region.extents), source.name
        buffer = self._buffer(name, load.dtype, source)
        return tirx.BufferLoad(buffer, [self._index(index, env, node, result)])

    def _call(self, value: Call, args: list[Any]) -> Any:
        kind, dtype = value.op, value.args[0].dtype
        floating = dtype.startswith("float")
        if kind in KINDS and not (dtype == "bool" and kind in ("add", "mul", "sub")):
            return KINDS[kind](*args)
        if kind in BITS:
            return BITS[kind](*args)
        match kind:
            case "cast":
                return _cast(args[0], dtype, value.dtype)
            case "select":
                return tirx.Select(*args)
            case "guard":
                return tirx.if_then_else(*args)
            case "not":
                return tirx.Not(args[0])
            case "xor":
                return tirx.NE(tirx.Cast("int32", args[0]), tirx.Cast("int32", args[1]))
            case "neg":
                return tirx.const(-0.0 if floating else 0, dtype) - args[0] if not floating else args[0] * -1.0
            case "bitnot":
                return tirx.bitwise_not(args[0])
            case "isqrt":
                return integer.isqrt(args[0])
            case "quotient":
                return integer.quotient(args)
            case "scale":
                return integer.scale(args)
            case "isnan":
                return tirx.NE(tirx.call_pure_extern("int32", "isnan", args[0]), _int(0))  # x != x is simplified
            case "rem":
                return tirx.Mod(*args)
            case "div":
                return tirx.Div(*args)
            case "max" | "min" if not floating:
                return _extreme(kind, dtype, args)
            case "abs" if not floating:
                opposite = tirx.const(0, dtype) - args[0]
                return args[0] if dtype.startswith("u") else _extreme("max", dtype, [args[0], opposite])
        if kind in LIBM and floating:
            return _libm(kind, dtype, args)
        raise UnsupportedError(f"no C for {kind} of {dtype}", where=node_names(self.nest))


def node_names(nest: Nest) -> str:
    """The nodes of the model that a nest computes, for messages."""
    return ", ".join(nest.root.part.nodes)


def _relative(index: tuple[Sum, ...], source: Node) -> tuple[Sum, ...]:
    return tuple(each - start for each, start in zip(index, source.region.starts, strict=True))


def _storage(dtype: str) -> str:
    return "uint8" if dtype == "bool" else dtype


def _int(value: int) -> Any:
    return tirx.const(int(value), "int32")


def _for(var: Any, extent: int, body: Any) -> Any:
    return tirx.For(var, _int(0), _int(extent), tirx.ForKind.SERIAL, body)


def _seq(stmts: list[Any]) -> Any:
    """Statements one after the other, without nesting."""
    flat = []
    for each in stmts:
        flat += list(each.seq) if isinstance(each, tirx.SeqStmt) else [each]
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def _wrap(stmt: Any, loops: list[tuple[Any, int]]) -> Any:
    for var, extent in reversed(loops):
        stmt = _for(var, extent, stmt)
    return stmt


def _libm(name: str, dtype: str, args: list[Any]) -> Any:
    return tirx.call_pure_extern(dtype, LIBM[name] + ("f" if dtype == "float32" else ""), *args)


def _extreme(name: str, dtype: str, args: list[Any]) -> Any:
    """The shorter or larger integer, by a function of the emitted file.

    TVM's C printer gives an operand of its own ``min`` a name and reuses that for the same text later on, even where
    the variable has changed in between.
    """
    return tirx.call_pure_extern(dtype, f"lrc_{name}_{dtype}", *args)


def _truth(value: Any) -> Any:
    return tirx.NE(value, tirx.const(0, "uint8"))


def _cast(value: Any, old: str, new: str) -> Any:
    if new == "bool":
        return tirx.NE(value, tirx.const(0, old)) if old != "bool" else value
    if old == "bool":
        return tirx.Select(value, tirx.const(1, new), tirx.const(0, new))
    return tirx.Cast(new, value)
