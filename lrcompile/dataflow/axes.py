"""Axes: variables are split where an index divides them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lrcompile.dataflow.expr import with_vars
from lrcompile.dataflow.index import Quotient, Remainder, Sum, Var, of, substitute
from lrcompile.dataflow.stage import Formulas, Part


def refine(formulas: Formulas) -> Formulas:
    """Splits variables where an index divides them, so that all indices become sums."""
    stages = {
        name: replace(stage, parts=tuple(_refine_part(part) for part in stage.parts))
        for name, stage in formulas.stages.items()
    }
    return replace(formulas, stages=stages)


def _refine_part(part: Part) -> Part:
    part = _without_single(part)
    for _ in range(16):
        found = _divided(part)
        if found is None:
            return part
        var, inner = found
        high, low = Var.new(var.extent // inner), Var.new(inner)
        table = {var: of(high) * inner + of(low)}
        part = replace(
            part,
            axes=_replaced(part.axes, var, (high, low)),
            inner=_replaced(part.inner, var, (high, low)),
            store=tuple(substitute(index, table.get) for index in part.store),
            finish=with_vars(part.finish, table),
            body=None if part.body is None else with_vars(part.body, table),
        )
    return part


def _without_single(part: Part) -> Part:
    """Variables with one value are numbers, so that equal indices look equal."""
    table = {var: Sum() for var in (*part.axes, *part.inner) if var.extent == 1}
    return replace(
        part,
        store=tuple(substitute(index, table.get) for index in part.store),
        finish=with_vars(part.finish, table),
        body=None if part.body is None else with_vars(part.body, table),
    )


def _replaced(axes: tuple[Var, ...], var: Var, by: tuple[Var, Var]) -> tuple[Var, ...]:
    return tuple(new for each in axes for new in (by if each == var else (each,)))


def _divided(part: Part) -> tuple[Var, int] | None:
    """A variable that some index divides, and the extent of its lower half."""
    own = {*part.axes, *part.inner}
    for load in part.loads():
        for index in load.index:
            for atom in _opaque(index):
                for var, factor in atom.value.terms:
                    if not isinstance(var, Var) or var not in own or factor <= 0 or atom.divisor % factor:
                        continue
                    inner = atom.divisor // factor
                    if 1 < inner < var.extent and var.extent % inner == 0:
                        return var, inner
    return None


def _opaque(index: Sum) -> Iterator[Quotient | Remainder]:
    for atom, _ in index.terms:
        if isinstance(atom, (Quotient, Remainder)):
            yield from _opaque(atom.value)
            yield atom
