"""Weights that are rank deficient to rounding lose nothing as two factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lrcompile.graphs.base import Graph
from lrcompile.linop import Dense, densify, low_rank
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten, storage_dtype
from lrcompile.sites import LinearSite


@dataclass(frozen=True)
class ExactLowRank(GraphPass):
    """Write a weight whose numerical rank is below break-even as the product of two factors.

    rewrite:  W  ->  U @ V        where rank(W) < out * in / (out + in)

    What the factors drop is no more than what rounding to the storage format changed in the weight
    before, so nothing that it says is lost.
    """

    name: ClassVar[str] = "exact-low-rank"

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites every rank-deficient weight; others are refused with their rank."""
        return [self._visit(graph, site, context) for site in graph.linear_sites()]

    def _visit(self, graph: Graph, site: LinearSite, context: Context) -> Outcome:
        if site.frozen or not isinstance(site.operator, Dense):
            return Refused(site.name, site.frozen or "not a plain matrix")
        weight = densify(site.operator)
        if min(weight.shape) < 2 * context.align:
            return Refused(site.name, "too small to gain")
        rank, factors = factorise(weight)
        if factors is None:
            return Refused(site.name, f"rank {rank} or more of {min(weight.shape)} is not below break-even")
        dtype = storage_dtype(site.operator)
        graph.replace(site, low_rank(*(factor.to(dtype).contiguous() for factor in factors)))
        return Rewritten(site.name, f"rank {rank}")


def factorise(weight: torch.Tensor) -> tuple[int, tuple[torch.Tensor, torch.Tensor] | None]:
    """The rank of a weight (out, in), and balanced factors in float64 where they are smaller than it."""
    out, into = weight.shape
    size = min(out * into // (out + into) + 16, out, into)
    for part in (weight[:size, :size], weight):  # singular values of a part are never above those of the whole
        rank = rank_at_least(part, float(weight.double().square().sum()))
        if rank * (out + into) >= out * into:
            return rank, None
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = numerical_rank(weight, values)
    if rank * (out + into) >= out * into:
        return rank, None
    root = values[:rank].sqrt()
    return rank, (left[:, :rank] * root, root[:, None] * right[:rank])


def rank_at_least(weight: torch.Tensor, total: float) -> int:
    """A cheap lower bound of :func:`numerical_rank`, from eigenvalues of a Gram matrix.

    Args:
        weight: the weight or a part of it.
        total: squared Frobenius norm of the whole weight.
    """
    wide = weight.double()
    energies = torch.linalg.eigvalsh(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide)
    share = max(rounding(weight.dtype) ** 2, 1e-15 * max(weight.shape))
    return _rank(energies.clamp_min(0).flip(0), share, total)


def numerical_rank(weight: torch.Tensor, values: torch.Tensor) -> int:
    """The smallest rank that keeps all but :func:`rounding` of a weight with these singular values; at least 1."""
    energies = values.square()
    return _rank(energies, rounding(weight.dtype) ** 2, float(energies.sum()))


def _rank(energies: torch.Tensor, share: float, total: float) -> int:
    tails = energies.flip(0).cumsum(0).flip(0)
    return max(int((tails > share * total).sum()), 1)


def rounding(dtype: torch.dtype) -> float:
    """The share of a weight's Frobenius norm that rounding puts there by itself.

    Storing a product changes it by 0.2 to 0.25 eps. Products are accumulated in float32 at best, which adds a few eps
    of that type; float64 leaves room for the noise of the decomposition. (The usual ``max(shape) · eps · σ₁``
    for single values is thousands of times as much, and above σ₁ itself in half precision.)
    """
    return 1e-13 if dtype == torch.float64 else max(torch.finfo(dtype).eps / 2, 5e-7)
