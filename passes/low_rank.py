"""Low-rank factors in the metric of the layer's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompile.errors import UsageError, nearest
from lrcompile.gauge import identity_gauge, permuted
from lrcompile.graphs.base import Replacement
from lrcompile.linop import Cost, densify, index_dtype, low_rank
from lrcompile.rewrite import Context, LinearPass, Proposal, storage_dtype
from lrcompile.sites import LinearSite
from lrcompile.spectrum import Spectrum, metric_matrix, sampling_shrink, spectrum

COPY = 16
"""Multiply–accumulates that putting one output together costs: a gauge that saves less only makes a layer slower."""

METRICS = ("whitened", "diagonal", "plain")


@dataclass(frozen=True)
class LowRank(LinearPass):
    """Replace a weight by two thin factors, the best of their rank for the calibration inputs.

    rewrite:  W  ->  U @ V        (bias gains (W - U V) E[x])

    Options:
        metric: ``whitened`` (the full second moment of the inputs, SVD-LLM), ``diagonal``
            (ASVD's channel scales) or ``plain`` (Frobenius norm; needs no data).
        shrink: share by which the covariances of different input channels shrink towards zero. None: as
            much as the number of calibration tokens calls for.
        damp: multiple of the mean diagonal added to the moments.
        center: where the layer has a bias, factorise for the deviation from the mean input and
            let the bias carry the rest; exact for the mean.
        gauge: offer factors in the identity gauge too, which store r² fewer values, where no permutation is
            needed: not for weights of half precision.
        permute: offer it to those as well, with a Gather of the outputs; small, but often slower than dense.
        two_sided: weigh output channels by what they do to the model's outputs, where gradients are known.
        alpha: exponent of ASVD's scales.
        min_rank: smallest rank that is proposed, as a multiple of the alignment.
    """

    name: ClassVar[str] = "low-rank"

    metric: Literal["whitened", "diagonal", "plain"] = "whitened"
    shrink: float | None = None
    damp: float = 1e-5
    center: bool = True
    two_sided: bool = True
    gauge: bool = True
    permute: bool = False
    alpha: float = 0.5
    min_rank: int = 1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"unknown metric '{self.metric}'", where=self.name, hint=nearest(self.metric, METRICS))
        if not (0 <= (self.shrink or 0.0) <= 1 and 0 <= self.damp < math.inf and self.min_rank >= 1):
            raise UsageError("shrink lies in 0..1, damp is not negative, min_rank at least 1", where=self.name)
        if not math.isfinite(self.alpha):
            raise UsageError("alpha is a finite number", where=self.name)

    def refuse(self, site: LinearSite, context: Context) -> str:
        """No aligned rank below break-even: any two factors would be larger than the matrix."""
        if next(self._forms(site, context), None) is None:
            out, into = site.shape
            if context.ranks(site):
                return f"every rank that is cheaper is below min_rank {self.min_rank}"
            return f"no rank that is a multiple of {context.align} is below break-even {out * into / (out + into):.0f}"
        return ""

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        """One proposal for each aligned rank below break-even; factors are made when chosen."""
        analysed = self._analyse(site, context)
        tails = self._errors(site, context, analysed).tolist()
        # without data a plan may be of a model that is larger than memory: what is chosen is decomposed again
        kept = analysed if context.statistics(site) is not None else None
        for rank, gauged in self._forms(site, context):
            yield self._proposal(site, context, kept, tails, rank, gauged)

    def _forms(self, site: LinearSite, context: Context) -> Iterator[tuple[int, bool]]:
        """Ranks, and whether in the identity gauge."""
        least = self.min_rank * context.align
        yield from ((rank, False) for rank in context.ranks(site) if rank >= least)
        if self.gauge and (self.permute or not permuted(storage_dtype(site.operator))):
            ranks = context.ranks(site, gauged=True)
            yield from ((rank, True) for rank in ranks if rank >= least and rank * rank >= COPY * site.shape[0])

    def _proposal(
        self, site: LinearSite, context: Context, kept: Spectrum | None, tails: list[float], rank: int, gauged: bool
    ) -> Proposal:
        return Proposal(
            (site.name,),
            tails[rank],
            _price(site, rank, gauged),
            lambda: {site.name: self._build(site, context, kept or self._analyse(site, context), rank, gauged)},
            label=f"rank {rank}, identity gauge" if gauged else f"rank {rank}",
            source=self.name,
            rank=rank,
            tails=tails,
            form=self._form(site, gauged),
        )

    def _form(self, site: LinearSite, gauged: bool) -> str:
        if not gauged:
            return ""
        return "permuted gauge" if permuted(storage_dtype(site.operator)) else "gauge"

    def _analyse(self, site: LinearSite, context: Context) -> Spectrum:
        moments = context.statistics(site)
        shrink = self.shrink
        if shrink is None:
            shrink = 0.0 if moments is None else sampling_shrink(moments)
        matrix = metric_matrix(
            moments, self.metric, center=self._centered(site), shrink=shrink, damp=self.damp, alpha=self.alpha
        )
        outer = context.importance(site) if self.two_sided and self.metric == "whitened" else None
        return spectrum(densify(site.operator), matrix, outer)

    def _errors(self, site: LinearSite, context: Context, analysed: Spectrum) -> Tensor:
        """What every rank does to the calibration outputs, whatever metric chose the directions.

        Where that metric is the outputs' own energy, its estimate counts unless the data tell worse.
        """
        moments = context.statistics(site)
        if moments is None:
            return analysed.tails
        outer = context.importance(site)
        measured = analysed.errors(moments.covariance() if self._centered(site) else moments.second(), outer)
        own = self.metric == "whitened" and (self.two_sided or outer is None)
        return torch.maximum(measured, analysed.tails) if own else measured

    def _centered(self, site: LinearSite) -> bool:
        return self.center and self.metric == "whitened" and all(use.bias is not None for use in site.uses)

    def _build(self, site: LinearSite, context: Context, analysed: Spectrum, rank: int, gauged: bool) -> Replacement:
        dtype = storage_dtype(site.operator)
        factors = analysed.factors(rank)
        operator = identity_gauge(*factors, dtype) if gauged else low_rank(*(f.to(dtype).contiguous() for f in factors))
        shift: Tensor | None = None
        moments = context.statistics(site)
        if moments is not None and self._centered(site):
            mean = moments.mean()
            stored = densify(operator).double() @ mean
            shift = (densify(site.operator).double() @ mean - stored).to(dtype)
        return Replacement(operator, shift)


def _price(site: LinearSite, rank: int, gauged: bool) -> Cost:
    """Cost of two factors, without making them."""
    out, into = site.shape
    values = rank * (out + into - (rank if gauged else 0))
    dtype = storage_dtype(site.operator)
    size = index_dtype(out).itemsize * out if gauged and permuted(dtype) else 0  # of the permutation
    return Cost(values + size / 2, values * dtype.itemsize + size, values * len(site.uses))
