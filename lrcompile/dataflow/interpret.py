"""Formulas on numpy arrays: slow and plain, to fold constants and to check everything else against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lrcompile.dataflow.expr import Call, Const, Datum, Expr, Load, Position, Result
from lrcompile.dataflow.index import Quotient, Sum, Var
from lrcompile.dataflow.stage import Formulas, Part, Stage, start
from lrcompile.fixedpoint import isqrt

Array = np.ndarray
_math = {name: np.vectorize(getattr(math, name), otypes=[float]) for name in ("erf",)}
OPS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "bitand": np.bitwise_and,
    "bitor": np.bitwise_or,
    "bitxor": np.bitwise_xor,
    "bitnot": np.bitwise_not,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "pow": np.power,
    "rem": np.fmod,
    "isqrt": isqrt,
    "quotient": np.floor_divide,
    "scale": lambda value, by, offset, shift: (value.astype(np.int64) * by.astype(np.int64) + offset) >> shift,
    "select": np.where,
    "guard": np.where,
    "erf": lambda x: _math["erf"](x).astype(x.dtype),
}
FOLD = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def run(formulas: Formulas, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name."""
    values: dict[str, Array] = {**formulas.constants, **inputs}
    for name, stage in formulas.stages.items():
        values[name] = stage_value(stage, values)
    return {name: values[name] for name in formulas.outputs}


def stage_value(stage: Stage, values: Mapping[str, Array]) -> Array:
    """One tensor."""
    out = np.zeros(stage.shape, np.dtype(stage.dtype))
    for part in stage.parts:
        _part(part, values, out)
    return out


def _part(part: Part, values: Mapping[str, Array], out: Array) -> None:
    every = (*part.axes, *part.inner)
    rank = len(every)
    grid = {
        var: np.arange(var.extent).reshape([-1 if k == at else 1 for k in range(rank)]) for at, var in enumerate(every)
    }
    result: Array | None = None
    if part.body is not None:
        whole = tuple(var.extent for var in every)
        found = np.broadcast_to(_value(part.body, grid, values, None), whole)
        axes = tuple(range(len(part.axes), rank))
        first = start(part.combine, part.body.dtype).value
        result = FOLD[part.combine].reduce(found, axis=axes, dtype=found.dtype, initial=first)
    outer = {
        var: np.arange(var.extent).reshape([-1 if k == at else 1 for k in range(len(part.axes))])
        for at, var in enumerate(part.axes)
    }
    with np.errstate(all="ignore"):
        value = _value(part.finish, outer, values, result)
    shape = tuple(var.extent for var in part.axes)
    where = tuple(np.broadcast_to(_index(each, outer, values, result), shape) for each in part.store)
    out[where] = np.broadcast_to(value, shape)


def _index(index: Sum, grid: Mapping[Var, Array], values: Mapping[str, Array], result: Array | None) -> Any:
    total: Any = index.constant
    for atom, factor in index.terms:
        if isinstance(atom, Var):
            found: Any = grid[atom]
        elif isinstance(atom, Datum):
            found = np.asarray(_value(atom.value, grid, values, result)).astype(np.int64)
        else:
            inner = _index(atom.value, grid, values, result)
            found = inner // atom.divisor if isinstance(atom, Quotient) else inner % atom.divisor
        total = total + found * factor
    return total


def _value(value: Expr, grid: Mapping[Var, Array], values: Mapping[str, Array], result: Array | None) -> Any:
    match value:
        case Const():
            return np.asarray(value.value, np.dtype(value.dtype))
        case Result():
            return result
        case Position():
            return np.asarray(_index(value.index, grid, values, result)).astype(value.dtype)
        case Load():
            source = values[value.tensor]
            index = [
                np.clip(_index(each, grid, values, result), 0, max(extent - 1, 0))  # a guard may hide what is outside
                for each, extent in zip(value.index, source.shape, strict=True)
            ]
            return source[tuple(index)]
        case Call():
            args = [_value(arg, grid, values, result) for arg in value.args]
            with np.errstate(all="ignore"):
                return _call(value, args)


def _call(value: Call, args: list[Any]) -> Any:
    if value.op == "cast":
        return args[0].astype(value.dtype)
    if value.op == "div" and not value.dtype.startswith("float"):
        quotient = np.abs(args[0]) // np.maximum(np.abs(args[1]), 1)
        return (quotient * np.sign(args[0]) * np.sign(args[1])).astype(value.dtype)
    found = (OPS.get(value.op) or getattr(np, value.op))(*args)
    return np.asarray(found).astype(value.dtype, copy=False)
