"""Values: what one element of a tensor is, as an expression over elements of other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lrcompile.dataflow.index import Quotient, Remainder, Sum, Var, substitute

INEXPENSIVE = {"add", "sub", "mul", "neg", "abs", "min", "max", "cast", "select", "guard", "not", "and", "or", "xor"}
INEXPENSIVE |= {"eq", "lt", "le", "gt", "ge", "ne", "shl", "shr", "bitand", "bitor", "bitxor", "bitnot"}
COSTS = {
    "scale": 5,
    "isqrt": 200,
    "quotient": 200,
    "exp": 25,
    "log": 30,
    "erf": 40,
    "tanh": 40,
    "pow": 80,
    "div": 4,
    "sqrt": 4,
    "sin": 40,
    "cos": 40,
}
"""Instructions of one evaluation, roughly; everything else that is not inexpensive counts ten."""


@dataclass(frozen=True, slots=True)
class Const:
    """A number; ``dtype`` is numpy's name, as everywhere."""

    value: float | int | bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Position:
    """An index used as a value."""

    index: Sum
    dtype: str = "int32"


@dataclass(frozen=True, slots=True)
class Load:
    """One element of a tensor."""

    tensor: str
    index: tuple[Sum, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Call:
    """An operation on values. ``guard(c, a, b)`` evaluates only the branch that counts, ``select`` may do both."""

    op: str
    args: tuple[Expr, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Result:
    """Inside the finish of a reduction: what was reduced."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Datum:
    """An atom of an index that data decide: a value of integer type."""

    value: Expr

    def __repr__(self) -> str:
        return f"Datum({self.value!r})"


Expr = Const | Position | Load | Call | Result


def call(op: str, *args: Expr, dtype: str | None = None) -> Expr:
    """An operation whose type is that of its last operand, unless said otherwise."""
    return Call(op, args, dtype or args[-1].dtype)


def cast(value: Expr, dtype: str) -> Expr:
    """The value in another type."""
    if value.dtype == dtype:
        return value
    if isinstance(value, Const):
        return Const(_number(value.value, dtype), dtype)
    return Call("cast", (value,), dtype)


def _number(value: float | int | bool, dtype: str) -> float | int | bool:
    if dtype == "bool":
        return bool(value)
    return float(value) if dtype.startswith("float") else int(value)


def walk(value: Expr) -> Iterator[Expr]:
    """All parts of an expression, also those that decide indices."""
    yield value
    if isinstance(value, Call):
        for arg in value.args:
            yield from walk(arg)
    elif isinstance(value, (Load, Position)):
        for index in value.index if isinstance(value, Load) else (value.index,):
            for inner in _data(index):
                yield from walk(inner)


def _data(index: Sum) -> Iterator[Expr]:
    for atom, _ in index.terms:
        if isinstance(atom, Datum):
            yield atom.value
        elif isinstance(atom, (Quotient, Remainder)):
            yield from _data(atom.value)


def loads(value: Expr) -> Iterator[Load]:
    """All loads of an expression, in order."""
    return (each for each in walk(value) if isinstance(each, Load))


def rewrite(value: Expr, new: Callable[[Expr], Expr | None], atom: Callable[[Any], Sum | None] | None = None) -> Expr:
    """Replaces sub-expressions bottom-up; ``atom`` replaces atoms of indices."""

    def index(each: Sum) -> Sum:
        return substitute(each, atoms)

    def atoms(each: Any) -> Sum | None:
        found = atom(each) if atom is not None else None
        if found is None and isinstance(each, Datum):
            inner = rewrite(each.value, new, atom)
            return _datum(inner)
        return found

    if isinstance(value, Call):
        value = Call(value.op, tuple([rewrite(arg, new, atom) for arg in value.args]), value.dtype)
    elif isinstance(value, Load):
        value = Load(value.tensor, tuple([index(each) for each in value.index]), value.dtype)
    elif isinstance(value, Position):
        value = Position(index(value.index), value.dtype)
    return new(value) or value


def _datum(value: Expr) -> Sum:
    if isinstance(value, Const):
        return Sum((), int(value.value))
    if isinstance(value, Position):
        return value.index
    return Sum(((Datum(value), 1),))


def as_index(value: Expr) -> Sum:
    """A value of integer type as an index."""
    while isinstance(value, Call) and value.op == "cast" and value.args[0].dtype.startswith(("int", "uint")):
        value = value.args[0]
    return _datum(value)


def with_vars(value: Expr, table: Mapping[Var, Sum]) -> Expr:
    """The expression with variables replaced by indices."""
    return rewrite(value, lambda _: None, table.get)


def with_result(value: Expr, result: Expr) -> Expr:
    """A finish applied to a value."""
    return rewrite(value, lambda each: result if isinstance(each, Result) else None)


def cost(value: Expr) -> int:
    """Rough number of instructions of one evaluation, loads of elements included."""
    total = 0
    for each in walk(value):
        if isinstance(each, Load):
            total += 1
        elif isinstance(each, Call):
            total += 1 if each.op in INEXPENSIVE else COSTS.get(each.op, 10)
    return total
