"""Who gets how much: statistics, proposals of all passes, measured scales, the allocator's choice.

What an error at one site does to the outputs is measured, not guessed: each site alone is cut
to a probe, and the change of the outputs over the probe's error energy scales the site's whole
curve. The scales need no gradients, so every graph that runs has them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrcompile import cache
from lrcompile.budget import Budget, quantity
from lrcompile.calibrate import Moments
from lrcompile.choices import Allocation, Choice, Offer, Planned, Pricing, left_out
from lrcompile.curves import Curve, measured, probe_batches
from lrcompile.data import Batches
from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.gauge import permuted
from lrcompile.graphs.base import Graph, Inputs
from lrcompile.linop import Cost
from lrcompile.memory import release
from lrcompile.order import Region, pivot_rows
from lrcompile.progress import Progress, Watched
from lrcompile.rewrite import Context, LinearPass, Proposal, storage_dtype
from lrcompile.samples import Thinned, unmasked
from lrcompile.sites import LinearSite
from lrcompile.sketch import Importance
from lrcompile.windows import site_cost

PROBE_KEEP = 0.6
"""Share of a site's values that a probe keeps."""
PROBE_SAMPLES = 16
GRADIENT_SAMPLES = 48
MAX_TOKENS = 2**15
"""Twenty vectors for each channel of a layer of 1,600: beyond it, statistics cost more than they tell."""


@dataclass(frozen=True)
class Settings:
    """How statistics are taken.

    Args:
        include, exclude: globs on site names.
        probes: measure how much each site matters. None: unless gradients of token logits tell it, where
            probes of many sites take long and add nothing.
        probe_samples: calibration samples that each probe runs on.
        gradient_samples: calibration samples that gradients are taken of; 0 for none.
        max_tokens: vectors per site that statistics are taken of; samples are left out evenly beyond it.
        refine: probe every site a second time at the size that it was given, then allocate again.
        memory: bytes that the Gram matrices of one pass over the data may take.
        align: ranks are multiples of this.
        cache: folder of the statistics cache; None for no cache.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    probes: bool | None = None
    probe_samples: int = PROBE_SAMPLES
    gradient_samples: int = GRADIENT_SAMPLES
    max_tokens: int = MAX_TOKENS
    refine: bool = True
    memory: int = 2**30
    align: int = 8
    seed: int = 0
    cache: Path | None = None


def select(graph: Graph, settings: Settings) -> tuple[list[LinearSite], list[Choice]]:
    """Sites that take part, and those that do not with the reason.

    Raises:
        UsageError: the patterns leave nothing.
    """
    chosen, left = [], []
    for site in graph.linear_sites():
        reason = site.frozen or _unselected(site.name, settings)
        if reason:
            left.append(left_out(graph, site, reason))
        else:
            chosen.append(site)
    if not chosen and left and all("pattern" in choice.reason for choice in left):
        raise UsageError("the patterns select no site", where="--include", hint=f"sites: {left[0].site.name}, …")
    return chosen, left


def _unselected(name: str, settings: Settings) -> str:
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.include):
        return "no --include pattern selects it"
    return "an --exclude pattern takes it out" if any(fnmatch.fnmatchcase(name, p) for p in settings.exclude) else ""


def statistics(
    graph: Graph, sites: Sequence[LinearSite], data: Batches | None, settings: Settings, tell: Progress
) -> Mapping[str, Moments]:
    """Moments of what the sites read, from the cache where they are there already."""
    if data is None or not sites:
        return {}
    inputs = ",".join(sorted({site.input for site in sites}))
    name = cache.key("moments/4", graph.fingerprint(), data.sha256, inputs, str(settings.max_tokens))
    stored = cache.load(name, settings.cache)
    if stored is not None:
        return cache.unpack(*stored)
    thinned = Thinned(data, settings.max_tokens)
    tell(f"calibrating {len(sites)} sites", thinned.batches)
    moments = graph.observe(Watched(thinned, tell), sites, memory=settings.memory)
    cache.store(name, *cache.pack(moments), settings.cache)
    return moments


def importance(
    graph: Graph, sites: Sequence[LinearSite], data: Batches | None, settings: Settings, tell: Progress
) -> tuple[Importance, list[str]]:
    """Moments of the outputs' gradients at what the sites give, and what to tell the user where there are none."""
    if data is None or not sites or not settings.gradient_samples:
        return Importance({}), []
    names = ",".join(site.name for site in sites)
    amounts = f"{settings.gradient_samples} {settings.seed}"
    name = cache.key("gradients/3", graph.fingerprint(), data.sha256, names, amounts)
    stored = cache.load(name, settings.cache)
    if stored is not None:
        return Importance(cache.unpack(*stored), "tokens" in stored[1]), []
    batches = probe_batches(data, settings.gradient_samples)
    tell("differentiating", len(batches))
    try:
        found = graph.gradients(Watched(batches, tell), sites, memory=settings.memory, seed=settings.seed)
    except UnsupportedError as error:
        return Importance({}), [f"{error.message}: errors at a site's output channels count alike"]
    tensors, texts = cache.pack(found.moments)
    cache.store(name, tensors, texts | ({"tokens": ""} if found.tokens else {}), settings.cache)
    return found, []


