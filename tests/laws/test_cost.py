"""What operators cost: against closed formulas, and against what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from lrcompile.linop import (
    BlockSparse,
    Choose,
    Cost,
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
    index_dtype,
    leaves,
    low_rank,
    macs,
    nbytes,
    parameters,
    rebuild,
    simplify,
    structure,
    tensors,
    transpose,
)
from tests.laws.market import MARKET, Maker, operators

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)
M, R, N = 12, 3, 10


def stored_bytes(op: LinearOperator) -> int:
    """Bytes of all distinct storages, codes packed."""
    total, bits = 0, {id(leaf.codes): leaf.bits for leaf in leaves(op) if isinstance(leaf, Quantized)}
    seen: dict[int, Tensor] = {}
    for _, value in tensors(op):
        if value.untyped_storage().data_ptr() not in seen:
            seen[value.untyped_storage().data_ptr()] = value
            width = bits.get(id(value))
            total += value.untyped_storage().nbytes() if width is None else -(-value.numel() * width // 8)
    return total


@quick
@given(operators())
def test_bytes_are_what_is_stored(op: LinearOperator) -> None:
    assert nbytes(op) == stored_bytes(op)
    assert nbytes([op, ("x", op), transpose(op)]) == stored_bytes(op)
    assert parameters([op, transpose(op)]) == parameters(op)


@quick
@given(operators())
def test_costs_survive_saving_and_simplify_never_adds(op: LinearOperator) -> None:
    assert cost(rebuild(structure(op), dict(tensors(op)))).nbytes == nbytes(op)
    assert macs(simplify(op)) <= macs(op)
    assert macs([(0, op), (0, op)]) == macs(op)
    assert macs([op, op]) == 2 * macs(op)


@pytest.mark.parametrize("name", MARKET)
def test_market_bytes(name: str) -> None:
    op = MARKET[name](0)
    assert nbytes(op) == stored_bytes(op)
    assert cost([op]) == cost(op) == Cost(parameters(op), nbytes(op), macs(op))


def _leaf_costs() -> list[tuple[str, LinearOperator, Cost]]:
    m, half = Maker(0), Maker(0, torch.float16)
    sparse = SemiSparse(m.normal(M, 4), m.integers(0, 300, M, 4), 300)
    blocks = BlockSparse(m.normal(5, 2, 4), m.integers(0, 3, 5), m.integers(0, 2, 5), (3, 2))
    two = (m.dense(4, 5), m.low_rank(4, 1, 5))
    return [
        ("dense", m.dense(M, N), Cost(M * N, 4 * M * N, M * N)),
        ("half counts as one value", half.dense(M, N), Cost(M * N, 2 * M * N, M * N)),
        ("identity", Identity(N), Cost(0, 0, 0)),
        ("diagonal", m.diagonal(N), Cost(N, 4 * N, N)),
        ("select in int64", m.select(M, N), Cost(M / 2, 8 * M, 0)),
        ("select in uint8", m.select(M, N, torch.uint8), Cost(M / 2, M, 0)),
        ("16-bit columns in int64", sparse, Cost(4 * M * 2, 4 * M * (4 + 8), 4 * M)),
        ("blocks", blocks, Cost(40 + 2 * 5 / 2, 160 + 2 * 40, 40)),
        ("8 bit", m.quantized(4, 6, 3), Cost(24 / 2 + 8 * 2 + 8 / 2, 24 + 8 * 4 + 8, 24)),
        ("3 bit", half.quantized(3, 3, 3, bits=3, zero=False), Cost(9 * 3 / 16 + 3, 4 + 6, 9)),
        ("low rank", m.low_rank(M, R, N), Cost(R * (M + N), 4 * R * (M + N), R * (M + N))),
        ("scaled", m.scaled(m.low_rank(M, R, N)), Cost(R * (M + N) + 1, 4 * R * (M + N) + 4, R * (M + N) + M)),
        ("choose", Choose(m.integers(0, 2), two), Cost(20 + 9 + 0.5, 116 + 8, 20)),
    ]


@pytest.mark.parametrize(("op", "expected"), [pytest.param(op, c, id=name) for name, op, c in _leaf_costs()])
def test_formulas(op: LinearOperator, expected: Cost) -> None:
    assert cost(op) == expected
    if not isinstance(op, Scaled):
        assert macs(transpose(op)) == expected.macs


def test_a_shared_leaf_is_stored_once_but_applied_twice() -> None:
    atom, m = Maker(0).dense(8, 6), Maker(1)
    layers = [Sum((m.scaled(atom), m.scaled(Maker(2).dense(8, 6)))) for _ in range(2)]
    assert parameters(layers) == 8 * 6 + 2 * 8 * 6 + 4
    assert macs(layers) == 2 * (2 * 48 + 2 * 8)


def test_one_tensor_in_two_leaves_is_stored_once() -> None:
    weight = Maker(0).normal(5, 5)
    tied = [Dense(weight), Dense(weight.T), Dense(torch.nn.Parameter(weight)), Dense(weight.detach())]
    assert cost(tied) == Cost(25, 100, 4 * 25)
    assert parameters([Dense(weight[:2]), Dense(weight[2:4])]) == 20
    assert parameters([Dense(torch.empty(2, 3, device="meta")), Dense(torch.empty(2, 3, device="meta"))]) == 12


def test_a_shared_product_counts_once_on_one_input() -> None:
    m = Maker(0)
    basis = m.dense(R, N)
    left, right = (Product(m.dense(M, R), basis) for _ in range(2))
    assert macs([("x", left), ("x", right)]) == R * N + 2 * M * R
    assert macs([("x", left), ("y", right)]) == macs([left, right]) == 2 * (R * N + M * R)
    assert macs(Stack((left, right))) == R * N + 2 * M * R
    deeper = Product(m.dense(2, M), left)
    assert macs([("x", left), ("x", deeper)]) == macs(left) + 2 * M


def test_association_and_identities_do_not_change_macs() -> None:
    m = Maker(0)
    a, b, c = m.dense(4, 5), m.dense(5, 6), m.dense(6, 7)
    nested, flat = Product(Product(a, Product(Identity(5), b)), c), Product(a, Product(b, c))
    assert macs(nested) == macs(flat) == 20 + 30 + 42
    assert macs([("x", nested), ("x", flat)]) == macs(flat)


def test_branches_of_choose_do_not_lend_to_each_other() -> None:
    m = Maker(0)
    basis, index = m.dense(R, N), torch.tensor(0)
    one, two = Product(m.dense(M, R), basis), Product(m.dense(M, R), basis)
    choice = Choose(index, (one, two))
    assert macs(choice) == R * N + M * R
    assert macs(Stack((choice, one))) == macs(Stack((one, choice))) == R * N + 2 * M * R
    assert macs(Stack((choice, Choose(index, (two, one))))) == 2 * (R * N + M * R)


def test_transposed_stack_costs_its_parts() -> None:
    m = Maker(0)
    op = transpose(Stack((m.low_rank(4, 2, 6), m.semi_sparse(3, 6, 2), m.select(2, 6))))
    assert macs(op) == 2 * (4 + 6) + 3 * 2


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(0, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32),
     (2**31, torch.int32), (2**31 + 1, torch.int64)],
)  # fmt: skip
def test_index_dtype_is_the_smallest_that_holds(size: int, dtype: torch.dtype) -> None:
    assert index_dtype(size) == dtype
    top = torch.tensor(max(size - 1, 0))
    assert int(top.to(dtype)) == int(top)


def test_costs_add() -> None:
    assert sum([Cost(1.5, 2, 3), Cost(1, 1, 1)], Cost()) == Cost(2.5, 3, 4)
    assert parameters([]) == nbytes([]) == macs([]) == 0
    assert isinstance(macs(low_rank(torch.ones(2, 1), torch.ones(1, 2))), int)
    assert parameters(Select(torch.zeros(4, dtype=torch.int64), 70000)) == 4 * 2
