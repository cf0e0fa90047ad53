"""What every site gets: offers, the allocator's choice among them, and choosing again when a result falls short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lrcompile.budget import COSTS, Budget, Unit, allocate, quantity
from lrcompile.curves import Curve
from lrcompile.errors import InfeasibleError
from lrcompile.graphs.base import Graph
from lrcompile.linop import Cost
from lrcompile.rewrite import Context, Proposal
from lrcompile.sites import LinearSite
from lrcompile.windows import site_cost


class Pricing(Protocol):
    """What things at a site take, as shares of the latency of the model as it came."""

    def dense(self, site: LinearSite) -> float:
        """Of the site as it came."""
        ...

    def held(self, site: LinearSite) -> float:
        """Of what it holds now."""
        ...

    def of(self, site: LinearSite, proposal: Proposal) -> float:
        """Of a proposal."""
        ...


@dataclass(eq=False)
class Offer:
    """What the passes propose for one site, and why some do not.

    Attributes:
        broken: what was installed and taken back, by the name of its pass.
    """

    proposals: list[Proposal]
    reasons: list[str]
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> list[Proposal]:
        """The proposals of passes that have kept their promises here."""
        return [proposal for proposal in self.proposals if proposal.source not in self.broken]


@dataclass(eq=False)
class Choice:
    """What one site gets: a proposal, or nothing, and why.

    Attributes:
        before: cost of the site in the model as it came.
        held: cost of what it holds now, after exact rewrites.
        outside: it does not take part.
    """

    site: LinearSite
    before: Cost
    held: Cost
    proposal: Proposal | None = None
    predicted: float = 0.0
    reason: str = ""
    tails: Sequence[float] = ()
    refused: bool = False
    outside: bool = False
    count: float = 1.0
    error: float | None = None
    energy: float | None = None

    @property
    def cost(self) -> Cost:
        """Cost of what the site gets."""
        return self.held if self.proposal is None else self.proposal.cost

    @property
    def macs(self) -> float:
        """Multiply–accumulates per sample of what the site gets."""
        return self.cost.macs * self.count


@dataclass(eq=False)
class Planned:
    """The allocator's answer.

    Attributes:
        expected: (limits,) what the allocator thinks that the result costs, in the order of its columns.
        again: chooses anew without what was broken, and with so much less room under each limit.
        within: chooses the smallest plan without what was broken whose predicted loss stays below a value.
    """

    choices: list[Choice]
    context: Context
    offers: Mapping[str, Offer]
    expected: np.ndarray
    again: Callable[[np.ndarray], Planned]
    within: Callable[[float], Planned]
    notes: list[str] = field(default_factory=list)
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def before(self) -> Cost:
        """Summed cost, in the model as it came, of the sites that take part."""
        return sum((choice.before for choice in self.choices if not choice.outside), Cost())

    @property
    def after(self) -> Cost:
        """Summed cost of what they get."""
        return sum((choice.cost for choice in self.choices if not choice.outside), Cost())

    @property
    def predicted(self) -> float:
        """Predicted loss: squared relative change of the outputs, as if errors were independent."""
        return sum(choice.predicted for choice in self.choices)

    @property
    def saved_macs(self) -> float:
        """Multiply–accumulates per sample that the choices save."""
        return sum(choice.before.macs * choice.count - choice.macs for choice in self.choices)

    def broke(self, choice: Choice, reason: str) -> None:
        """Takes a choice back whose proposal did not do what its pass said."""
        if choice.proposal is None:
            return
        reason = f"rolled back: {reason}"
        self.offers[choice.site.name].broken[choice.proposal.source] = reason
        choice.proposal, choice.reason, choice.refused, choice.error = None, reason, True, None


@dataclass(eq=False)
class Allocation:
    """All that the allocator is told.

    Args:
        counts: vectors that one use of a site multiplies per sample.
        came: bytes and multiply–accumulates per sample of the whole model as it came; shares are shares of it.
        now: the same of the model as it stands, after exact rewrites.
        prices: under a latency budget.
    """

    graph: Graph
    sites: Sequence[LinearSite]
    offers: Mapping[str, Offer]
    counts: Mapping[str, float]
    budget: Budget
    came: Cost
    now: Cost
    prices: Pricing | None = None

    def choose(self, curves: Mapping[str, Curve], reserve: np.ndarray | None = None) -> list[Choice]:
        """One choice for each site.

        Args:
            reserve: (limits,) room that must stay free under each limit.

        Raises:
            InfeasibleError: the limits cannot be met; carries what can.
        """
        units = [self._unit(site, curves) for site in self.sites]
        held = sum((unit.costs[-1] for unit in units), np.zeros(len(COSTS)))
        rest = self._rest() + (0.0 if reserve is None else reserve)
        whole = np.array([self._values(), self.came.nbytes or held[1], self.came.macs or held[2], 1.0])
        try:
            picked = allocate(units, self.budget.limits(whole, rest))
        except InfeasibleError as error:
            least = rest + sum((unit.costs.min(axis=0) for unit in units), np.zeros(len(COSTS)))
            raise _infeasible(error, self.budget, least, whole) from error
        return self._choices(units, picked, curves)

    def smallest(self, curves: Mapping[str, Curve], loss: float) -> list[Choice]:
        """The choices of fewest bytes whose predicted losses sum to at most ``loss``.

        The same knapsack with losses and bytes in each other's place.
        """
        units = [self._unit(site, curves) for site in self.sites]
        swapped = [Unit(unit.losses[:, None], unit.costs[:, COSTS.index("bytes")]) for unit in units]
        return self._choices(units, allocate(swapped, np.array([loss])), curves)

    def _choices(self, units: Sequence[Unit], picked: Sequence[int], curves: Mapping[str, Curve]) -> list[Choice]:
        chosen = zip(self.sites, units, picked, strict=True)
        return [self._choice(site, unit, index, curves) for site, unit, index in chosen]

    def expected(self, choices: Sequence[Choice]) -> np.ndarray:
        """(limits,) cost of the whole model with these choices."""
        rows = (_row(choice.cost, choice.count, self._price(choice.site, choice.proposal)) for choice in choices)
        return sum(map(np.array, rows), self._rest())

    def _rest(self) -> np.ndarray:
        """What the sites do not account for."""
        held = sum((np.array(_row(site_cost(s), self.counts[s.name])) for s in self.sites), np.zeros(len(COSTS)))
        rest = np.maximum(np.array([0.0, self.now.nbytes - held[1], self.now.macs - held[2], 0.0]), 0.0)
        if self.prices is not None:  # may be negative while the scale of the prices is not yet known
            rest[-1] = 1.0 - sum(self.prices.dense(site) for site in self.sites)
        return rest

    def _price(self, site: LinearSite, proposal: Proposal | None) -> float:
        if self.prices is None:
            return 0.0
        return self.prices.held(site) if proposal is None else self.prices.of(site, proposal)

    def _usable(self, site: LinearSite) -> list[Proposal]:
        """Proposals that may be chosen: under a latency budget none that is slower than what is there."""
        found = self.offers[site.name].usable
        if self.prices is None:
            return found
        limit = self.prices.held(site)
        return [proposal for proposal in found if self.prices.of(site, proposal) < limit]

    def _unit(self, site: LinearSite, curves: Mapping[str, Curve]) -> Unit:
        usable = self._usable(site)
        count = self.counts[site.name]
        rows = [_row(each.cost, count, self._price(site, each)) for each in usable]
        rows.append(_row(site_cost(site), count, self._price(site, None)))
        losses = [curves[site.name](proposal.error) for proposal in usable]
        return Unit(np.array(rows, dtype=float), np.array([*losses, 0.0]))

    def _values(self) -> float:
        return sum(came_cost(self.graph, site).parameters for site in self.sites)

    def _choice(self, site: LinearSite, unit: Unit, index: int, curves: Mapping[str, Curve]) -> Choice:
        offer = self.offers[site.name]
        choice = Choice(site, came_cost(self.graph, site), site_cost(site), count=self.counts[site.name])
        choice.tails = offer.proposals[0].tails if offer.proposals else ()
        usable = self._usable(site)
        if index < len(usable):
            proposal = choice.proposal = usable[index]
            choice.predicted, choice.reason, choice.tails = float(unit.losses[index]), proposal.label, proposal.tails
            return choice
        reasons = [*offer.broken.values(), *offer.reasons]
        if offer.usable and not usable:
            reasons.append("stays dense: everything on offer measured slower")
        choice.reason = "; ".join(reasons) or "stays dense: the budget buys more elsewhere"
        choice.refused = bool(offer.broken)
        return choice


def _row(cost: Cost, count: float, latency: float = 0.0) -> tuple[float, float, float, float]:
    """Costs in the order of :data:`lrcompile.budget.COSTS`."""
    return cost.parameters, cost.nbytes, cost.macs * count, latency


def came_cost(graph: Graph, site: LinearSite) -> Cost:
    """Cost of what a site held when the model came."""
    return site_cost(graph.original(site.name))


def left_out(graph: Graph, site: LinearSite, reason: str) -> Choice:
    """The choice of a site that does not take part."""
    return Choice(site, came_cost(graph, site), site_cost(site), reason=reason, refused=True, outside=True)


def _infeasible(error: InfeasibleError, budget: Budget, least: np.ndarray, whole: np.ndarray) -> InfeasibleError:
    """The allocator's complaint in the user's terms: what was asked for, and the best there is."""
    best = {}
    for name, value, came in zip(COSTS, least, whole, strict=True):
        asked = quantity(getattr(budget, name), name)
        if asked is not None:
            best[name] = float(value / came) if asked <= 1 and came else float(value)
    asked = " and ".join(f"{name} {getattr(budget, name)}" for name in best)
    found = ", ".join(f"{name} {value:.4g}" if value <= 1 else f"{name} {value:,.0f}" for name, value in best.items())
    together = " (each alone)" if len(best) > 1 else ""
    return InfeasibleError(
        f"{asked} cannot be met; the best found is {found}{together}", where=error.where, hint=error.hint, best=best
    )