def plan(
    graph: Graph,
    passes: Sequence[LinearPass],
    budget: Budget,
    data: Batches | None,
    settings: Settings,
    *,
    came: Cost | None = None,
    now: Cost | None = None,
    sample: Inputs | None = None,
    price: Callable[[Sequence[LinearSite], Mapping[str, Offer]], Pricing] | None = None,
    absorbs: bool = False,
    tell: Progress | None = None,
) -> Planned:
    """Chooses an expression for every site under the budget.

    Args:
        came: bytes, and multiply–accumulates on ``sample``, of the whole model as it came.
        now: the same of the model as it stands, after exact rewrites; by default as it came.
        sample: one sample; it gives the number of vectors that each site multiplies.
        price: finds out what everything on offer takes, under a latency budget.
        absorbs: what is chosen gets installed, and then the pass ``absorb`` runs.

    Raises:
        InfeasibleError: the passes offer nothing small enough.
    """
    tell = tell or Progress()
    sites, left = select(graph, settings)
    moments = statistics(graph, sites, data, settings, tell)
    sites, left = _refreeze(graph, sites, left)
    gradients, told = importance(graph, sites, data, settings, tell)
    context = Context(
        graph,
        moments,
        align=settings.align,
        seed=settings.seed,
        gradients=gradients.moments,
        notes=told,
        pivots=free_pivots(graph, sites) if absorbs else {},
    )
    release(now=True)
    tell("decomposing")
    offers = {site.name: _offers(site, passes, context) for site in sites}
    release(now=True)
    probes = data is not None and (not gradients.tokens if settings.probes is None else settings.probes)
    run = _Planning(graph, sites, offers, context, data if probes else None, settings, tell)
    came = came or Cost()
    counts = positions(graph, sites, sample)
    prices = None if price is None else price(sites, offers)
    allocation = Allocation(graph, sites, offers, counts, budget, came, now or came, prices)
    curves = _first_curves(run)

    def choose(reserve: np.ndarray | None = None) -> list[Choice]:
        if not budget.by_drift:
            return allocation.choose(curves, reserve)
        return allocation.smallest(curves, (quantity(budget.drift, "drift") or 0.0) ** 2)

    if probes and settings.refine:
        curves = _refined(run, curves, choose())

    def settled(choices: list[Choice]) -> Planned:
        expected = allocation.expected(choices)
        return Planned(
            [*choices, *left],
            context,
            offers,
            expected,
            again=lambda reserve: settled(choose(reserve)),
            within=lambda loss: settled(allocation.smallest(curves, loss)),
            notes=_notes(sites, context),
            curves=curves,
        )

    return settled(choose())


@dataclass(eq=False)
class _Planning:
    """What the steps of a plan share.

    Attributes:
        data: of the probes; None without any.
    """

    graph: Graph
    sites: Sequence[LinearSite]
    offers: Mapping[str, Offer]
    context: Context
    data: Batches | None
    settings: Settings
    tell: Progress

    def measured(self, probes: Mapping[str, Proposal]) -> dict[str, float]:
        """Change of the outputs by each probe alone."""
        if self.data is None:
            raise UsageError("probes need calibration data")
        samples, where = self.settings.probe_samples, self.settings.cache
        return measured(self.graph, probes, self.data, samples=samples, where=where, tell=self.tell)


