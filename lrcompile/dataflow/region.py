"""Which elements of a tensor a computation reads while some of its variables stand still."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from math import prod

from lrcompile.dataflow.index import Sum, Var, bounds, constant, variables


@dataclass(frozen=True)
class Region:
    """A box of a tensor: where it starts, in terms of the variables that stand still, and its extents."""

    starts: tuple[Sum, ...]
    extents: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.extents)


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return Region(tuple(constant(0) for _ in shape), shape)


def read(index: tuple[Sum, ...], shape: tuple[int, ...], fixed: Set[Var]) -> Region:
    """The box that an access reaches while all variables run but the ``fixed`` ones."""
    starts, extents = [], []
    for each, extent in zip(index, shape, strict=True):
        start, reach = _interval(each, fixed) or (constant(0), extent)
        ends = bounds(start)
        if reach >= extent or ends is None or ends[0] < 0 or ends[1] + reach > extent:
            start, reach = constant(0), extent
        starts.append(start)
        extents.append(reach)
    return Region(tuple(starts), tuple(extents))


def reach(index: tuple[Sum, ...], shape: tuple[int, ...], fixed: Set[Var], extents: Mapping[Var, int]) -> int:
    """How many elements an access may reach where some variables run over other extents than their own."""
    total = 1
    for each, extent in zip(index, shape, strict=True):
        size = 1
        for atom, factor in each.terms:
            if isinstance(atom, Var):
                size += 0 if atom in fixed else abs(factor) * (extents.get(atom, atom.extent) - 1)
            elif not all(var in fixed for var in variables(Sum(((atom, 1),)))) or not bounds(Sum(((atom, 1),))):
                ends = bounds(Sum(((atom, factor),)))
                size = extent if ends is None else size + ends[1] - ends[0]
        total *= min(size, extent)
    return total


def _interval(index: Sum, fixed: Set[Var]) -> tuple[Sum, int] | None:
    start, reach = Sum((), index.constant), 1
    for atom, factor in index.terms:
        free = isinstance(atom, Var) and atom not in fixed
        if not free and all(var in fixed for var in variables(Sum(((atom, 1),)))) and bounds(Sum(((atom, 1),))):
            start = start + Sum(((atom, factor),))
            continue
        ends = bounds(Sum(((atom, factor),)))
        if ends is None:
            return None
        start, reach = start + ends[0], reach + ends[1] - ends[0]
    return start, reach


def union(regions: Iterable[Region], shape: tuple[int, ...]) -> Region:
    """The smallest box around all; where starts cannot be compared it is the whole axis."""
    every = list(dict.fromkeys(regions))
    if len(every) == 1:
        return every[0]
    starts, extents = [], []
    for axis, extent in enumerate(shape):
        gaps = [each.starts[axis] - every[0].starts[axis] for each in every]
        if all(gap.is_constant for gap in gaps):
            low = min(gap.constant for gap in gaps)
            high = max(gap.constant + each.extents[axis] for gap, each in zip(gaps, every, strict=True))
            starts.append(every[0].starts[axis] + low)
            extents.append(high - low)
        else:
            starts.append(constant(0))
            extents.append(extent)
    return Region(tuple(starts), tuple(extents))


def contains(outer: Region, inner: Region) -> bool:
    """Whether a box certainly lies within another."""
    for first, size, start, reach in zip(outer.starts, outer.extents, inner.starts, inner.extents, strict=True):
        gap = start - first
        if not gap.is_constant or gap.constant < 0 or gap.constant + reach > size:
            return False
    return True
