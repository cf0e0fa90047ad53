"""Index arithmetic: sums of loop variables with integer factors, kept in one normal form.

Shapes are static, so every variable has a known range and most divisions that reshapes bring can be
carried out: ``(64 n + c) // 16`` with ``c < 16`` is ``4 n``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

_COUNTER = itertools.count()


@dataclass(frozen=True, slots=True)
class Var:
    """A loop variable; it runs from 0 to its extent, which whoever iterates knows."""

    number: int
    extent: int

    @staticmethod
    def new(extent: int) -> Var:
        return Var(next(_COUNTER), extent)

    def __repr__(self) -> str:
        return f"v{self.number}"


@dataclass(frozen=True, slots=True)
class Quotient:
    """``value // divisor``, rounded down, where it could not be carried out."""

    value: Sum
    divisor: int


@dataclass(frozen=True, slots=True)
class Remainder:
    """``value % divisor``, never negative, where it could not be carried out."""

    value: Sum
    divisor: int


@dataclass(frozen=True, slots=True)
class Sum:
    """``constant + Σ factor · atom``; an atom is a variable, a quotient, a remainder or a value that data decide."""

    terms: tuple[tuple[Any, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Sum | int) -> Sum:
        if isinstance(other, int):
            return Sum(self.terms, self.constant + other) if other else self
        if not other.terms:
            return self + other.constant
        if not self.terms:
            return other + self.constant
        merged = dict(self.terms)
        for atom, factor in other.terms:
            merged[atom] = merged.get(atom, 0) + factor
        return Sum(_ordered(merged), self.constant + other.constant)

    def __mul__(self, factor: int) -> Sum:
        if factor == 1:
            return self
        if factor == 0:
            return Sum()
        return Sum(tuple((atom, each * factor) for atom, each in self.terms), self.constant * factor)

    def __sub__(self, other: Sum | int) -> Sum:
        return self + (-other if isinstance(other, int) else other * -1)

    def __floordiv__(self, divisor: int) -> Sum:
        return _divide(self, divisor)

    def __mod__(self, divisor: int) -> Sum:
        return _modulo(self, divisor)

    @property
    def is_constant(self) -> bool:
        return not self.terms

    @property
    def variable(self) -> Var | None:
        """The variable, where the sum is nothing else."""
        if len(self.terms) == 1 and self.constant == 0 and self.terms[0][1] == 1 and isinstance(self.terms[0][0], Var):
            return self.terms[0][0]
        return None


def constant(value: int) -> Sum:
    """The sum that is one number."""
    return Sum((), int(value))


def of(atom: Any) -> Sum:
    """The sum that is one atom."""
    return Sum(((atom, 1),))


def _key(atom: Any) -> tuple:
    return (0, atom.number) if isinstance(atom, Var) else (1, repr(atom))


def _ordered(terms: Mapping[Any, int]) -> tuple[tuple[Any, int], ...]:
    kept = [(atom, factor) for atom, factor in terms.items() if factor]
    if len(kept) > 1:
        kept.sort(key=lambda term: _key(term[0]))
    return tuple(kept)


def variables(index: Sum) -> Iterator[Var]:
    """All variables of an index, also those inside quotients; not those of data."""
    for atom, _ in index.terms:
        if isinstance(atom, Var):
            yield atom
        elif isinstance(atom, (Quotient, Remainder)):
            yield from variables(atom.value)


def bounds(index: Sum) -> tuple[int, int] | None:
    """Least and greatest value, or None where data decide."""
    low = high = index.constant
    for atom, factor in index.terms:
        inner = _atom_bounds(atom)
        if inner is None:
            return None
        ends = inner[0] * factor, inner[1] * factor
        low += min(ends)
        high += max(ends)
    return low, high


def _atom_bounds(atom: Any) -> tuple[int, int] | None:
    if isinstance(atom, Var):
        return 0, atom.extent - 1
    if not isinstance(atom, (Quotient, Remainder)):
        return None
    inner = bounds(atom.value)
    if isinstance(atom, Remainder):
        return 0, atom.divisor - 1
    return None if inner is None else (inner[0] // atom.divisor, inner[1] // atom.divisor)


def _split(index: Sum, divisor: int) -> tuple[Sum, Sum]:
    """Multiples of the divisor (already divided), and the rest with a constant below the divisor."""
    whole = [(atom, factor // divisor) for atom, factor in index.terms if factor % divisor == 0]
    rest = [(atom, factor) for atom, factor in index.terms if factor % divisor]
    return Sum(tuple(whole), index.constant // divisor), Sum(tuple(rest), index.constant % divisor)


def _divide(index: Sum, divisor: int) -> Sum:
    if divisor == 1:
        return index
    whole, rest = _split(index, divisor)
    inner = bounds(rest)
    if inner is not None and inner[0] // divisor == inner[1] // divisor:
        return whole + inner[0] // divisor
    common = reduce(gcd, (factor for _, factor in rest.terms), divisor)
    if common > 1:
        rest = Sum(tuple((atom, factor // common) for atom, factor in rest.terms), rest.constant // common)
        divisor //= common
        if divisor == 1:
            return whole + rest
        return whole + _divide(rest, divisor)
    nested = rest.terms[0][0] if len(rest.terms) == 1 and rest.terms[0][1] == 1 and rest.constant == 0 else None
    if isinstance(nested, Quotient):
        return whole + _divide(nested.value, nested.divisor * divisor)
    return whole + of(Quotient(rest, divisor))


def _modulo(index: Sum, divisor: int) -> Sum:
    if divisor == 1:
        return Sum()
    _, rest = _split(index, divisor)
    inner = bounds(rest)
    if inner is not None and inner[0] // divisor == inner[1] // divisor:
        return rest - (inner[0] // divisor) * divisor
    common = reduce(gcd, (factor for _, factor in rest.terms), divisor)
    if common > 1:
        offset = rest.constant % common
        inside = Sum(tuple((atom, factor // common) for atom, factor in rest.terms), rest.constant // common)
        return _modulo(inside, divisor // common) * common + offset
    return of(Remainder(rest, divisor))


def substitute(index: Sum, value: Callable[[Any], Sum | None]) -> Sum:
    """Replaces atoms for which ``value`` has an answer, and normalises again."""
    if all(isinstance(atom, Var) and value(atom) is None for atom, _ in index.terms):
        return index
    result = Sum((), index.constant)
    for atom, factor in index.terms:
        new = value(atom)
        if new is None and isinstance(atom, (Quotient, Remainder)):
            inner = substitute(atom.value, value)
            new = inner // atom.divisor if isinstance(atom, Quotient) else inner % atom.divisor
        result = result + (of(atom) if new is None else new) * factor
    return result


def flatten(index: tuple[Sum, ...], shape: tuple[int, ...]) -> Sum:
    """The position in C order."""
    result = Sum()
    for each, extent in zip(index, shape, strict=True):
        result = result * extent + each
    return result


def unflatten(position: Sum, shape: tuple[int, ...]) -> tuple[Sum, ...]:
    """The index of a position in C order."""
    index = []
    for axis in reversed(range(len(shape))):
        extent = shape[axis]
        index.append(position % extent if axis else position)
        position = position // extent
    return tuple(reversed(index))
