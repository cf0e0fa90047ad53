"""Who gets how much: statistics, proposals of all passes, measured scales, the allocator's choice.

What an error at one site does to the outputs is measured, not guessed: each site alone is cut
to a probe, and the change of the outputs over the probe's error energy scales the site's whole
curve. The scales need no gradients, so every graph that runs has them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lrcompile import cache
from lrcompile.budget import COSTS, Budget, Unit, allocate, quantity
from lrcompile.calibrate import Moments
from lrcompile.curves import Curve, measured
from lrcompile.data import Batches
from lrcompile.errors import InfeasibleError, UsageError
from lrcompile.graphs.base import Graph, Inputs
from lrcompile.linop import Cost, cost
from lrcompile.progress import Progress, Watched
from lrcompile.rewrite import Context, LinearPass, Proposal
from lrcompile.samples import unmasked
from lrcompile.sites import LinearSite

PROBE_KEEP = 0.6
"""Share of a site's values that a probe keeps."""
PROBE_SAMPLES = 40


@dataclass(frozen=True)
class Settings:
    """How statistics are taken.

    Args:
        include, exclude: globs on site names.
        probes: measure how much each site matters; without, every site's relative error counts alike.
        probe_samples: calibration samples that each probe runs on.
        refine: probe every site a second time at the size that it was given, then allocate again.
        memory: bytes that the Gram matrices of one pass over the data may take.
        align: ranks are multiples of this.
        cache: folder of the statistics cache; None for no cache.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    probes: bool = True
    probe_samples: int = PROBE_SAMPLES
    refine: bool = True
    memory: int = 2**30
    align: int = 8
    seed: int = 0
    cache: Path | None = None


@dataclass(eq=False)
class Choice:
    """What one site gets: a proposal, or nothing, and why."""

    site: LinearSite
    before: Cost
    proposal: Proposal | None = None
    predicted: float = 0.0
    reason: str = ""
    tails: Sequence[float] = ()
    refused: bool = False
    count: float = 1.0
    error: float | None = None
    energy: float | None = None

    @property
    def cost(self) -> Cost:
        """Cost of what the site gets."""
        return self.before if self.proposal is None else self.proposal.cost

    @property
    def macs(self) -> float:
        """Multiply–accumulates per sample of what the site gets."""
        return self.cost.macs * self.count


@dataclass(eq=False)
class Planned:
    """The allocator's answer; ``before`` is the summed cost of the sites that take part."""

    choices: list[Choice]
    context: Context
    before: Cost
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def after(self) -> Cost:
        """Summed cost of what was chosen."""
        return sum((choice.cost for choice in self.choices if not choice.refused), Cost())

    @property
    def saved_macs(self) -> float:
        """Multiply–accumulates per sample that the choices save."""
        return sum(choice.before.macs * choice.count - choice.macs for choice in self.choices)


def select(sites: Iterable[LinearSite], settings: Settings) -> tuple[list[LinearSite], list[Choice]]:
    """Sites that take part, and those that do not with the reason.

    Raises:
        UsageError: the patterns leave nothing.
    """
    chosen, left = [], []
    for site in sites:
        reason = site.frozen or _unselected(site.name, settings)
        if reason:
            left.append(Choice(site, _cost(site), reason=reason, refused=True))
        else:
            chosen.append(site)
    if not chosen and left and all("pattern" in choice.reason for choice in left):
        raise UsageError("the patterns select no site", where="--include", hint=f"sites: {left[0].site.name}, …")
    return chosen, left


def _unselected(name: str, settings: Settings) -> str:
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.include):
        return "no --include pattern selects it"
    return "an --exclude pattern takes it out" if any(fnmatch.fnmatchcase(name, p) for p in settings.exclude) else ""


def _cost(site: LinearSite) -> Cost:
    return cost([(index, site.operator) for index in range(len(site.uses))])


