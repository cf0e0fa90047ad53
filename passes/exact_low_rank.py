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

    The rank counts singular values above the rounding noise that the storage format itself puts
    on a matrix of this size, so nothing that the weight says is lost.
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
        out, into = weight.shape
        rank = numerical_rank(weight)
        if rank * (out + into) >= out * into:
            return Refused(site.name, f"rank {rank} of {min(out, into)} is not below break-even")
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        root = values[:rank].sqrt()
        dtype = storage_dtype(site.operator)
        factors = ((left[:, :rank] * root).to(dtype).contiguous(), (root[:, None] * right[:rank]).to(dtype).contiguous())
        graph.replace(site, low_rank(*factors))
        return Rewritten(site.name, f"rank {rank}")


def numerical_rank(weight: torch.Tensor) -> int:
    """Singular values above ``max(shape) · eps · σ₁`` of the weight's own dtype.

    Counted on the eigenvalues of the Gram matrix in float64, whose own noise (1e-13 of the largest,
    3e-7 in singular values) is the floor for float64 weights.
    """
    wide = weight.double()
    eps = max(torch.finfo(weight.dtype).eps, 1e-14) * max(weight.shape)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    energies = torch.linalg.eigvalsh(gram)
    largest = float(energies[-1])
    if largest <= 0:
        return 0
    return int((energies > largest * max(eps * eps, 1e-13)).sum())
