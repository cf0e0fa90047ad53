"""Orders of channels: expressions whose outputs or inputs come in another order, without a step that moves them.

An identity gauge with pivots (:mod:`lrcompile.gauge`) computes its outputs in an order of its own and puts them back
with a ``Select``. Where what follows bears any order, the stored matrices take the ``Select`` over, and it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompile.linop import (
    Dense,
    Identity,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
)


@dataclass(frozen=True, eq=False)
class Region:
    """Values between linear sites that only elementwise operations touch: their channels may come in any order.

    Attributes:
        writers: sites whose outputs they are, in order of execution.
        readers: sites that multiply them.
        size: number of channels.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int

    def rows(self, writer: str) -> slice:
        """Which outputs of a writer may become an identity: every writer has others, so that all can at once."""
        return slice(self.writers.index(writer), None, len(self.writers))


def pivot_rows(regions: Sequence[Region]) -> dict[str, slice]:
    """By site, the outputs that may become an identity whose permutation the neighbours take."""
    return {writer: region.rows(writer) for region in regions for writer in region.writers}


def with_rows(operator: LinearOperator, order: Tensor) -> LinearOperator | None:
    """An expression of the same cost whose output ``k`` is output ``order[k]``; None where there is none."""
    match operator:
        case Dense(weight=weight):
            return Dense(weight[order])
        case Quantized(codes=codes, scale=scale, zero=zero, group=group, bits=bits):
            return Quantized(codes[order], scale[order], None if zero is None else zero[order], group, bits)
        case SemiSparse(values=values, indices=indices, size=size):
            return SemiSparse(values[order], indices[order], size)
        case Product(left=left, right=right):
            moved = with_rows(left, order)
            return None if moved is None else Product(moved, right)
        case _:
            return _inside(operator, lambda one: with_rows(one, order))


def with_columns(operator: LinearOperator, order: Tensor) -> LinearOperator | None:
    """An expression of the same cost that reads input ``order[k]`` as its input ``k``; None where there is none."""
    match operator:
        case Dense(weight=weight):
            return Dense(weight[:, order])
        case Quantized(codes=codes, scale=scale, zero=zero, group=group, bits=bits) if scale.shape[1] == 1:
            return Quantized(codes[:, order], scale, zero, group, bits)
        case SemiSparse(values=values, indices=indices, size=size):
            return SemiSparse(values, inverse(order)[indices.long()].to(indices.dtype), size)
        case Select(indices=indices, size=size):
            return Select(inverse(order)[indices.long()].to(indices.dtype), size)
        case Product(left=left, right=right):
            moved = with_columns(right, order)
            return None if moved is None else Product(left, moved)
        case Stack(parts=stacked):
            parts = _all(with_columns(part, order) for part in stacked)
            return None if parts is None else Stack(parts)
        case _:
            return _inside(operator, lambda one: with_columns(one, order))


def _inside(operator: LinearOperator, move: Callable[[LinearOperator], LinearOperator | None]) -> LinearOperator | None:
    """What moves rows and columns alike: scales and sums."""
    match operator:
        case Scaled(scale=scale, operator=inner):
            moved = move(inner)
            return None if moved is None else Scaled(scale, moved)
        case Sum(terms=terms):
            parts = _all(map(move, terms))
            return None if parts is None else Sum(parts)
        case _:
            return None


def _all(found: Iterable[LinearOperator | None]) -> tuple[LinearOperator, ...] | None:
    """All of them, or None where one is missing."""
    parts: list[LinearOperator] = []
    for part in found:
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order`` (n,)."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), dtype=order.dtype)
    return places


@dataclass(frozen=True, eq=False)
class Pivoted:
    """An identity gauge that puts its outputs in order: ``Select (Identity over rest) right``.

    Attributes:
        pivots: (rank,) int64; output ``pivots[t]`` is the t-th middle value.
        others: (out − rank,) int64; output ``others[t]`` is row t of ``rest``.
        rest: (out − rank, rank) or None where every output is a middle value.
        right: what makes the middle values.
    """

    pivots: Tensor
    others: Tensor
    rest: Tensor | None
    right: LinearOperator

    @classmethod
    def of(cls, operator: LinearOperator) -> Pivoted | None:
        """Reads such an expression; None for any other."""
        match operator:
            case Product(left=Select() as select, right=Product(left=Stack(parts=parts), right=right)):
                places = _places(select)
                match parts:
                    case (Identity(size=rank), Dense(weight=rest)) if places is not None:
                        return cls(places[:rank], places[rank:], rest, right)
            case Product(left=Select() as select, right=right):
                places = _places(select)
                if places is not None:
                    return cls(places, places[:0], None, right)
        return None

    def starting(self, order: Tensor, start: int) -> LinearOperator:
        """The same outputs in another order, without a Select.

        Args:
            order: (out,) int64 with the pivots, in their order, from ``start`` on.
        """
        rank = len(self.pivots)
        if self.rest is None:
            return self.right
        rows = inverse(torch.cat([self.pivots, self.others]))[order] - rank
        parts: list[LinearOperator] = [Identity(rank)]
        if start:
            parts.insert(0, Dense(self.rest[rows[:start]]))
        if start + rank < len(order):
            parts.append(Dense(self.rest[rows[start + rank :]]))
        return Product(Stack(tuple(parts)), self.right)


def _places(select: Select) -> Tensor | None:
    """Where each input of a permutation goes; None where it is no permutation."""
    indices = select.indices.long()
    if len(indices) != select.size or len(indices.unique()) != select.size:
        return None
    return inverse(indices)


def settled(region: Region, operators: Mapping[str, LinearOperator]) -> tuple[Tensor, dict[str, LinearOperator]] | None:
    """An order (size,) of a region's channels in which its writers need no Select, and all operators for it.

    The channel that comes to stand at place ``k`` is ``order[k]``. The first writer's pivots stand in front, the
    others' behind, so that most identities lie at an end. None where no Select would go, or something cannot move.

    Args:
        operators: by site, of all writers and readers.
    """
    pivoted = {name: found for name in region.writers if (found := Pivoted.of(operators[name])) is not None}
    taken = torch.cat([each.pivots for each in pivoted.values()]) if pivoted else torch.empty(0, dtype=torch.long)
    if not pivoted or len(taken.unique()) != len(taken):
        return None
    free = torch.ones(region.size, dtype=torch.bool)
    free[taken] = False
    first, *rest = (each.pivots for each in pivoted.values())
    order = torch.cat([first, free.nonzero()[:, 0], *rest])
    places, found = inverse(order), {}
    for name in region.writers:
        each = pivoted.get(name)
        moved = with_rows(operators[name], order) if each is None else each.starting(order, int(places[each.pivots[0]]))
        if moved is None:
            return None
        found[name] = moved
    for name in region.readers:
        moved = with_columns(found.get(name, operators[name]), order)
        if moved is None:
            return None
        found[name] = moved
    return order, found
