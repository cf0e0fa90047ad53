"""Kernels of several places as two or three smaller convolutions, in the metric of the patches that they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompile.errors import UsageError, nearest
from lrcompile.graphs.base import Replacement
from lrcompile.linop import Dense, Identity, Kron, LinearOperator, Product, densify
from lrcompile.rewrite import Context, LinearPass, Proposal, storage_dtype
from lrcompile.sites import LinearSite
from lrcompile.spectrum import Spectrum, metric_matrix, sampling_shrink, spectrum
from lrcompile.windows import site_cost

FORMS = ("all", "channel", "spatial", "tucker")
SHARES = (0.75, 0.5, 0.35, 0.2)
"""Shares of the channels that the inner convolution keeps."""


@dataclass(frozen=True)
class ConvLowRank(LinearPass):
    """Replace a wide convolution by a 1×1 one before it, by a tall and a wide one, or by one between two 1×1 ones.

    rewrite:  conv(W, k×k)  ->  conv(U, k×k) conv(V, 1×1)                     channel
                            ->  conv(U, 1×k) conv(V, k×1)                     spatial  (Jaderberg, arXiv 1405.3866)
                            ->  conv(L, 1×1) conv(C, k×k) conv(V, 1×1)        tucker   (Kim, arXiv 1511.06530)

    ``V`` is the best for the channels' own second moments; what follows it is then refitted exactly in the full
    moments of the patches. (A k×k convolution to few channels with a 1×1 one behind it is what ``low-rank`` gives.)

    Options:
        form: one of the three, or ``all``; the allocator decides.
        damp: multiple of the mean diagonal added to the moments.
    """

    name: ClassVar[str] = "conv-low-rank"

    form: Literal["all", "channel", "spatial", "tucker"] = "all"
    damp: float = 1e-5

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"unknown form '{self.form}'", where=self.name, hint=nearest(self.form, FORMS))
        if not 0 <= self.damp < float("inf"):
            raise UsageError("damp is not negative", where=self.name)

    def concerns(self, site: LinearSite) -> bool:
        """Only kernels of several places."""
        return site.window is not None and site.window.places > 1

    def refuse(self, site: LinearSite, context: Context) -> str:
        """Codes and expressions stay what they are."""
        return "" if isinstance(site.operator, Dense) else f"{self.name}: not a plain kernel"

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        """A few sizes of each form; what is built is computed when it is chosen."""
        if site.window is None:
            return
        window = site.window
        fast = {"channel": window.places, "tucker": window.places}
        if window.rank > 1 and 1 < window.kernel[-1] < window.places:
            fast["spatial"] = window.kernel[-1]
        for places in dict.fromkeys(fast.values()):
            forms = [form for form, size in fast.items() if size == places and self.form in ("all", form)]
            inner = site.shape[1] // places
            sizes = [(form, ranks) for form in forms for ranks in _sizes(form, inner, site.shape[0], context.align)]
            if sizes:
                fit = _Fit.of(self, site, context, places, max(ranks[0] for _, ranks in sizes))
                for form, ranks in sizes:
                    yield self._proposal(form, site, context, fit, ranks)

    def _proposal(self, form: str, site: LinearSite, context: Context, fit: _Fit, ranks: tuple[int, ...]) -> Proposal:
        new, matrix = _replacement(site, fit, ranks)
        # the moments that a form was fitted to are damped: what the data tell counts where it is worse
        error = max(fit.error(*ranks), context.error(site, Dense(matrix), new.shift))
        places = fit.places

        def build() -> dict[str, Replacement]:  # moments of patches are large: nothing of a fit is kept
            return {site.name: _replacement(site, _Fit.of(self, site, context, places, ranks[0]), ranks)[0]}

        label = f"{form} {'×'.join(map(str, ranks))}"
        cost = site_cost(site, new.operator)
        return Proposal((site.name,), error, cost, build, label=label, source=self.name, rank=ranks[0])


def _replacement(site: LinearSite, fit: _Fit, ranks: tuple[int, ...]) -> tuple[Replacement, Tensor]:
    """What stands for a kernel, and its matrix."""
    held = storage_dtype(site.operator)
    factors = [factor.to(held).contiguous() for factor in fit.factors(*ranks)]
    operator, matrix = _expression(fit.places, *factors), _matrix(fit.places, *(factor.double() for factor in factors))
    if fit.mean is None:
        return Replacement(operator), matrix
    lost = (densify(site.operator).double() - matrix) @ fit.mean
    return Replacement(operator, lost.to(held)), matrix


def _matrix(places: int, *factors: Tensor) -> Tensor:
    """The matrix of :func:`_expression`, channel by channel: ``Kron`` alone would be many times larger."""
    *outer, right = factors
    left = outer[0] if len(outer) == 1 else outer[0] @ outer[1]
    split = left.reshape(len(left), len(right), places).mT @ right  # (out, places, in)
    return split.mT.reshape(len(left), -1)


def _expression(places: int, *factors: Tensor) -> LinearOperator:
    """Factors from the left to the right; the right-most one acts on channels at each of ``places`` places."""
    operator: LinearOperator = Kron(Dense(factors[-1]), Identity(places))
    for factor in reversed(factors[:-1]):
        operator = Product(Dense(factor), operator)
    return operator


def _sizes(form: str, inner: int, out: int, align: int) -> list[tuple[int, ...]]:
    """Aligned ranks below the channels, the largest first."""

    def rank(channels: int, share: float) -> int:
        return max(align, int(share * channels / align + 0.5) * align)

    pairs = [(rank(inner, share), rank(out, share)) for share in SHARES]
    if form != "tucker":
        return [(r,) for r in dict.fromkeys(r for r, _ in pairs) if r < inner]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] < inner and pair[1] < out]


@dataclass(frozen=True, eq=False)
class _Fit:
    """One kernel (out, inner * places) and the moments of its patches, float64."""

    weight: Tensor  # in a basis of the outputs in which all of them matter alike
    outer: Tensor | None  # lower Cholesky factor of what an error at the outputs matters
    metric: Tensor | None  # (inner * places, inner * places)
    channels: Spectrum  # of the kernel unfolded to (out * places, inner)
    places: int
    mean: Tensor | None
    largest: int  # rank that will be asked for

    @classmethod
    def of(cls, each: ConvLowRank, site: LinearSite, context: Context, places: int, largest: int) -> _Fit:
        weight = densify(site.operator).double()
        moments = context.statistics(site)
        center = moments is not None and all(use.bias is not None for use in site.uses)
        shrink = 0.0 if moments is None else sampling_shrink(moments)
        metric = metric_matrix(moments, "whitened", center=center, shrink=shrink, damp=each.damp, alpha=0.5)
        outer = _root(context.importance(site))
        weight = weight if outer is None else outer.T @ weight
        inner = weight.shape[1] // places
        unfolded = weight.reshape(len(weight), inner, places).movedim(1, -1).reshape(-1, inner)
        own = None if metric is None else torch.einsum("ipjp->ij", metric.reshape(inner, places, inner, places))
        mean = moments.mean() if moments is not None and center else None
        return cls(weight, outer, metric, spectrum(unfolded, own), places, mean, largest)

    @property
    def inner(self) -> int:
        return self.weight.shape[1] // self.places

    def factors(self, rank: int, outer: int | None = None) -> tuple[Tensor, ...]:
        """(left, V), or (left, core, V) where the outputs are cut to ``outer`` channels as well."""
        root, handed, right = self._leading(rank)
        left = torch.linalg.solve_triangular(root.T, handed, upper=True).T
        if outer is None:
            return self._plain(left), right
        vectors = _outputs(handed)[1][:, :outer]
        return self._plain(vectors), vectors.T @ left, right

    def _plain(self, left: Tensor) -> Tensor:
        """A left factor in the basis that the outputs really have."""
        return left if self.outer is None else torch.linalg.solve_triangular(self.outer.T, left, upper=True)

    def error(self, rank: int, outer: int | None = None) -> float:
        """``tr[G (W − Ŵ) H (W − Ŵ)ᵀ]``; G is what the outputs matter."""
        values = _outputs(self._leading(rank)[1])[0]
        return max(self._whole - float(values[:outer].sum()), 0.0)

    def _leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``L``, ``L⁻¹ K H Wᵀ`` and V of a rank, where ``L Lᵀ`` is the energy ``K H Kᵀ`` of what V hands on.

        The directions of a rank are the first ones of every larger rank, and so are these matrices.
        """
        root, handed, right = self._refitted
        return root[: rank * self.places, : rank * self.places], handed[: rank * self.places], right[:rank]

    @cached_property
    def _refitted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the largest rank."""
        right = self.channels.factors(self.largest)[1].double()
        handed = self._through(right, self.weight.T if self.metric is None else self.metric @ self.weight.T)
        if self.metric is None:
            energy = torch.kron((right @ right.T).contiguous(), torch.eye(self.places, dtype=torch.float64))
        else:
            energy = self._through(right, self._through(right, self.metric).T)
        root = _cholesky(energy)
        return root, torch.linalg.solve_triangular(root, handed, upper=False), right

    @cached_property
    def _whole(self) -> float:
        whole = self.weight if self.metric is None else self.weight @ self.metric
        return float((whole * self.weight).sum())

    def _through(self, right: Tensor, columns: Tensor) -> Tensor:
        """``Kron(V, I) @ columns``."""
        return (right @ columns.reshape(self.inner, -1)).reshape(len(right) * self.places, -1)


def _cholesky(energy: Tensor) -> Tensor:
    """The lower factor of a matrix that may be singular to rounding."""
    jitter = 1e-12 * float(energy.diagonal().mean()) or 1.0
    while True:
        energy.diagonal().add_(jitter)
        root, failed = torch.linalg.cholesky_ex(energy)
        if not failed:
            return root
        jitter *= 10


def _root(matrix: Tensor | None) -> Tensor | None:
    """The lower Cholesky factor of a matrix that may be singular."""
    if matrix is None:
        return None
    jitter = 1e-9 * float(matrix.diagonal().mean()) or 1.0
    return torch.linalg.cholesky(matrix + jitter * torch.eye(len(matrix), dtype=matrix.dtype))


def _outputs(handed: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and directions of the outputs, the largest first, signed by their largest entry."""
    values, vectors = torch.linalg.eigh(handed.T @ handed)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    top = vectors.abs().argmax(dim=0)
    return values, vectors * torch.where(vectors.gather(0, top[None])[0] < 0, -1.0, 1.0)
