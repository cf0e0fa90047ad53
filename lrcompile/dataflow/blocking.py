"""How many results of a reduction are computed at once, so that an element that was loaded serves several."""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import prod

from lrcompile.dataflow.dot import WIDTH, dot
from lrcompile.dataflow.expr import Call, Load, cost, walk
from lrcompile.dataflow.index import Var, variables
from lrcompile.dataflow.stage import Part

REGISTERS = 28  # of the 32 of the floating-point unit
CORE_REGISTERS = 10  # of the 13 that integers and addresses share
FACTORS = (1, 2, 3, 4, 5, 6, 8)
LOOP = 4.0  # instructions that one turn of the innermost loop costs beside its work
UNROLL = 4


def blocks(part: Part) -> dict[Var, int]:
    """Factors of the axes of a reduction that are computed together."""
    return dict(zip((var for var, _ in _key(part)[0]), _best(*_pattern(part))[0], strict=True))


def work(part: Part) -> float:
    """Instructions of a part, roughly, once for all its elements."""
    finish = cost(part.finish) + 2
    if part.body is None:
        return part.size * (finish + LOOP)
    return part.size * (finish + LOOP / 2 + part.reach * _best(*_pattern(part))[1])


def _key(part: Part) -> tuple[tuple[tuple[Var, int], ...], tuple[frozenset[Var], ...]]:
    axes = tuple((var, var.extent) for var in part.axes if var.extent > 1)
    depends = []
    for each in walk(part.body) if part.body is not None else ():
        if isinstance(each, Load):
            depends.append(frozenset(var for index in each.index for var in variables(index)))
    return axes, tuple(dict.fromkeys(depends))


def _pattern(part: Part) -> tuple[tuple[int, ...], tuple[tuple[bool, ...], ...], float, int, int]:
    """(extents, which load depends on which axis, other operations, extent of the innermost loop, registers)."""
    axes, depends = _key(part)
    table = tuple(tuple(var in each for var, _ in axes) for each in depends)
    assert part.body is not None
    operations = 1 + sum(cost(each) - sum(map(cost, each.args)) for each in walk(part.body) if isinstance(each, Call))
    fused = 1 if isinstance(part.body, Call) and part.body.op == "mul" and part.combine == "add" else 0
    if part.body.dtype not in ("float32", "float64"):
        fused = min(fused, 1)
    innermost = next((var.extent for var in reversed(part.inner) if var.extent > 1), 1)
    registers = REGISTERS if part.body.dtype.startswith("float") else CORE_REGISTERS
    least = max(operations - fused, 1)
    if dot(part) is not None:  # four products are two instructions, a word three loads' worth
        least, innermost = 0.5, max(innermost // WIDTH, 1)
    return tuple(extent for _, extent in axes), table, least, innermost, registers


@lru_cache(maxsize=4096)
def _best(
    extents: tuple[int, ...], table: tuple[tuple[bool, ...], ...], operations: float, innermost: int, registers: int
) -> tuple[tuple[int, ...], float]:
    """(factors of the axes, instructions for one element of the body) at the least cost."""
    fixed = table, operations, innermost, registers
    best = (1,) * len(extents), _cost((1,) * len(extents), extents, *fixed)
    count = len(extents)
    for axes in [*itertools.combinations(range(count), 1), *itertools.combinations(range(count), 2)]:
        for factors in itertools.product(FACTORS[1:], repeat=len(axes)):
            chosen = [1] * count
            for axis, factor in zip(axes, factors, strict=True):
                chosen[axis] = min(factor, extents[axis])
            found = _cost(tuple(chosen), extents, *fixed)
            if found < best[1] - 1e-9:
                best = tuple(chosen), found
    return best


def _cost(
    factors: tuple[int, ...],
    extents: tuple[int, ...],
    table: tuple[tuple[bool, ...], ...],
    operations: float,
    innermost: int,
    registers: int,
) -> float:
    """Per element of the body; axes that a factor does not divide have a rest, which costs more."""
    total = 0.0
    for choice in itertools.product((True, False), repeat=len(factors)):
        used, share = [], 1.0
        for whole, factor, extent in zip(choice, factors, extents, strict=True):
            rest = extent % factor
            used.append(factor if whole else rest)
            share *= (extent - rest) / extent if whole else rest / extent
        if share:
            total += share * _block_cost(used, table, operations, innermost, registers)
    return total


def _block_cost(
    factors: list[int], table: tuple[tuple[bool, ...], ...], operations: float, innermost: int, registers: int
) -> float:
    results = prod(factors)
    loads = sum(prod(f for f, needed in zip(factors, row, strict=True) if needed) for row in table)
    spilled = max(results + loads - registers, 0) * 2
    turns = LOOP / min(UNROLL, max(innermost, 1))
    return operations + (loads + spilled + turns) / results
