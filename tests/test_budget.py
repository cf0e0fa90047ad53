"""Budgets as text, and the allocator against brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lrcompile import budget as module
from lrcompile.budget import COSTS, Budget, Unit, allocate, quantity
from lrcompile.errors import InfeasibleError, UsageError

INF = np.inf


def total(units: list[Unit], chosen) -> np.ndarray:
    return np.sum([unit.costs[index] for unit, index in zip(units, chosen, strict=True)], axis=0)


def loss(units: list[Unit], chosen) -> float:
    return float(sum(unit.losses[index] for unit, index in zip(units, chosen, strict=True)))


def best(units: list[Unit], limits: np.ndarray) -> float:
    """The smallest loss of all choices that hold; inf where none does."""
    choices = itertools.product(*(range(len(unit.losses)) for unit in units))
    return min((loss(units, c) for c in choices if (total(units, c) <= limits).all()), default=math.inf)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Unit], np.ndarray]:
    """Up to 6 units of up to 6 candidates, dense last; unrelated costs, one to three limits."""
    active = draw(st.integers(1, 3))
    units = []
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 6))
        costs = draw(st.lists(st.tuples(*[st.integers(0, 50)] * 3), min_size=count, max_size=count))
        losses = draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
        units.append(Unit(np.array(costs, float), np.array([*losses[:-1], 0.0])))
    dense = total(units, [len(unit.losses) - 1 for unit in units])
    limits = np.array([math.floor(dense[i] * draw(st.floats(0.1, 1.1))) if i < active else INF for i in range(3)])
    return units, draw(st.permutations(range(3)).map(lambda order: limits[list(order)]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_few_units_get_the_optimum(problem: tuple[list[Unit], np.ndarray]):
    """Never over budget, feasible wherever brute force is, and the loss of the best choice of all."""
    units, limits = problem
    optimum = best(units, limits)
    if math.isinf(optimum):
        with pytest.raises(InfeasibleError):
            allocate(units, limits)
        return
    chosen = allocate(units, limits)
    assert (total(units, chosen) <= limits).all()
    assert loss(units, chosen) <= optimum * (1 + 1e-6) + 1e-12


def layers(count: int, candidates: int, seed: int = 0) -> list[Unit]:
    """Low-rank candidates of layers with decaying spectra, dense last; costs in the order of COSTS."""
    random = np.random.default_rng(seed)
    units = []
    for _ in range(count):
        out, into = random.choice([384, 768, 1536], 2)
        spectrum = np.arange(1, min(out, into) + 1.0) ** -random.uniform(1, 3)
        tails = np.append(spectrum[::-1].cumsum()[::-1], 0.0) / spectrum.sum()
        limit = out * into // (out + into)
        ranks = np.unique(np.linspace(8, limit - 1, candidates - 1).astype(int))
        values = np.append(ranks * (out + into), out * into).astype(float)
        losses = np.append(tails[ranks] * random.uniform(0.1, 10), 0.0)
        units.append(Unit(np.stack([values, 4 * values, 128 * values], axis=1), losses))
    return units


def dense(units: list[Unit]) -> np.ndarray:
    return total(units, [len(unit.losses) - 1 for unit in units])


def relaxed(units: list[Unit], limits: np.ndarray) -> float:
    """A lower bound of the loss: the linear relaxation."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    sizes = [len(unit.losses) for unit in units]
    rows = np.repeat(np.arange(len(units)), sizes)
    active = np.isfinite(limits)
    costs = np.concatenate([unit.costs for unit in units])[:, active] / limits[active]
    one_each = csr_matrix((np.ones(sum(sizes)), (rows, np.arange(sum(sizes)))))
    losses = np.concatenate([unit.losses for unit in units])
    found = linprog(losses, costs.T, np.ones(active.sum()), one_each, np.ones(len(units)), bounds=(0, 1))
    assert found.status == 0
    return float(found.fun)


