"""Columns of a weight kept dense, with low rank for the rest.

A few input channels of a transformer carry most of the energy. A direction of a low-rank product stores a row and a
column for each of them; a column that is kept stores the column alone. Given the kept columns J and any error ``E`` in
the others, the best values of the kept ones make up for it by regression, ``D = W_J + E H_RJ H_JJ⁻¹``, whatever the
metric of the outputs. What is left to minimise is ``tr[G E S Eᵀ]`` with the Schur complement
``S = H_RR − H_RJ H_JJ⁻¹ H_JR``: the problem of :mod:`lrcompile.spectrum` again, with a smaller metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompile.gauge import COPY, permuted
from lrcompile.linop import (
    Cost,
    Dense,
    Identity,
    LinearOperator,
    Product,
    Select,
    Stack,
    densify,
    index_dtype,
)
from lrcompile.spectrum import Spectrum, spectrum

WIDE = 1.5
"""Inputs over outputs from which on columns may stay dense: one costs as much as the outputs, a direction as both."""
KEPT = 1 / 8
"""Share of the columns that do: more of them lose less still, but cost more to pick out than they save."""
GATHER = 400
"""Multiply–accumulates that picking one input channel out costs, in ONNX Runtime on a CPU."""


@dataclass(frozen=True)
class Layout:
    """How a weight (out, into) of a dtype is stored with ``count`` dense columns, and what that costs."""

    out: int
    into: int
    count: int
    dtype: torch.dtype
    gauged: bool

    @classmethod
    def of(cls, shape: tuple[int, int], dtype: torch.dtype, *, align: int, gauged: bool) -> Layout | None:
        """The layout for a shape; None where it is too tall, or too small."""
        out, into = shape
        count = round(KEPT * into / align) * align
        return cls(out, into, count, dtype, gauged) if count and into >= WIDE * out else None

    def ranks(self, align: int, least: int = 1) -> list[int]:
        """Aligned ranks, from ``least`` times the alignment on, that save more work than the moving of values costs."""
        tried = range(least * align, min(self.out, self.into - self.count), align)
        return [rank for rank in tried if self._pays(rank)]

    def _pays(self, rank: int) -> bool:
        if self.gauged and rank * rank < COPY * self.out:
            return False
        moved = rank + self.count + (self.out if self.gauged else 0)
        return self.out * self.into - self.values(rank) > GATHER * self.count + COPY * moved

    def values(self, rank: int) -> int:
        """Stored values, indices left out: as many multiply–accumulates."""
        return rank * self.into + (self.out - (rank if self.gauged else 0)) * (rank + self.count)

    def price(self, rank: int, uses: int) -> Cost:
        """Cost of the expression, without making it."""
        size = self.count * index_dtype(self.into).itemsize
        if self.gauged:
            size += rank * index_dtype(rank + self.count).itemsize
            size += self.out * index_dtype(self.out).itemsize if permuted(self.dtype) else 0
        values = self.values(rank)
        return Cost(values + size / 2, values * self.dtype.itemsize + size, values * uses)


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight (out, in) in two sets of columns, and the analysis of those that are approximated.

    Attributes:
        kept, rest: (c,) and (in − c,) int64, ascending.
        carry: (in − c, c) float64; how the kept columns make up for an error in each of the others.
        analysed: of ``weight[:, rest]`` in the Schur complement; its tails are the errors of the whole.
    """

    weight: Tensor
    kept: Tensor
    rest: Tensor
    carry: Tensor
    analysed: Spectrum

    @property
    def tails(self) -> Tensor:
        """``tails[r]`` is the error of the best approximation with these columns and rank r for the others."""
        return self.analysed.tails

    def errors(self, inner: Tensor, outer: Tensor | None = None) -> Tensor:
        """Errors of the same approximations in other metrics, as :meth:`Spectrum.errors` has them."""
        through = inner.new_zeros(len(self.rest), len(inner))
        through[:, self.rest] = torch.eye(len(self.rest), dtype=inner.dtype)
        through[:, self.kept] = -self.carry
        return self.analysed.errors(through @ inner @ through.T, outer)

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The kept columns (out, c), and factors (out, rank), (rank, in) with zeros at them; float64."""
        left, right = self.analysed.factors(rank)
        weight = self.weight.double()
        wide = right.new_zeros(rank, weight.shape[1])
        wide[:, self.rest] = right
        kept = weight[:, self.kept] + (weight[:, self.rest] - left @ right) @ self.carry
        return kept, left, wide


def loudest(weight: Tensor, inner: Tensor, outer: Tensor | None, count: int) -> Tensor:
    """The columns (count,) of most output energy, ascending.

    Args:
        inner: (in, in) or its diagonal (in,); outer: (out, out).
    """
    wide = weight.double()
    weighted = wide if outer is None else outer @ wide
    score = (inner.diagonal() if inner.ndim == 2 else inner) * (wide * weighted).sum(0)
    return score.topk(count).indices.sort().values


def keeping(weight: Tensor, inner: Tensor, kept: Tensor, outer: Tensor | None = None) -> Columns:
    """Analyses ``weight`` (out, in) with the columns ``kept`` dense, in a metric from :func:`metric_matrix`.

    Args:
        inner: (in, in), positive definite on the kept columns.
    """
    others = torch.ones(weight.shape[1], dtype=torch.bool)
    others[kept] = False
    rest = others.nonzero()[:, 0]
    cross = inner[kept][:, rest]
    carry = torch.linalg.solve(inner[kept][:, kept], cross).T
    schur = inner[rest][:, rest] - carry @ cross
    return Columns(weight, kept, rest, carry, spectrum(weight[:, rest], (schur + schur.T) / 2, outer))


def beside(kept: Tensor, places: Tensor, factors: LinearOperator) -> LinearOperator:
    """A low-rank product with dense columns beside its right factor: ``[U D] [V; Select]``.

    Where the left factor holds an identity, the right one takes over what the columns do to those outputs, so that
    the columns are stored for the other outputs only.

    Args:
        kept: (out, c), the values of the columns.
        places: (c,), where they are.
        factors: as :func:`linop.low_rank` or the identity gauge make them, the right one zero at ``places``.
    """
    match factors:
        case Product(left=Select(indices=indices) as order, right=Product() as inner):  # it puts the outputs in order
            moved = torch.empty_like(kept)
            moved[indices.long()] = kept
            return Product(order, beside(moved, places, inner))
        case Product(left=left, right=Dense(weight=right)):
            return _widened(kept, places, left, right)
        case _:
            raise TypeError(f"{factors!r} is no product of two factors")


def _widened(kept: Tensor, places: Tensor, left: LinearOperator, right: Tensor) -> LinearOperator:
    parts = left.parts if isinstance(left, Stack) else (left,)
    heights = [part.shape[0] for part in parts]
    right, rank, into = right.clone(), *right.shape
    for part, rows in zip(parts, kept.split(heights), strict=True):
        if isinstance(part, Identity):
            right[:, places] = rows.to(right)
    lacking = kept - densify(left).to(kept) @ right[:, places].to(kept)
    width = rank + len(places)
    first = Select(torch.arange(rank, dtype=index_dtype(width)), width)
    wider: list[LinearOperator] = [
        first if isinstance(part, Identity) else Dense(torch.cat([densify(part), rows.to(right)], 1))
        for part, rows in zip(parts, lacking.split(heights), strict=True)
    ]
    read = Stack((Dense(right), Select(places.to(index_dtype(into)), into)))
    return Product(Stack(tuple(wider)) if len(wider) > 1 else wider[0], read)
