"""Single cases of the algebra: names, texts, refusals, run-time switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrcompile.errors import InvalidInputError
from lrcompile.linop import (
    Choose,
    Dense,
    Identity,
    LinearOperator,
    Product,
    Select,
    Stack,
    Sum,
    apply,
    children,
    densify,
    low_rank,
    rebuild,
    rows,
    same,
    show,
    structure,
    tensors,
)
from tests.laws.market import MARKET, Maker


def test_same_sees_values_structure_and_dtype() -> None:
    m = Maker(0)
    op = m.low_rank(4, 2, 3)
    assert not same(op, low_rank(op.left.weight + 1, op.right.weight))  # pyright: ignore[reportAttributeAccessIssue]
    assert not same(op, Sum((op,)))
    assert not same(m.dense(2, 2), Dense(torch.zeros(2, 2, dtype=torch.float64)))
    assert not same(Identity(3), Identity(4))


def test_names_and_text() -> None:
    m = Maker(0)
    op = Sum((m.dense(4, 6), m.scaled(m.low_rank(4, 2, 6))))
    names = ["terms.0.weight", "terms.1.scale", "terms.1.operator.left.weight", "terms.1.operator.right.weight"]
    assert [name for name, _ in tensors(op)] == names
    assert show(op) == repr(op) == "Sum(Dense 4x6, Scaled(Product(Dense 4x2, Dense 2x6)))"
    assert show(Stack((m.quantized(4, 6, 3, bits=4),) * 3)) == "Stack(3 * Quantized 4x6 4-bit/3)"


def test_operators_without_floats_take_the_dtype_beside_them() -> None:
    half = Maker(0, torch.float16).dense(3, 3)
    assert densify(Identity(3)).dtype == rows(Identity(3), torch.tensor(0)).dtype == torch.float32
    wide = Product(half, Select(torch.tensor([0, 4, 8]), 9))
    for op in (Sum((Identity(3), half)), Product(half, Identity(3)), Stack((MARKET["select"](0), wide))):
        assert densify(op).dtype == rows(op, torch.tensor([0])).dtype == torch.float16


def test_rebuild_restores_sharing_across_expressions() -> None:
    shared = Maker(0).dense(3, 5)
    pair = [Product(Maker(i).dense(4, 3), shared) for i in (1, 2)]
    memo: dict[Any, LinearOperator] = {}
    a, b = (rebuild(structure(op), dict(tensors(op, "w.")), "w.", memo) for op in pair)
    assert children(a)[1] is children(b)[1]
    assert children(a)[0] is not children(b)[0]


@pytest.mark.parametrize(
    "spec",
    [
        ["Nonsense", []],
        ["Dense", []],
        ["Dense", [["weight", "tensor", "float32", [2, 3]]]],
        ["Dense", [["weight", "tensor", "float64", [2, 2]]]],
        ["Dense", [["missing", "tensor", "float32", [2, 2]]]],
        ["Dense", [["weight", "value", 1]]],
        ["Identity", [["size", "value", {"a": 1}]]],
        ["Product", [["left", "operator", ["Identity", [["size", "value", 2]]]]]],
        ["Sum", [["terms", "operators", []]]],
        "Dense",
        7,
    ],
)
def test_rebuild_refuses_what_is_malformed(spec: Any) -> None:
    with pytest.raises(InvalidInputError):
        rebuild(spec, {"weight": torch.zeros(2, 2)})


def test_apply_refuses_a_wrong_width() -> None:
    for build in MARKET.values():
        op = build(0)
        with pytest.raises((InvalidInputError, RuntimeError)):
            apply(op, torch.zeros(2, op.shape[1] + 1))


def test_apply_refuses_integers_where_values_would_be_cut() -> None:
    with pytest.raises(InvalidInputError):
        apply(Dense(torch.full((2, 2), 0.5)), torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["dense", "stack-shared-right", "select", "quantized", "nested-stacks"])
@pytest.mark.parametrize("outside", [-1, "rows"])
def test_rows_refuses_an_index_out_of_range(name: str, outside: int | str) -> None:
    op = MARKET[name](0)
    with pytest.raises((IndexError, RuntimeError)):
        rows(op, torch.tensor([0, op.shape[0] if outside == "rows" else -1]))


def test_rows_of_a_stack_that_holds_one_part_twice() -> None:
    part = Maker(0).dense(3, 4)
    op = Stack((part, Identity(4), part, part))
    assert torch.equal(rows(op, torch.arange(13)), densify(op))


def test_choose_reads_its_index_at_run_time() -> None:
    index, m = torch.tensor(0), Maker(0)
    op = Choose(index, (m.dense(3, 4), m.low_rank(3, 1, 4)))
    x = torch.randn(2, op.shape[1])
    for i, one in enumerate(op.operators):
        index.fill_(i)
        assert torch.equal(apply(op, x), apply(one, x))
    index.fill_(-1)
    with pytest.raises(InvalidInputError):
        apply(op, x)


def test_apply_and_choose_trace_without_a_graph_break() -> None:
    index, m = torch.tensor(1), Maker(0)
    op = Choose(index, (m.dense(8, 8), Product(m.semi_sparse(8, 4, 2), m.quantized(4, 8, 4))))
    compiled = torch.compile(lambda x: apply(op, x), backend="eager", fullgraph=True)
    x = torch.randn(3, op.shape[1])
    for i in (1, 0):
        index.fill_(i)
        torch.testing.assert_close(compiled(x), apply(op, x))