def largest_step(units: list[Unit]) -> float:
    """The largest loss between two neighbours on the lower convex hull of one unit (under the first cost)."""
    steps = [0.0]
    for unit in units:
        points = sorted(zip(unit.costs[:, 0], unit.losses, strict=True))
        hull: list[tuple[float, float]] = []
        for x, y in points:
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
                hull[-1][0] - hull[-2][0]
            ):
                hull.pop()
            hull.append((x, y))
        steps += [a[1] - b[1] for a, b in itertools.pairwise(hull)]
    return max(steps)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_many_units_come_within_one_step_of_the_relaxation(share: float, seed: int):
    """Under one limit the relaxation splits one unit at most, between neighbours on its hull: so far is the bound.

    The loss is compared with the relaxation's, which is below the optimum.
    """
    units = layers(40, 24, seed)
    limits = np.array([share * dense(units)[0], INF, INF])
    chosen = allocate(units, limits)
    assert (total(units, chosen) <= limits).all()
    lower = relaxed(units, limits)
    assert loss(units, chosen) <= max(lower * 1.01, lower + largest_step(units))
    assert total(units, chosen)[0] >= 0.99 * limits[0]


@pytest.mark.parametrize("shares", [(0.6, INF, 0.5), (0.7, 0.65, 0.75), (INF, 0.5, 0.5)])
def test_several_limits_come_within_a_step_each(shares: tuple[float, float, float]):
    units = layers(40, 24, 5)
    random = np.random.default_rng(1)
    units = [Unit(unit.costs * [1, 1, random.integers(1, 9)], unit.losses) for unit in units]
    limits = np.array(shares) * dense(units)
    chosen = allocate(units, limits)
    assert (total(units, chosen) <= limits).all()
    lower, count = relaxed(units, limits), np.isfinite(limits).sum()
    assert loss(units, chosen) <= max(lower * 1.01, lower + count * largest_step(units))


def test_it_is_better_than_uniform_ranks():
    units = layers(30, 24, 7)
    limits = np.array([0.6 * dense(units)[0], INF, INF])
    uniform = [int(np.flatnonzero(unit.costs[:, 0] <= 0.6 * unit.costs[-1, 0])[-1]) for unit in units]
    assert loss(units, allocate(units, limits)) < 0.8 * loss(units, uniform)


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_budget_is_never_worse(seed: int):
    """Exactly so for few units; for many up to the step that no greedy fill can see beyond."""
    few, many = layers(6, 12, seed), layers(50, 24, seed)
    for units, slack in ((few, 0.0), (many, largest_step(many))):
        losses = [
            loss(units, allocate(units, np.array([share * dense(units)[0], INF, INF])))
            for share in np.linspace(0.3, 1.0, 25)
        ]
        assert all(after <= before * (1 + 1e-6) + slack for before, after in itertools.pairwise(losses))
        assert losses[-1] == 0.0


def test_a_whole_network_is_allocated_in_no_time():
    units = layers(210, 72)
    for limits in ([0.6, INF, INF], [0.6, 0.65, 0.55]):
        start = time.process_time()
        chosen = allocate(units, np.array(limits) * dense(units))
        assert time.process_time() - start < 1.0
        assert (total(units, chosen) <= np.array(limits) * dense(units)).all()


def test_equal_layers_share_what_fits():
    """At one price all equal layers would jump at once; the fill gives as many of them as fit."""
    units = [Unit(np.array([[1.0], [10.0]]), np.array([5.0, 0.0]))] * 7
    units = [Unit(np.hstack([unit.costs, np.zeros((2, 2))]), unit.losses) for unit in units]
    chosen = allocate(units, np.array([43.0, INF, INF]))
    assert sorted(chosen) == [0, 0, 0, 1, 1, 1, 1]


def test_everything_stays_dense_when_it_may():
    units = layers(20, 12)
    last = [len(unit.losses) - 1 for unit in units]
    assert allocate(units, np.full(3, INF)) == last
    assert allocate(units, dense(units)) == last
    whole = Budget(keep=1.0, bytes=1.0, macs="1.0")
    assert allocate(units, whole.limits(dense(units), np.zeros(3))) == last


