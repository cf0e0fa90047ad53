"""The identity gauge: a product of rank r stored in r² fewer values, whatever its rank.

The factors of ``U V`` are free up to an invertible r×r matrix, ``U V = (U G)(G⁻¹ V)``. Spent on making r rows of the
left factor the identity, it saves their storage and their multiplications: those outputs *are* the middle value
(pivoting factorisation, arXiv 2501.19090; interpolative decomposition). Which rows decides the rounding:

* a contiguous window of rows needs no permutation, so it runs as two products and a concatenation (three, where it
  lies inside); its coefficients reach hundreds, which float32 bears and half precision does not;
* pivots keep the coefficients near 2, and need a Gather that puts the outputs in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.linop import Dense, Identity, LinearOperator, Product, Select, Stack, index_dtype

COPY = 16
"""Multiply–accumulates that putting one output together costs: a gauge that saves less only makes a layer slower."""
WINDOWS = 24
"""Places inside that a window is tried at."""
ROUNDING = 1e-4
"""Largest coefficient of a window times the spacing of the stored type: beyond, pivots are taken."""


def identity_gauge(left: Tensor, right: Tensor, dtype: torch.dtype) -> LinearOperator:
    """``left @ right`` with r rows of the left factor the identity.

    Args:
        left: (out, rank) of full column rank.
        right: (rank, in).
        dtype: that the factors are stored in; decides which rows are safe.
    """
    left, right = left.double(), right.double()
    last = left.shape[0] - left.shape[1]
    between = {round(place * last / (WINDOWS + 1)) for place in range(1, WINDOWS + 1)}
    for starts in ({0, last}, between):  # at an end there is one product less
        start, growth = best_window(left, sorted(starts))
        if growth * torch.finfo(dtype).eps <= ROUNDING:
            return _window(left, right, start, dtype)
    return _pivoted(left, right, dtype)


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


def _pivoted(left: Tensor, right: Tensor, dtype: torch.dtype) -> LinearOperator:
    from scipy.linalg import qr

    out, rank = left.shape
    *_, places = qr(left.T.numpy(), mode="r", pivoting=True)
    order = torch.from_numpy(places).long()
    pivots, rest = order[:rank].sort().values, order[rank:].sort().values
    middle = Dense((left[pivots] @ right).to(dtype).contiguous())
    if not len(rest):
        return Product(Select(_inverse(pivots), out), middle)
    # A pseudo-inverse, since factors of a weight of smaller rank have no r independent rows.
    others = Dense((left[rest] @ torch.linalg.pinv(left[pivots], rtol=1e-12)).to(dtype).contiguous())
    stacked = Product(Stack((Identity(rank), others)), middle)
    return Product(Select(_inverse(torch.cat([pivots, rest])), out), stacked)


def _inverse(order: Tensor) -> Tensor:
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places.to(index_dtype(len(order)))


def permuted(dtype: torch.dtype) -> bool:
    """Whether factors stored in ``dtype`` always need pivots: no window is safe, since the identity itself is not."""
    return torch.finfo(dtype).eps > ROUNDING
