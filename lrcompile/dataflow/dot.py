"""Sums of products of bytes that lie side by side: what the DSP instructions of a core compute two at a time."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.dataflow.expr import Call, Const, Expr, Load
from lrcompile.dataflow.index import Sum, Var, variables
from lrcompile.dataflow.stage import Part

WIDTH = 4
"""Bytes of one load."""


@dataclass(frozen=True)
class Factor:
    """One side: ``load - zero``, both int8, in int32."""

    load: Load
    zero: int


@dataclass(frozen=True)
class Dot:
    """``sum(left * right)`` over ``var``, along which both sides are contiguous."""

    left: Factor
    right: Factor
    var: Var


def dot(part: Part) -> Dot | None:
    """The sum that a part computes, where it is one of this kind."""
    inner = [var for var in part.inner if var.extent > 1]
    body = part.body
    if not inner or inner[-1].extent < WIDTH or part.combine != "add":
        return None
    if not isinstance(body, Call) or body.op != "mul" or body.dtype != "int32":
        return None
    left, right = (_factor(arg, inner[-1]) for arg in body.args)
    return None if left is None or right is None else Dot(left, right, inner[-1])


def _factor(value: Expr, var: Var) -> Factor | None:
    zero = 0
    if isinstance(value, Call) and value.op == "sub" and isinstance(value.args[1], Const):
        zero, value = int(value.args[1].value), value.args[0]
    if not isinstance(value, Call) or value.op != "cast" or value.dtype != "int32":
        return None
    load = value.args[0]
    if not isinstance(load, Load) or load.dtype != "int8" or not load.index:
        return None
    *outer, last = load.index
    if any(_uses(each, var) for each in outer) or not _uses(last, var):
        return None
    return Factor(load, zero) if (var, 1) in last.terms and not _uses(_without(last, var), var) else None


def _uses(index: Sum, var: Var) -> bool:
    return var in set(variables(index))


def _without(index: Sum, var: Var) -> Sum:
    return Sum(tuple(term for term in index.terms if term[0] != var), index.constant)
