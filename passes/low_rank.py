"""Low-rank factors in the metric of the layer's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompile.errors import UsageError, nearest
from lrcompile.graphs.base import Replacement
from lrcompile.linop import Cost, densify, low_rank
from lrcompile.rewrite import Context, LinearPass, Proposal, storage_dtype
from lrcompile.sites import LinearSite
from lrcompile.spectrum import Spectrum, metric_matrix, sampling_shrink, spectrum

METRICS = ("whitened", "diagonal", "plain")


@dataclass(frozen=True)
class LowRank(LinearPass):
    """Replace a weight by two thin factors, the best of their rank for the calibration inputs.

    rewrite:  W  ->  U @ V        (bias gains (W - U V) E[x])

    Options:
        metric: ``whitened`` (the full second moment of the inputs, SVD-LLM), ``diagonal``
            (ASVD's channel scales) or ``plain`` (Frobenius norm; needs no data).
        shrink: share by which the covariances of different input channels shrink towards zero; at
            least as much as the number of calibration tokens calls for.
        damp: multiple of the mean diagonal added to the moments.
        center: where the layer has a bias, factorise for the deviation from the mean input and
            let the bias carry the rest; exact for the mean.
        alpha: exponent of ASVD's scales.
        min_rank: smallest rank that is proposed, as a multiple of the alignment.
    """

    name: ClassVar[str] = "low-rank"

    metric: Literal["whitened", "diagonal", "plain"] = "whitened"
    shrink: float = 0.0
    damp: float = 1e-5
    center: bool = True
    alpha: float = 0.5
    min_rank: int = 1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"unknown metric '{self.metric}'", where=self.name, hint=nearest(self.metric, METRICS))
        if not (0 <= self.shrink <= 1 and 0 <= self.damp < math.inf and self.min_rank >= 1):
            raise UsageError("shrink lies in 0..1, damp is not negative, min_rank at least 1", where=self.name)
        if not math.isfinite(self.alpha):
            raise UsageError("alpha is a finite number", where=self.name)

    def refuse(self, site: LinearSite, context: Context) -> str:
        """No aligned rank below break-even: any two factors would be larger than the matrix."""
        if not context.ranks(site):
            out, into = site.shape
            return f"no rank that is a multiple of {context.align} is below break-even {out * into / (out + into):.0f}"
        return ""

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        """One proposal for each aligned rank below break-even; factors are made when chosen."""
        analysed = self._analyse(site, context)
        tails = self._errors(site, context, analysed).tolist()
        # without data a plan may be of a model that is larger than memory: what is chosen is decomposed again
        kept = analysed if context.statistics(site) is not None else None
        for rank in context.ranks(site)[self.min_rank - 1 :]:
            yield Proposal(
                (site.name,),
                tails[rank],
                _price(site, rank),
                lambda rank=rank: {site.name: self._build(site, context, kept or self._analyse(site, context), rank)},
                label=f"rank {rank}",
                source=self.name,
                rank=rank,
                tails=tails,
            )

    def _analyse(self, site: LinearSite, context: Context) -> Spectrum:
        moments = context.statistics(site)
        shrink = max(self.shrink, 0.0 if moments is None else sampling_shrink(moments))
        matrix = metric_matrix(
            moments, self.metric, center=self._centered(site), shrink=shrink, damp=self.damp, alpha=self.alpha
        )
        return spectrum(densify(site.operator), matrix)

    def _errors(self, site: LinearSite, context: Context, analysed: Spectrum) -> Tensor:
        """What every rank does to the calibration outputs, whatever metric chose the directions.

        Where that metric is the outputs' own energy, its estimate counts unless the data tell worse.
        """
        moments = context.statistics(site)
        if moments is None:
            return analysed.tails
        measured = analysed.errors(moments.covariance() if self._centered(site) else moments.second())
        return torch.maximum(measured, analysed.tails) if self.metric == "whitened" else measured

    def _centered(self, site: LinearSite) -> bool:
        return self.center and self.metric == "whitened" and all(use.bias is not None for use in site.uses)

    def _build(self, site: LinearSite, context: Context, analysed: Spectrum, rank: int) -> Replacement:
        dtype = storage_dtype(site.operator)
        left, right = (factor.to(dtype).contiguous() for factor in analysed.factors(rank))
        shift: Tensor | None = None
        moments = context.statistics(site)
        if moments is not None and self._centered(site):
            mean = moments.mean()
            stored = left.double() @ (right.double() @ mean)
            shift = (densify(site.operator).double() @ mean - stored).to(dtype)
        return Replacement(low_rank(left, right), shift)


def _price(site: LinearSite, rank: int) -> Cost:
    """Cost of two factors, without making them."""
    values = rank * sum(site.shape)
    return Cost(values, values * storage_dtype(site.operator).itemsize, values * len(site.uses))
