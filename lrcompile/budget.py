"""One budget for all passes and sites: what is asked for, and who gets which share.

The allocator solves a multiple-choice knapsack: one candidate for each unit, "stay dense" among
them, the sum of losses minimal under every limit. Lagrange multipliers give the convex hull
of the optimum, a greedy fill spends what the hull leaves over (without it the answer can be worse
than uniform ranks), and a beam search under the Lagrangian bound closes the rest of the gap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lrcompile.errors import InfeasibleError, UsageError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}
COSTS = ("keep", "bytes", "macs", "latency")
"""Limits that are known or predicted before anything is built, in the order of the allocator's columns."""


def quantity(value: float | str | None, name: str) -> float | None:
    """``0.8``, ``"60MB"`` or ``"1.2G"`` as a number; KB, MB and GB are powers of 1024.

    Raises:
        UsageError: not a positive number with a known unit.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match and match[2].lower() in _UNITS:
        try:
            number = float(match[1]) * _UNITS[match[2].lower()]
        except ValueError:
            number = 0.0
        if number > 0 and np.isfinite(number):
            return number
    raise UsageError(f"'{value}' is not a positive amount", where=name, hint="write 0.8, 500M or 60MB")


@dataclass(frozen=True)
class Budget:
    """Limits on the result; all of them hold, and the predicted loss is minimised.

    Args:
        keep: share of the stored values of the sites that stays, above 0 and at most 1.
        bytes: bytes on disk; a share of the original where it is at most 1.
        macs: multiply–accumulates per sample; a share of the original where it is at most 1.
        latency: time of a run over the original's, at most 1; predicted from measured costs of every product, and
            measured on the result.
        drift: largest measured drift on inputs that calibration did not see. Beside other limits it is a gate;
            alone, bytes are minimised under it.

    Raises:
        UsageError: a limit is not a positive amount, or keep or latency is above 1.
    """

    keep: float | None = None
    bytes: float | str | None = None
    macs: float | str | None = None
    latency: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        for name in (*COSTS, "drift"):
            quantity(getattr(self, name), name)
        for name, meaning in (("keep", "the share that stays"), ("latency", "a ratio to the original's")):
            if (quantity(getattr(self, name), name) or 0) > 1:
                raise UsageError(f"{name} is {meaning}, at most 1, not {getattr(self, name)}", where=name)

    @property
    def limited(self) -> bool:
        """Whether anything must become smaller."""
        return self.drift is not None or any(getattr(self, name) is not None for name in COSTS)

    @property
    def by_drift(self) -> bool:
        """Whether the drift alone decides how small the result becomes."""
        return self.drift is not None and all(getattr(self, name) is None for name in COSTS)

    def limits(self, before: Sequence[float] | np.ndarray, fixed: Sequence[float] | np.ndarray) -> np.ndarray:
        """Limits on the candidates' summed costs, inf where there is none.

        Args:
            before: of the whole model, in the order of :data:`COSTS`; of the sites for keep.
            fixed: the part of it that no site accounts for.
        """
        found = np.full(len(COSTS), np.inf)
        for index, name in enumerate(COSTS):
            amount = quantity(getattr(self, name), name)
            if amount is not None:
                found[index] = (amount * before[index] if amount <= 1 else amount) - fixed[index]
        return found


class Unit(NamedTuple):
    """The candidates of one site: costs (candidates, limits) and predicted losses (candidates,)."""

    costs: np.ndarray
    losses: np.ndarray


WORK = 1_000_000
"""Candidates that the beam search looks at in total; it is exact where these are all that matter."""


def allocate(units: Sequence[Unit], limits: np.ndarray) -> list[int]:
    """The index of the chosen candidate of every unit; no limit is exceeded.

    The loss is the optimum's where the beam never has to drop a state that could still win, so always for
    few units. Otherwise it is at most what Lagrange multipliers and a greedy fill reach: under one limit
    the optimum and the largest step between two candidates of one unit.

    Args:
        units: at least one candidate each.
        limits: of the summed costs, (limits,); inf for none.

    Raises:
        InfeasibleError: even the cheapest candidates exceed a limit, or no choice holds all of them.
    """
    if not units:
        return []
    active = np.flatnonzero(np.isfinite(limits))
    table = _Table.of([Unit(unit.costs[:, active], unit.losses) for unit in units], limits[active])
    table.check([COSTS[index] for index in active])
    if table.holds(free := table.pick(np.zeros(len(active)))):
        return free.tolist()
    multipliers = _multipliers(table)
    chosen = table.pick(multipliers)
    found = _fill(table, chosen) if table.holds(chosen) else None
    best = _beam(table, multipliers, found)
    if best is None:
        raise InfeasibleError("no choice of candidates holds all limits at once", hint="relax one of the limits")
    return best.tolist()


class _Table(NamedTuple):
    """All candidates in two arrays, padded with candidates of infinite loss; costs are shares of the limits."""

    costs: np.ndarray  # (units, candidates, limits)
    losses: np.ndarray  # (units, candidates)
    bound: np.ndarray  # (limits,): 1, 0 or -1, and a little for rounding

    @classmethod
    def of(cls, units: Sequence[Unit], limits: np.ndarray) -> _Table:
        width = max(len(unit.losses) for unit in units)
        costs, losses = np.zeros((len(units), width, len(limits))), np.full((len(units), width), np.inf)
        scale = np.where(limits == 0, 1.0, np.abs(limits))
        for place, unit in enumerate(units):
            costs[place] = unit.costs[-1] / scale
            costs[place, : len(unit.losses)] = unit.costs / scale
            losses[place, : len(unit.losses)] = np.where(np.isnan(unit.losses), np.inf, unit.losses)
        return cls(costs, losses, np.sign(limits) + 1e-12)

    def check(self, names: Sequence[str]) -> None:
        least = self.costs.min(axis=1).sum(axis=0)
        for index in map(int, np.flatnonzero(least > self.bound)):
            raise InfeasibleError(
                f"even the smallest candidates together exceed the limit on {names[index]}",
                where=names[index],
                hint="raise the limit, or let more sites or passes take part",
            )

    def pick(self, multipliers: np.ndarray) -> np.ndarray:
        """The best candidates at prices; of equal ones the cheapest."""
        return np.argmin(self.losses + self.costs @ multipliers, axis=1)

    def total(self, chosen: np.ndarray) -> np.ndarray:
        return self.costs[np.arange(len(chosen)), chosen].sum(axis=0)

    def loss(self, chosen: np.ndarray) -> float:
        return float(self.losses[np.arange(len(chosen)), chosen].sum())

    def holds(self, chosen: np.ndarray) -> bool:
        return bool((self.total(chosen) <= self.bound).all())


def _multipliers(table: _Table) -> np.ndarray:
    """Prices under which the limits hold: each in turn is made as low as the others allow."""
    multipliers = np.zeros(len(table.bound))
    for _ in range(4 if len(multipliers) > 1 else 1):
        before = multipliers.copy()
        for index in range(len(multipliers)):
            multipliers[index] = _bisect(table, multipliers, index)
        if np.array_equal(before, multipliers):
            break
    return multipliers


def _bisect(table: _Table, multipliers: np.ndarray, index: int) -> float:
    """The smallest price of one limit that makes it hold, the others as they are."""

    def holds(value: float) -> bool:
        trial = multipliers.copy()
        trial[index] = value
        return bool(table.total(table.pick(trial))[index] <= table.bound[index])

    if holds(0.0):
        return 0.0
    largest = np.log(table.losses[np.isfinite(table.losses)].max() + 1e-30)
    low, high = largest - 60, largest + 60
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(np.exp(middle)) else (middle, high)
    return float(np.exp(high))


def _fill(table: _Table, chosen: np.ndarray) -> np.ndarray:
    """Spends what is left: the step with most loss removed for its share of the room, until none fits."""
    chosen, every = chosen.copy(), np.arange(len(chosen))
    while True:
        room = table.bound - table.total(chosen)
        gain = table.losses[every, chosen][:, None] - table.losses
        step = table.costs - table.costs[every, chosen][:, None]
        fits = (gain > 0) & (step <= room).all(axis=2)
        if not fits.any():
            return chosen
        rate = np.where(fits, gain / np.maximum(step.max(axis=2, initial=0.0), 1e-15), -np.inf)
        place, index = np.unravel_index(np.argmax(rate), rate.shape)
        chosen[place] = index


def _beam(table: _Table, multipliers: np.ndarray, found: np.ndarray | None) -> np.ndarray | None:
    """Unit by unit, the partial choices that the Lagrangian bound does not rule out; the best, or ``found``.

    Args:
        found: a choice that holds, to be improved upon.
    """
    target = np.inf if found is None else table.loss(found) * (1 - 1e-9)
    priced = table.losses + table.costs @ multipliers
    ahead = _from_here(priced.min(axis=1)) - multipliers @ table.bound
    least = _from_here(table.costs.min(axis=1))
    useful = (priced - priced.min(axis=1, keepdims=True) + ahead[0] < target) & np.isfinite(table.losses)
    beam = max(WORK // max(int(useful.sum()), 1), 16)
    costs, losses, trail = np.zeros((1, len(table.bound))), np.zeros(1), []
    for place, candidates in enumerate(map(np.flatnonzero, useful)):
        costs = costs[:, None] + table.costs[place, candidates]
        losses = losses[:, None] + table.losses[place, candidates]
        bound = losses + costs @ multipliers + ahead[place + 1]
        alive = (bound < target) & (costs + least[place + 1] <= table.bound).all(axis=2)
        parent, index = np.nonzero(alive)
        kept = _undominated(costs[parent, index], losses[parent, index], bound[parent, index], beam)
        parent, index = parent[kept], index[kept]
        costs, losses = costs[parent, index], losses[parent, index]
        trail.append((parent, candidates[index]))
    if not len(losses) or losses.min() >= target:
        return found
    return _walk_back(trail, int(np.argmin(losses)))


def _from_here(values: np.ndarray) -> np.ndarray:
    """Sums over the units from each one on, and zero at the end."""
    sums = np.cumsum(values[::-1], axis=0)[::-1]
    return np.concatenate([sums, np.zeros_like(values[:1])])


def _undominated(costs: np.ndarray, losses: np.ndarray, bound: np.ndarray, beam: int) -> np.ndarray:
    """Indices of the states worth keeping, at most ``beam``: those with the lowest bounds."""
    kept = np.arange(len(losses))
    if costs.shape[1] == 1 and len(kept):
        order = np.lexsort((losses, costs[:, 0]))
        lowest = np.minimum.accumulate(losses[order])
        kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
    if len(kept) > beam:
        kept = kept[np.argsort(bound[kept], kind="stable")[:beam]]
    return kept


def _walk_back(trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> np.ndarray:
    chosen = np.zeros(len(trail), dtype=int)
    for place in reversed(range(len(trail))):
        parent, index = trail[place]
        chosen[place], state = index[state], parent[state]
    return chosen
