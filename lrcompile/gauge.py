"""The identity gauge: a product of rank r stored in r² fewer values, whatever its rank.

The factors of ``U V`` are free up to an invertible r×r matrix, ``U V = (U G)(G⁻¹ V)``. Spent on making r rows of the
left factor the identity, it saves their storage and their multiplications: those outputs *are* the middle value
(pivoting factorisation, arXiv 2501.19090; interpolative decomposition). Which rows decides the rounding:

* a contiguous window of rows needs no permutation, so it runs as two products and a concatenation (three, where it
  lies inside); its coefficients reach hundreds, which float32 bears and half precision does not;
* pivots keep the coefficients near 2, and need a Gather that puts the outputs in order, or neighbours that take
  them in the order in which they come (:mod:`lrcompile.order`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.linop import Dense, Identity, LinearOperator, Product, Select, Stack, index_dtype
from lrcompile.order import inverse

COPY = 16
"""Multiply–accumulates that putting one output together costs: a gauge that saves less only makes a layer slower."""
WINDOWS = 24
"""Places inside that a window is tried at."""
ROUNDING = 1e-4
"""Largest coefficient of a window times the spacing of the stored type: beyond, pivots are taken."""


ALL = slice(None)


def identity_gauge(left: Tensor, right: Tensor, dtype: torch.dtype, rows: slice = ALL) -> LinearOperator:
    """``left @ right`` with r rows of the left factor the identity.

    Args:
        left: (out, rank) of full column rank.
        right: (rank, in).
        dtype: that the factors are stored in; decides which rows are safe.
        rows: of ``left``, at least ``rank`` of them, that pivots are taken of.
    """
    left, right = left.double(), right.double()
    if permuted(dtype):
        return _pivoted(left, right, dtype, rows)
    last = left.shape[0] - left.shape[1]
    between = {round(place * last / (WINDOWS + 1)) for place in range(1, WINDOWS + 1)}
    for starts in ({0, last}, between):  # at an end there is one product less
        start, growth = best_window(left, sorted(starts))
        if growth * torch.finfo(dtype).eps <= ROUNDING:
            return _window(left, right, start, dtype)
    return _pivoted(left, right, dtype, rows)


def leading(left: Tensor, right: Tensor, dtype: torch.dtype) -> LinearOperator:
    """The same with the first rows the identity, whatever that does to rounding: its structure is what is wanted."""
    return _window(left.double(), right.double(), 0, dtype)


def best_window(left: Tensor, starts: Sequence[int]) -> tuple[int, float]:
    """First row of the window with the smallest coefficients, and the largest of these; inf where none is regular."""
    rank = left.shape[1]
    growths = [float(_coefficients(left, slice(start, start + rank)).abs().max()) for start in starts]
    best = min(range(len(starts)), key=growths.__getitem__)
    return starts[best], growths[best]


def _coefficients(left: Tensor, rows: slice | Tensor) -> Tensor:
    """``left @ left[rows]⁻¹``; infinite where that block is singular."""
    solved, failed = torch.linalg.solve_ex(left[rows], left, left=False)
    return torch.full_like(left, torch.inf) if failed or not solved.isfinite().all() else solved


def _window(left: Tensor, right: Tensor, start: int, dtype: torch.dtype) -> LinearOperator:
    out, rank = left.shape
    coefficients = _coefficients(left, slice(start, start + rank))
    parts: list[LinearOperator] = [Identity(rank)]
    if start:
        parts.insert(0, Dense(coefficients[:start].to(dtype).contiguous()))
    if start + rank < out:
        parts.append(Dense(coefficients[start + rank :].to(dtype).contiguous()))
    middle = Dense((left[start : start + rank] @ right).to(dtype).contiguous())
    return Product(Stack(tuple(parts)) if len(parts) > 1 else parts[0], middle)


def _pivoted(left: Tensor, right: Tensor, dtype: torch.dtype, rows: slice) -> LinearOperator:
    from scipy.linalg import qr

    out, rank = left.shape
    *_, places = qr(left[rows].T.numpy(), mode="r", pivoting=True)
    pivots = torch.arange(out)[rows][torch.from_numpy(places[:rank]).long()].sort().values
    others = torch.ones(out, dtype=torch.bool)
    others[pivots] = False
    rest = others.nonzero()[:, 0]
    middle = Dense((left[pivots] @ right).to(dtype).contiguous())
    if not len(rest):
        return Product(_putting(pivots), middle)
    # A pseudo-inverse, since factors of a weight of smaller rank have no r independent rows.
    below = Dense((left[rest] @ torch.linalg.pinv(left[pivots], rtol=1e-12)).to(dtype).contiguous())
    stacked = Product(Stack((Identity(rank), below)), middle)
    return Product(_putting(torch.cat([pivots, rest])), stacked)


def _putting(order: Tensor) -> Select:
    """Puts what comes in an order of rows where it belongs."""
    return Select(inverse(order).to(index_dtype(len(order))), len(order))


def permuted(dtype: torch.dtype) -> bool:
    """Whether factors stored in ``dtype`` always need pivots: no window is safe, since the identity itself is not."""
    return torch.finfo(dtype).eps > ROUNDING