def _refreeze(graph: Graph, sites: list[LinearSite], left: list[Choice]) -> tuple[list[LinearSite], list[Choice]]:
    """A module tree learns only from its first run which weights cannot be written back."""
    current = {site.name: site for site in graph.linear_sites()}
    moved = [current[site.name] for site in sites if current[site.name].frozen]
    left = left + [left_out(graph, site, site.frozen) for site in moved]
    return [current[site.name] for site in sites if not current[site.name].frozen], left


def _offers(site: LinearSite, passes: Sequence[LinearPass], context: Context) -> Offer:
    offer = Offer([], [])
    before = site_cost(site)
    for each in filter(lambda each: each.concerns(site), passes):
        reason = each.refuse(site, context)
        if reason:
            offer.reasons.append(reason)
            continue
        found = [p for p in each.proposals(site, context) if p.cost.nbytes < before.nbytes or p.cost.macs < before.macs]
        offer.proposals.extend(found)
        if not found:
            offer.reasons.append(f"{each.name} has nothing smaller to offer")
    return offer


def _first_curves(run: _Planning) -> dict[str, Curve]:
    """Loss of each site's error: measured by probes of one size, else relative to the energy of its output."""
    wanted = [site for site in run.sites if run.offers[site.name].proposals]
    if run.data is None:
        return {site.name: _unprobed(run.context, site) for site in wanted}
    probes = {site.name: _probe(site, run.offers[site.name].proposals) for site in wanted}
    changes = run.measured(probes)
    return {name: Curve(probe.error, changes[name]) for name, probe in probes.items()}


def _unprobed(context: Context, site: LinearSite) -> Curve:
    """With gradients the error is a squared relative change for each token; without, relative to the site's energy."""
    gradients = context.gradients.get(site.name)
    if gradients is None or not gradients.samples:
        return Curve(max(context.energy(site), 1e-30), 1.0)
    return Curve(1.0, gradients.tokens / gradients.samples)


def _refined(run: _Planning, curves: Mapping[str, Curve], choices: Sequence[Choice]) -> dict[str, Curve]:
    """Curves that are exact where the allocator has put the sites."""
    probes = {choice.site.name: choice.proposal for choice in choices if choice.proposal is not None}
    changes = run.measured(probes) if probes else {}
    again = {name: curves[name].refined(probe.error, changes[name]) for name, probe in probes.items()}
    return {**curves, **again}


def _probe(site: LinearSite, proposals: Sequence[Proposal]) -> Proposal:
    """The proposal nearest to the probe's size: small enough to hurt measurably, not beyond recognition."""
    before = site_cost(site).parameters
    return min(proposals, key=lambda p: abs(p.cost.parameters / before - PROBE_KEEP))


def free_pivots(graph: Graph, sites: Sequence[LinearSite]) -> dict[str, slice]:
    """By site, the outputs that an identity may take without a step that puts all of them in order.

    Half precision alone asks for it (see :mod:`lrcompile.gauge`); where no site has it, nothing is looked for.
    """
    regions: Callable[[], Sequence[Region]] = getattr(graph, "regions", tuple)
    return pivot_rows(regions()) if any(permuted(storage_dtype(site.operator)) for site in sites) else {}


def positions(graph: Graph, sites: Sequence[LinearSite], sample: Inputs | None) -> dict[str, float]:
    """Vectors that one use of each site multiplies for ``sample``, padding included; 1 where it is not known."""
    if sample is None or not sites:
        return {site.name: 1.0 for site in sites}
    found = graph.observe([unmasked(sample)], sites, memory=0)
    return {site.name: found[site.input].multiplied / len(site.uses) if site.input in found else 1.0 for site in sites}


def _notes(sites: Sequence[LinearSite], context: Context) -> list[str]:
    few = sorted({s.input for s in sites if (m := context.statistics(s)) is not None and m.tokens < m.channels})
    if not few:
        return list(context.notes)
    return [
        *context.notes,
        f"fewer calibration tokens than channels at {len(few)} inputs ({few[0]}, …): "
        "moments were shrunk towards their diagonal; more data gives a better result",
    ]
