"""Low-rank factors in the metric of the layer's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompile.columns import Columns, Layout, beside, keeping, loudest
from lrcompile.errors import UsageError, nearest
from lrcompile.gauge import ALL, COPY, identity_gauge, leading, permuted
from lrcompile.graphs.base import Replacement
from lrcompile.linop import Cost, LinearOperator, densify, index_dtype, low_rank
from lrcompile.rewrite import Context, LinearPass, Proposal, storage_dtype
from lrcompile.sites import LinearSite
from lrcompile.spectrum import Spectrum, metric_matrix, sampling_shrink, spectrum

METRICS = ("whitened", "diagonal", "plain")
GAUGE, PERMUTED = "gauge", "permuted gauge"
"""Storage forms besides two plain factors."""


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
            needed: to weights of half precision only where the next layers can take the outputs in any order.
        permute: offer it to others of those as well, with a Gather of the outputs; small, but often slower than dense.
        columns: where a weight has many more inputs than outputs, offer to keep the columns of most output energy
            dense, and low rank for the others; needs data. At the same size a little better and a little slower,
            since runtimes pick channels out slowly: a latency budget knows what it costs.
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
    columns: bool = False
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
        for rank, form in self._forms(site, context):
            yield self._proposal(site, context, kept, tails, rank, form)
        yield from self._with_columns(site, context)

    def _with_columns(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        """Proposals with dense columns. Their analysis is not held, but made again for what is chosen."""
        layout = self._layout(site, context)
        ranks = [] if layout is None else layout.ranks(context.align, self.min_rank)
        if layout is None or not ranks:
            return
        tails = self._errors(site, context, self._split(site, context, layout)).tolist()
        for rank in ranks:
            yield Proposal(
                (site.name,),
                tails[rank],
                layout.price(rank, len(site.uses)),
                partial(self._widened, site, context, layout, rank),
                label=f"rank {rank}, {layout.count} dense columns{', identity gauge' if layout.gauged else ''}",
                source=self.name,
                rank=rank,
                tails=tails,
                form=" ".join(filter(None, (_gauge(site) if layout.gauged else "", "with columns"))),
            )

    def _layout(self, site: LinearSite, context: Context) -> Layout | None:
        """How the site would be stored with dense columns; None where it is not."""
        whole = site.window is None or site.window.pointwise
        told = context.statistics(site) is not None or context.trial
        fits = whole and told and all(use.role == "apply" for use in site.uses)
        if not (self.columns and self.metric == "whitened" and fits):
            return None
        dtype = storage_dtype(site.operator)
        gauged = self.gauge and (self.permute or not permuted(dtype))
        return Layout.of(site.shape, dtype, align=context.align, gauged=gauged)

    def _split(self, site: LinearSite, context: Context, layout: Layout) -> Columns:
        weight, outer = densify(site.operator), self._outer(site, context)
        inner = self._inner(site, context)
        if inner is None:  # without data, where only the structure counts
            inner = torch.eye(site.shape[1], dtype=torch.float64)
        return keeping(weight, inner, loudest(weight, inner, outer, layout.count), outer)

    def _widened(self, site: LinearSite, context: Context, layout: Layout, rank: int) -> dict[str, Replacement]:
        split = self._split(site, context, layout)
        kept, *factors = split.factors(rank)
        stored = self._stored(site, context, factors[0], factors[1], _gauge(site) if layout.gauged else "")
        return {site.name: self._replacement(site, context, beside(kept, split.kept, stored))}

    def _forms(self, site: LinearSite, context: Context) -> Iterator[tuple[int, str]]:
        """Ranks, and the form that each is stored in; empty: two plain factors."""
        least = self.min_rank * context.align
        yield from ((rank, "") for rank in context.ranks(site) if rank >= least)
        for rank in context.ranks(site, gauged=True) if self.gauge else ():
            form = GAUGE if rank <= _pivots(site, context) else _gauge(site)
            if rank >= least and rank * rank >= COPY * site.shape[0] and (form == GAUGE or self.permute):
                yield rank, form

    def _proposal(
        self, site: LinearSite, context: Context, kept: Spectrum | None, tails: list[float], rank: int, form: str
    ) -> Proposal:
        return Proposal(
            (site.name,),
            tails[rank],
            _price(site, rank, form),
            lambda: {site.name: self._build(site, context, kept or self._analyse(site, context), rank, form)},
            label=f"rank {rank}, identity gauge" if form else f"rank {rank}",
            source=self.name,
            rank=rank,
            tails=tails,
            form=form,
        )

    def _analyse(self, site: LinearSite, context: Context) -> Spectrum:
        return spectrum(densify(site.operator), self._inner(site, context), self._outer(site, context))

    def _inner(self, site: LinearSite, context: Context) -> Tensor | None:
        moments = context.statistics(site)
        shrink = self.shrink
        if shrink is None:
            shrink = 0.0 if moments is None else sampling_shrink(moments)
        return metric_matrix(
            moments, self.metric, center=self._centered(site), shrink=shrink, damp=self.damp, alpha=self.alpha
        )

    def _outer(self, site: LinearSite, context: Context) -> Tensor | None:
        return context.importance(site) if self.two_sided and self.metric == "whitened" else None

    def _errors(self, site: LinearSite, context: Context, analysed: Spectrum | Columns) -> Tensor:
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

    def _build(self, site: LinearSite, context: Context, analysed: Spectrum, rank: int, form: str) -> Replacement:
        return self._replacement(site, context, self._stored(site, context, *analysed.factors(rank), form))

    def _stored(self, site: LinearSite, context: Context, left: Tensor, right: Tensor, form: str) -> LinearOperator:
        dtype, rows = storage_dtype(site.operator), ALL
        if not form:
            return low_rank(left.to(dtype).contiguous(), right.to(dtype).contiguous())
        if form == GAUGE and permuted(dtype):
            if context.trial:
                return leading(left, right, dtype)  # as it stands once its permutation is absorbed
            rows = context.pivots[site.name]
        return identity_gauge(left, right, dtype, rows)

    def _replacement(self, site: LinearSite, context: Context, operator: LinearOperator) -> Replacement:
        shift: Tensor | None = None
        moments = context.statistics(site)
        if moments is not None and self._centered(site):
            mean = moments.mean()
            stored = densify(operator).double() @ mean
            shift = (densify(site.operator).double() @ mean - stored).to(storage_dtype(site.operator))
        return Replacement(operator, shift)


def _gauge(site: LinearSite) -> str:
    """The form of a site's identity gauge where nothing absorbs a permutation."""
    return PERMUTED if permuted(storage_dtype(site.operator)) else GAUGE


def _pivots(site: LinearSite, context: Context) -> int:
    """How many outputs may become an identity at whatever order comes of it."""
    return len(range(*context.pivots.get(site.name, slice(0)).indices(site.shape[0])))


def _price(site: LinearSite, rank: int, form: str) -> Cost:
    """Cost of two factors, without making them."""
    out, into = site.shape
    values = rank * (out + into - (rank if form else 0))
    size = index_dtype(out).itemsize * out if form == PERMUTED else 0
    return Cost(values + size / 2, values * storage_dtype(site.operator).itemsize + size, values * len(site.uses))
