"""Expressions in another order of channels: the same matrix with rows or columns moved, at the same cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.gauge import identity_gauge
from lrcompile.linop import (
    Dense,
    Identity,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    cost,
    densify,
    leaves,
)
from lrcompile.order import Pivoted, Region, inverse, pivot_rows, settled, with_columns, with_rows


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(out: int, into: int, group: int) -> Quantized:
    generator = torch.Generator().manual_seed(3)
    groups = -(-into // group)
    made = torch.randint(-8, 8, (out, into), generator=generator, dtype=torch.int8)
    zero = torch.randint(-2, 2, (out, groups), generator=generator, dtype=torch.int8)
    return Quantized(made, normal(out, groups, seed=4).abs(), zero, group, 4)


def sparse(out: int, into: int) -> SemiSparse:
    places = torch.randint(0, into, (out, 3), generator=torch.Generator().manual_seed(5))
    return SemiSparse(normal(out, 3, seed=6), places, into)


OUT, INTO = 7, 5
EXPRESSIONS: dict[str, LinearOperator] = {
    "matrix": Dense(normal(OUT, INTO)),
    "factors": Product(Dense(normal(OUT, 2)), Dense(normal(2, INTO))),
    "sum": Sum((Dense(normal(OUT, INTO)), Scaled(torch.tensor(0.5), Dense(normal(OUT, INTO, seed=1))))),
    "codes": codes(OUT, INTO, INTO),
    "sparse": sparse(OUT, INTO),
    "codes of a few columns": codes(OUT, INTO, 2),
    "stack": Stack((Identity(INTO), Dense(normal(2, INTO)))),
    "picked": Product(Dense(normal(OUT, 3)), Select(torch.tensor([4, 0, 2]), INTO)),
}
CLOSED = {"rows": set(EXPRESSIONS) - {"stack"}, "columns": set(EXPRESSIONS) - {"stack", "codes of a few columns"}}


@pytest.mark.parametrize("name", EXPRESSIONS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_same_matrix_in_another_order(name: str, seed: int) -> None:
    operator, generator = EXPRESSIONS[name], torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(OUT, generator=generator), torch.randperm(INTO, generator=generator)
    dense = densify(operator)
    for found, wanted, closed in (
        (with_rows(operator, rows), dense[rows], name in CLOSED["rows"]),
        (with_columns(operator, columns), dense[:, columns], name in CLOSED["columns"]),
    ):
        assert (found is not None) == closed
        if found is not None:
            torch.testing.assert_close(densify(found), wanted)
            assert cost([(0, found)]) == cost([(0, operator)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 30), st.data())
def test_writers_lose_their_selects(count: int, size: int, data: st.DataObject) -> None:
    names = tuple(f"w{place}" for place in range(count))
    region = Region(names, ("r",), size)
    operators: dict[str, LinearOperator] = {"r": Dense(normal(4, size, seed=9))}
    for place, name in enumerate(names):
        available = len(range(size)[region.rows(name)])
        rank = data.draw(st.integers(0, available))
        left, right = normal(size, max(rank, 1), seed=place), normal(max(rank, 1), 6, seed=place + 10)
        gauged = identity_gauge(left, right, torch.float16, region.rows(name)) if rank else Dense((left @ right).half())
        operators[name] = gauged
    found = settled(region, operators)
    assert (found is None) == all(isinstance(operators[name], Dense) for name in names)
    if found is None:
        return
    order, moved = found
    assert sorted(order.tolist()) == list(range(size))
    for name in names:
        assert not any(isinstance(leaf, Select) for leaf in leaves(moved[name]))
        torch.testing.assert_close(densify(moved[name]).double(), densify(operators[name])[order].double())
    torch.testing.assert_close(densify(moved["r"]), densify(operators["r"])[:, order])


def test_rows_of_writers_are_disjoint() -> None:
    found = pivot_rows([Region(("a", "b"), ("c",), 9), Region(("d",), ("e",), 4)])
    rows = {name: set(range(9 if name in "ab" else 4)[part]) for name, part in found.items()}
    assert rows["a"] | rows["b"] == set(range(9)) and not rows["a"] & rows["b"]
    assert rows["d"] == set(range(4))


def test_what_puts_nothing_in_order_is_no_pivoted_gauge() -> None:
    twice = Product(Select(torch.tensor([0, 0, 1]), 3), Dense(normal(3, 4)))
    fewer = Product(Select(torch.tensor([0, 2]), 3), Dense(normal(3, 4)))
    assert Pivoted.of(twice) is None and Pivoted.of(fewer) is None and Pivoted.of(Dense(normal(3, 3))) is None


def test_inverse_undoes() -> None:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[inverse(order)], torch.arange(11))
