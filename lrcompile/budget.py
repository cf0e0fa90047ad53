"""One budget for all passes and sites: what is asked for, and who gets which share.

The allocator solves a multiple-choice knapsack: one candidate for each unit, "stay dense" among
them, the sum of losses minimal under every limit. Lagrange multipliers give the convex hull
of the optimum; a greedy fill then spends what the hull leaves over, without which the answer can
be worse than uniform ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lrcompile.errors import InfeasibleError, UsageError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}
COSTS = ("keep", "bytes", "macs")
"""Limits that are known before anything is built, in the order of the allocator's columns."""


def quantity(value: float | str | None, name: str) -> float | None:
    """``0.8``, ``"60MB"`` or ``"1.2G"`` as a number; KB, MB and GB are powers of 1024.

    Raises:
        UsageError: not a positive number with a known unit.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", str(value))
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
        drift: largest measured drift on inputs that calibration did not see; a gate.

    Raises:
        UsageError: a limit is not a positive amount, or keep is above 1.
    """

    keep: float | None = None
    bytes: float | str | None = None
    macs: float | str | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        for name in (*COSTS, "drift"):
            quantity(getattr(self, name), name)
        if self.keep is not None and quantity(self.keep, "keep") > 1:  # type: ignore[operator]
            raise UsageError(f"keep is the share that stays, at most 1, not {self.keep}", where="keep")

    @property
    def limited(self) -> bool:
        """Whether anything must become smaller."""
        return any(getattr(self, name) is not None for name in COSTS)

    def limits(self, before: Sequence[float], fixed: Sequence[float]) -> np.ndarray:
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


def allocate(units: Sequence[Unit], limits: np.ndarray) -> list[int]:
    """The index of the chosen candidate of every unit.

    Args:
        units: at least one candidate each.
        limits: of the summed costs, (limits,); inf for none.

    Raises:
        InfeasibleError: even the cheapest candidates exceed a limit; says by how much.
    """
    active = np.isfinite(limits)
    scale = np.where(active, np.maximum(np.abs(limits), 1e-30), 1.0)
    scaled = [Unit(np.where(active, unit.costs / scale, 0.0), unit.losses) for unit in units]
    bound = np.where(active, np.sign(limits), np.inf)
    _check_feasible(scaled, bound)
    chosen = _dual(scaled, bound, active)
    return _fill(scaled, chosen, bound)


def _check_feasible(units: Sequence[Unit], bound: np.ndarray) -> None:
    least = np.sum([unit.costs.min(axis=0) for unit in units], axis=0) if units else np.zeros_like(bound)
    for index in np.flatnonzero(least > bound * (1 + 1e-12)):
        raise InfeasibleError(
            f"the smallest possible result has {least[index]:.3f} times the room that the limit on {COSTS[index]} leaves",
            where=COSTS[index],
            hint="raise the limit, or let more sites or passes take part",
        )


def _pick(units: Sequence[Unit], multipliers: np.ndarray) -> list[int]:
    return [int(np.argmin(unit.losses + unit.costs @ multipliers)) for unit in units]


def _total(units: Sequence[Unit], chosen: Sequence[int]) -> np.ndarray:
    return np.sum([unit.costs[index] for unit, index in zip(units, chosen, strict=True)], axis=0)


def _dual(units: Sequence[Unit], bound: np.ndarray, active: np.ndarray) -> list[int]:
    """Raises one multiplier after the other until every limit holds."""
    multipliers = np.zeros(len(bound))
    if not units:
        return []
    largest = max(float(unit.losses.max()) for unit in units) + 1e-30
    cheapest = [int(np.argmin(unit.costs[:, active].max(axis=1))) if active.any() else 0 for unit in units]
    for _ in range(4):
        for index in np.flatnonzero(active):
            multipliers[index] = _bisect(units, bound, multipliers, int(index), largest)
        chosen = _pick(units, multipliers)
        if (_total(units, chosen) <= bound).all():
            return chosen
    return cheapest if (_total(units, cheapest) <= bound).all() else _cheapest(units, bound)


def _bisect(
    units: Sequence[Unit], bound: np.ndarray, multipliers: np.ndarray, index: int, largest: float
) -> float:
    """The smallest multiplier of one limit that makes it hold, the others as they are."""

    def holds(value: float) -> bool:
        trial = multipliers.copy()
        trial[index] = value
        return bool(_total(units, _pick(units, trial))[index] <= bound[index])

    if holds(0.0):
        return 0.0
    low, high = np.log(largest) - 60, np.log(largest) + 60
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(np.exp(middle)) else (middle, high)
    return float(np.exp(high))


def _cheapest(units: Sequence[Unit], bound: np.ndarray) -> list[int]:
    """Walks from the smallest candidates of one limit until all limits hold.

    Raises:
        InfeasibleError: the limits exclude each other.
    """
    for index in range(len(bound)):
        chosen = [int(np.argmin(unit.costs[:, index])) for unit in units]
        if (_total(units, chosen) <= bound).all():
            return chosen
    raise InfeasibleError("no choice of candidates holds all limits at once", hint="relax one of the limits")


def _fill(units: Sequence[Unit], chosen: list[int], bound: np.ndarray) -> list[int]:
    """Spends what is left: the step with most loss removed for its share of the room, until none fits."""
    room = bound - _total(units, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for place, unit in enumerate(units):
            gain = unit.losses[chosen[place]] - unit.losses
            step = unit.costs - unit.costs[chosen[place]]
            fits = (gain > 0) & (step <= room + 1e-12).all(axis=1)
            if not fits.any():
                continue
            rate = np.where(fits, gain / np.maximum(step.max(axis=1), 1e-15), -np.inf)
            index = int(np.argmax(rate))
            if best is None or rate[index] > best[0]:
                best = (float(rate[index]), place, index)
        if best is None:
            return chosen
        _, place, index = best
        room = room - (units[place].costs[index] - units[place].costs[chosen[place]])
        chosen[place] = index