def statistics(
    graph: Graph, sites: Sequence[LinearSite], data: Batches | None, settings: Settings, tell: Progress
) -> Mapping[str, Moments]:
    """Moments of what the sites read, from the cache where they are there already."""
    if data is None or not sites:
        return {}
    inputs = ",".join(sorted({site.input for site in sites}))
    name = cache.key("moments/1", graph.fingerprint(), data.sha256, inputs)
    stored = cache.load(name, settings.cache)
    if stored is not None:
        return cache.unpack(*stored)
    tell(f"calibrating {len(sites)} sites", -(-data.samples // data.batch))
    moments = graph.observe(Watched(data, tell), sites, memory=settings.memory)
    cache.store(name, *cache.pack(moments), settings.cache)
    return moments


def plan(
    graph: Graph,
    passes: Sequence[LinearPass],
    budget: Budget,
    data: Batches | None,
    settings: Settings,
    *,
    whole: Cost | None = None,
    sample: Inputs | None = None,
    tell: Progress | None = None,
) -> Planned:
    """Chooses an expression for every site under the budget.

    Args:
        whole: bytes, and multiply–accumulates on ``sample``, of the whole model as it stands.
        sample: one sample; it gives the number of vectors that each site multiplies.

    Raises:
        InfeasibleError: the passes offer nothing small enough.
    """
    tell = tell or Progress()
    sites, left = select(graph.linear_sites(), settings)
    moments = statistics(graph, sites, data, settings, tell)
    context = Context(graph, moments, align=settings.align, seed=settings.seed)
    sites, left = _refreeze(graph, sites, left)
    tell("decomposing")
    offers = {site.name: _offers(site, passes, context) for site in sites}
    run = _Planning(graph, sites, offers, context, data, settings, tell)
    counts = positions(graph, sites, sample)
    curves = _first_curves(run)
    choices = _allocate(sites, offers, curves, budget, counts, whole or Cost())
    if data is not None and settings.probes and settings.refine:
        curves = _refined(run, curves, choices)
        choices = _allocate(sites, offers, curves, budget, counts, whole or Cost())
    return Planned([*choices, *left], context, _total(sites), _notes(sites, context), curves)


@dataclass(eq=False)
class _Planning:
    """What the steps of a plan share."""

    graph: Graph
    sites: Sequence[LinearSite]
    offers: Mapping[str, _Offer]
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
    left = left + [Choice(site, _cost(site), reason=site.frozen, refused=True) for site in moved]
    return [current[site.name] for site in sites if not current[site.name].frozen], left


@dataclass(eq=False)
class _Offer:
    proposals: list[Proposal]
    reasons: list[str]


def _offers(site: LinearSite, passes: Sequence[LinearPass], context: Context) -> _Offer:
    offer = _Offer([], [])
    before = _cost(site)
    for each in passes:
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
    if run.data is None or not run.settings.probes:
        return {site.name: Curve(max(run.context.energy(site), 1e-30), 1.0) for site in wanted}
    probes = {site.name: _probe(site, run.offers[site.name].proposals) for site in wanted}
    changes = run.measured(probes)
    return {name: Curve(probe.error, changes[name]) for name, probe in probes.items()}


def _refined(run: _Planning, curves: Mapping[str, Curve], choices: Sequence[Choice]) -> dict[str, Curve]:
    """Curves that are exact where the allocator has put the sites."""
    probes = {choice.site.name: choice.proposal for choice in choices if choice.proposal is not None}
    changes = run.measured(probes) if probes else {}
    again = {name: curves[name].refined(probe.error, changes[name]) for name, probe in probes.items()}
    return {**curves, **again}


def _probe(site: LinearSite, proposals: Sequence[Proposal]) -> Proposal:
    """The proposal nearest to the probe's size: small enough to hurt measurably, not beyond recognition."""
    before = _cost(site).parameters
    return min(proposals, key=lambda p: abs(p.cost.parameters / before - PROBE_KEEP))


def positions(graph: Graph, sites: Sequence[LinearSite], sample: Inputs | None) -> dict[str, float]:
    """Vectors that one use of each site multiplies for ``sample``, padding included; 1 where it is not known."""
    if sample is None or not sites:
        return {site.name: 1.0 for site in sites}
    found = graph.observe([unmasked(sample)], sites, memory=2**40)
    return {site.name: found[site.input].tokens / len(site.uses) if site.input in found else 1.0 for site in sites}


def _allocate(
    sites: Sequence[LinearSite],
    offers: Mapping[str, _Offer],
    curves: Mapping[str, Curve],
    budget: Budget,
    counts: Mapping[str, float],
    whole: Cost,
) -> list[Choice]:
    units = []
    for site in sites:
        candidates = offers[site.name].proposals
        rows = [_row(cost, counts[site.name]) for cost in (*(p.cost for p in candidates), _cost(site))]
        losses = [curves[site.name](p.error) for p in candidates]
        units.append(Unit(np.array(rows, dtype=float), np.array([*losses, 0.0])))
    before = np.sum([unit.costs[-1] for unit in units], axis=0) if units else np.zeros(len(COSTS))
    rest = np.maximum(np.array([0.0, whole.nbytes, whole.macs]) - [0.0, *before[1:]], 0.0)
    try:
        picked = allocate(units, budget.limits(before + rest, rest))
    except InfeasibleError as error:
        raise _infeasible(error, budget, units, before + rest, rest) from error
    return [
        _choice(site, offers[site.name], unit, index, counts[site.name])
        for site, unit, index in zip(sites, units, picked, strict=True)
    ]


def _infeasible(
    error: InfeasibleError, budget: Budget, units: Sequence[Unit], before: np.ndarray, rest: np.ndarray
) -> InfeasibleError:
    """The allocator's complaint in the user's terms: what was asked for, and the best there is."""
    least = rest + sum((unit.costs.min(axis=0) for unit in units), np.zeros(len(COSTS)))
    best = {}
    for name, value, whole in zip(COSTS, least, before, strict=True):
        asked = quantity(getattr(budget, name), name)
        if asked is not None:
            best[name] = float(value / whole) if asked <= 1 and whole else float(value)
    asked = " and ".join(f"{name} {getattr(budget, name)}" for name in best)
    found = ", ".join(f"{name} {value:.4g}" if value <= 1 else f"{name} {value:,.0f}" for name, value in best.items())
    together = " (each alone)" if len(best) > 1 else ""
    return InfeasibleError(
        f"{asked} cannot be met; the best found is {found}{together}", where=error.where, hint=error.hint, best=best
    )


def _row(cost: Cost, count: float) -> tuple[float, float, float]:
    """A candidate's costs in the order of :data:`lrcompile.budget.COSTS`."""
    return cost.parameters, cost.nbytes, cost.macs * count


def _choice(site: LinearSite, offer: _Offer, unit: Unit, index: int, count: float) -> Choice:
    if index < len(offer.proposals):
        proposal = offer.proposals[index]
        loss = float(unit.losses[index])
        return Choice(site, _cost(site), proposal, loss, proposal.label, proposal.tails, count=count)
    reason = "; ".join(offer.reasons) or "stays dense: the budget buys more elsewhere"
    tails = offer.proposals[0].tails if offer.proposals else ()
    return Choice(site, _cost(site), reason=reason, tails=tails, count=count)


def _total(sites: Sequence[LinearSite]) -> Cost:
    return sum(map(_cost, sites), Cost())


def _notes(sites: Sequence[LinearSite], context: Context) -> list[str]:
    few = sorted({s.input for s in sites if (m := context.statistics(s)) is not None and m.tokens < m.channels})
    if not few:
        return []
    return [
        f"fewer calibration tokens than channels at {len(few)} inputs ({few[0]}, …): "
        "moments were shrunk towards their diagonal; more data gives a better result"
    ]