def test_same_problem_same_answer():
    units = layers(30, 24)
    limits = 0.55 * dense(units)
    assert allocate(units, limits) == allocate([Unit(u.costs.copy(), u.losses.copy()) for u in units], limits.copy())


def test_no_units():
    assert allocate([], np.array([1.0, INF, INF])) == []


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("limit", [5.0, 0.0, -7.0])
def test_an_infeasible_limit_is_named(index: int, limit: float):
    units = layers(3, 6)
    limits = np.full(3, INF)
    limits[index] = limit
    with pytest.raises(InfeasibleError, match=COSTS[index]) as caught:
        allocate(units, limits)
    assert (caught.value.code, caught.value.where) == (6, COSTS[index])


def test_limits_that_exclude_each_other():
    unit = Unit(np.array([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0]]), np.array([1.0, 0.0]))
    with pytest.raises(InfeasibleError, match="no choice of candidates"):
        allocate([unit], np.array([5.0, 5.0, INF]))


def test_a_candidate_without_a_number_is_never_chosen():
    unit = Unit(np.array([[1.0, 0, 0], [2.0, 0, 0], [9.0, 0, 0]]), np.array([np.nan, 3.0, 0.0]))
    assert allocate([unit], np.array([5.0, INF, INF])) == [1]


def test_the_beam_improves_on_the_fill():
    """Without the beam search the greedy choice is wasteful here."""
    units = [Unit(np.array([[0.0, 0, 0], [c, 0, 0]]), np.array([g, 0.0])) for c, g in ((6, 6.6), (5, 5.0), (5, 5.0))]
    assert loss(units, allocate(units, np.array([10.0, INF, INF]))) == pytest.approx(6.6)
    table = module._Table.of([Unit(u.costs[:, :1], u.losses) for u in units], np.array([10.0]))
    greedy = module._fill(table, table.pick(module._multipliers(table)))
    assert table.loss(greedy) == pytest.approx(10.0)


# -- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, None), (0.8, 0.8), (1, 1.0), ("0.8", 0.8), (" 60MB ", 60 * 2**20), ("60 mb", 60 * 2**20),
        ("1.5GB", 1.5 * 2**30), ("2kB", 2048), ("500M", 5e8), ("1.2G", 1.2e9), ("3k", 3000.0), ("7B", 7.0),
        ("1e6", 1e6), ("1E6", 1e6), (1e-5, 1e-5), ("2.5e-3", 2.5e-3), (np.float64(0.5), 0.5), (10**12, 1e12),
    ],
)  # fmt: skip
def test_quantities(text, number):
    assert quantity(text, "bytes") == number


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", "0", 0, -0.5, "1.2.3", "60XB", "5e", "nan", "inf", math.nan, math.inf, True, "80%", "1,5"]
)
def test_bad_quantities(text):
    with pytest.raises(UsageError, match=r"bytes: .* is not a positive amount") as caught:
        quantity(text, "bytes")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "bad", [{"keep": 1.5}, {"keep": "2"}, {"keep": 0.0}, {"bytes": "much"}, {"macs": -1}, {"drift": 0}]
)
def test_bad_budgets(bad: dict):
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        Budget(**bad)


def test_limits_are_shares_up_to_one_and_amounts_above():
    before, fixed = np.array([1000.0, 5000.0, 70_000.0, 1.0]), np.array([0.0, 1000.0, 20_000.0, 0.25])
    limits = Budget(keep=0.5, bytes=0.6, macs="40k", latency=0.75).limits(before, fixed)
    assert limits.tolist() == [500.0, 2000.0, 20_000.0, 0.5]
    assert Budget(drift=0.1).limits(before, fixed).tolist() == [INF] * 4
    assert not Budget().limited and Budget(bytes="60MB").limited
    assert Budget(drift=0.1).by_drift and not Budget(drift=0.1, keep=0.9).by_drift


@given(st.floats(0.01, 1.0))
def test_any_share_is_a_budget(share: float):
    assume(share > 0)
    assert Budget(keep=share).limits(np.array([100.0, 0, 0]), np.zeros(3))[0] == share * 100.0
