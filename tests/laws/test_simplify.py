"""The normal forms of ``simplify`` and ``collapse``; that they keep the matrix is a law in ``test_linop``."""

from __future__ import annotations

import math

import pytest
import torch

from lrcompile.linop import (
    Dense,
    Diagonal,
    Identity,
    LinearOperator,
    Product,
    Scaled,
    Select,
    Stack,
    Transposed,
    children,
    collapse,
    densify,
    show,
    simplify,
)
from tests.laws.market import MARKET, Maker


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (MARKET["identity-in-product"](0), "Product(Dense 6x4, Diagonal 4x4)"),
        (MARKET["diagonals"](0), "Product(Diagonal 6x6, Dense 6x4)"),
        (MARKET["selects"](0), "Select 4x10"),
        (MARKET["nested-sums"](0), "Sum(2 * Dense 6x6, Identity 6x6, Diagonal 6x6)"),
        (MARKET["nested-stacks"](0), "Stack(Dense 2x6, Identity 6x6, Select 3x6)"),
        (MARKET["nested-scales"](0), "Scaled(Dense 5x4)"),
        (MARKET["low-rank-left-nested"](0), "Product(Dense 8x6, Product(Dense 6x3, Product(Dense 3x5, Dense 5x7)))"),
        (Transposed(Product(Maker(0).dense(3, 2), Identity(2))), "Dense 2x3"),
        (Product(Identity(3), Identity(3)), "Identity 3x3"),
        (Scaled(torch.tensor(2.0), Scaled(torch.tensor(0.5), Identity(3))), "Identity 3x3"),
    ],
)
def test_simplify_reaches_its_normal_form(op: LinearOperator, text: str) -> None:
    assert show(simplify(op)) == text


def test_simplify_leaves_trainable_scales_alone() -> None:
    one = torch.ones((), requires_grad=True)
    op = Scaled(one, Scaled(torch.tensor(2.0), Diagonal(torch.ones(3))))
    assert simplify(op) is op
    with torch.no_grad():
        assert show(simplify(op)) == "Scaled(Diagonal 3x3)"


def test_scales_in_half_precision_do_not_vanish() -> None:
    tiny = torch.tensor(1e-4, dtype=torch.float16)
    op = simplify(Scaled(tiny, Scaled(tiny, Dense(torch.full((1, 1), 1e6)))))
    assert math.isclose(densify(op).item(), 1e-2, rel_tol=2e-3)


def test_collapse_stops_at_break_even() -> None:
    m = Maker(0)
    assert show(collapse(m.low_rank(6, 3, 6))) == "Dense 6x6"
    assert show(collapse(m.low_rank(7, 3, 6))) == "Product(Dense 7x3, Dense 3x6)"
    chain = Product(m.low_rank(8, 6, 3), m.low_rank(3, 5, 7))
    assert show(collapse(chain)) == "Product(Dense 8x3, Dense 3x7)"


def test_sharing_survives_simplify() -> None:
    inner = Product(Identity(3), Maker(0).low_rank(3, 2, 4))
    done = simplify(Stack((inner, Product(Select(torch.tensor([1]), 3), inner))))
    first, second = children(done)
    assert first is children(second)[1]
