"""Constants that meet constants are multiplied out, where the product is no larger than its factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lrcompile.graphs.base import Graph
from lrcompile.linop import (
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Scaled,
    Select,
    Stack,
    Sum,
    children,
    densify,
    leaves,
    map_leaves,
    simplify,
    tensors,
)
from lrcompile.linop.dense import dtype_of
from lrcompile.linop.tree import map_children
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten
from lrcompile.sites import LinearSite
from lrcompile.windows import site_cost

_PLAIN = (Dense, Diagonal, Identity, Select)
"""Leaves that a stored matrix may take in; codes and sparse matrices would lose what they are for."""


@dataclass(frozen=True)
class Fold(GraphPass):
    """Merge un-merged adapters, scales, norms with fixed statistics, and layers with nothing between them.

    rewrite:  W + s B A  ->  W';    diag(g) W  ->  W';    U V  ->  W'   where W' is no larger than what it replaces

    The product is taken in float64. What would overflow or vanish in the weight's own type is refused, and so is
    a weight that other layers read as well.
    """

    name: ClassVar[str] = "fold"

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites every compound expression that becomes smaller; others are refused with the reason."""
        sites = graph.linear_sites()
        readers = Counter(place for site in sites for place in set(_places(site.operator)))
        outcomes = [self._visit(graph, site, readers) for site in sites if not isinstance(site.operator, Dense)]
        return outcomes or [Refused("graph", "every weight is a plain matrix already")]

    def _visit(self, graph: Graph, site: LinearSite, readers: Counter[int]) -> Outcome:
        if site.frozen:
            return Refused(site.name, site.frozen)
        if any(readers[place] > 1 for place in _places(site.operator)):
            return Refused(site.name, "other layers read its weights, too")
        with torch.no_grad():
            folded = folded_like(site.operator)
        if folded is None:
            return Refused(site.name, f"{site.operator!r}: no product in it is smaller than its factors")
        before, after = site_cost(site), site_cost(site, folded)
        if after.macs > before.macs or after.nbytes > before.nbytes:
            return Refused(site.name, "multiplied out it would be larger")
        reason = _damage(site.operator, folded)
        if reason:
            return Refused(site.name, reason)
        graph.replace(site, folded)
        return Rewritten(site.name, f"{site.operator!r} -> {folded!r}")


def _places(operator: LinearOperator) -> Iterable[int]:
    return (tensor.data_ptr() for _, tensor in tensors(operator) if tensor.ndim > 1)


def folded_like(operator: LinearOperator) -> LinearOperator | None:
    """The expression with all products taken that store no more than their factors; None where there are none."""
    normal = simplify(operator)
    folded = _fold(normal)
    if folded is normal:
        return None
    dtype = dtype_of(operator)
    return map_leaves(folded, lambda leaf: Dense(leaf.weight.to(dtype)) if _wide(leaf, dtype) else leaf)  # type: ignore


def _wide(leaf: LinearOperator, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Dense) and leaf.weight.dtype == torch.float64 != dtype


def _fold(op: LinearOperator) -> LinearOperator:
    """Bottom up; what is multiplied out is held in float64 until the end."""
    match op:
        case Product():
            return _chain(op)
        case Kron():
            return op  # a form of a convolution
        case _:
            op = map_children(op, _fold)
    match op:
        case Scaled(scale=scale, operator=inner):
            return _scaled(scale, inner)
        case Stack(parts=parts) if all(isinstance(part, Dense) for part in parts):
            return _dense(op)
        case Sum() if _foldable(op) and _values(op) >= op.shape[0] * op.shape[1]:
            return _dense(op)
        case _:
            return op


def _dense(op: LinearOperator) -> Dense:
    return Dense(densify(map_leaves(op, _widened)))


def _widened(leaf: LinearOperator) -> LinearOperator:
    match leaf:
        case Dense(weight=weight):
            return Dense(weight.double())
        case Diagonal(values=values):
            return Diagonal(values.double())
        case _:
            return leaf


def _scaled(scale: torch.Tensor, inner: LinearOperator) -> LinearOperator:
    """The scale goes into the left-most stored matrix."""
    match inner:
        case Dense(weight=weight):
            return Dense(weight.double() * scale.double())
        case Diagonal(values=values):
            return Diagonal((values.double() * scale.double()).to(values.dtype))
        case Product(left=Dense() | Diagonal() as left, right=right):
            return Product(_scaled(scale, left), right)
        case _:
            return Scaled(scale, inner)


def _foldable(op: LinearOperator) -> bool:
    below = children(op)
    return all(map(_foldable, below)) and not isinstance(op, Kron) if below else isinstance(op, _PLAIN)


def _values(op: LinearOperator) -> int:
    """Stored numbers of a foldable expression."""
    return sum(tensor.numel() for leaf in leaves(op) for _, tensor in tensors(leaf) if tensor.is_floating_point())


def _chain(op: Product) -> LinearOperator:
    """The cheapest way to multiply neighbours of a chain: each run becomes one matrix, or stays apart."""
    factors = [_fold(factor) for factor in _factors(op)]
    count = len(factors)
    best: dict[tuple[int, int], tuple[int, int]] = {}  # cost of factors i..j, and where to cut; -1: one matrix
    for length in range(1, count + 1):
        for i in range(count - length + 1):
            j = i + length - 1
            best[i, j] = _best(factors, i, j, best)
    cuts = _runs(best, 0, count - 1)
    if len(cuts) == count and all(a is b for a, b in zip(factors, _factors(op), strict=True)):
        return op
    runs = [_run(factors[i : j + 1]) for i, j in cuts]
    result = runs[-1]
    for factor in reversed(runs[:-1]):
        result = Product(factor, result)
    return result


def _factors(op: LinearOperator) -> list[LinearOperator]:
    if isinstance(op, Product):
        return [*_factors(op.left), *_factors(op.right)]
    return [op]


def _best(
    factors: Sequence[LinearOperator], i: int, j: int, best: dict[tuple[int, int], tuple[int, int]]
) -> tuple[int, int]:
    if i == j:
        return _values(factors[i]), -1
    split = min((best[i, k][0] + best[k + 1, j][0], k) for k in range(i, j))
    if all(_foldable(factor) for factor in factors[i : j + 1]):
        whole = factors[i].shape[0] * factors[j].shape[1]
        if whole <= split[0]:
            return whole, -1
    return split


def _runs(best: dict[tuple[int, int], tuple[int, int]], i: int, j: int) -> list[tuple[int, int]]:
    cut = best[i, j][1]
    return [(i, j)] if cut == -1 else [*_runs(best, i, cut), *_runs(best, cut + 1, j)]


def _run(factors: Sequence[LinearOperator]) -> LinearOperator:
    if len(factors) == 1:
        return factors[0]
    matrix = densify(map_leaves(factors[-1], _widened)).double()
    for factor in reversed(factors[:-1]):
        matrix = densify(Product(map_leaves(factor, _widened), Dense(matrix)))
    return Dense(matrix)


def _damage(before: LinearOperator, after: LinearOperator) -> str:
    """Why the folded form is no substitute; empty where only rounding tells them apart."""
    exact = densify(map_leaves(before, _widened)).double()
    found = densify(map_leaves(after, _widened)).double()
    if not bool(found.isfinite().all()):
        return "the product overflows the type of the weights"
    dtype = dtype_of(before)
    noise = torch.finfo(dtype).eps * max(float(exact.norm()), torch.finfo(dtype).tiny)
    if float((found - exact).norm()) > 2 * noise:
        return "the product cannot be held in the type of the weights"
    return ""
