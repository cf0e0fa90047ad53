"""The laws that every operator keeps on its way into an exported program and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompile.backends.exported import Exported
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.structured import place
from lrcompile.linop import (
    Choose,
    Dense,
    LinearOperator,
    Product,
    apply,
    densify,
    same,
    simplify,
    tensors,
)
from lrcompile.linop.dense import dtype_of
from lrcompile.linop.tree import map_children
from tests.graphs.exported import exported
from tests.laws.market import MARKET

COMES_BACK = [
    "dense",
    "dense-float64",
    "dense-one",
    "low-rank",
    "low-rank-above-break-even",
    "low-rank-left-nested",
    "lora",
    "nested-scales",
]


class Everywhere(nn.Module):
    """One weight each on values of 2 and 4 axes and as a convolution of a single place."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.two, self.four = nn.Linear(into, out), nn.Parameter(torch.randn(into, out))
        self.image = nn.Conv2d(into, out, 1, stride=(2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.two(x[:, 0, 0]), x @ self.four, self.image(x.permute(0, 3, 1, 2))


def expected(op: LinearOperator, x: Tensor, model: Any) -> list[Tensor]:
    y = apply(op, x.double())
    last = (y + model.image.bias.detach().double()).permute(0, 3, 1, 2)[:, :, ::2]
    return [y[:, 0, 0] + model.two.bias.detach().double(), y, last]


@lru_cache
def everywhere(shape: tuple[int, int]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Everywhere(*shape)
    return model, exported(model, torch.randn(3, 4, 5, shape[1]))


@pytest.mark.parametrize("name", sorted(MARKET))
def test_every_operator_computes_what_it_says(name: str):
    """One traced batch size serves all, and what three sites share is stored once."""
    op = MARKET[name](0)
    model, program = everywhere(op.shape)
    graph = FxGraph(program)
    for site in graph.linear_sites():
        graph.replace(site, op)
    built: Any = Exported().build(graph)
    own = {place(tensor): tensor.numel() * tensor.element_size() for _, tensor in tensors(bound(op))}
    assert built.nbytes == sum(own.values()) + 2 * 4 * op.shape[0]
    narrow = any(leaf.dtype == torch.float16 for leaf in built.model.state_dict.values())
    for batch in (1, 4):
        x = torch.randn(batch, 4, 5, op.shape[1])
        for found, wanted in zip(built.model.module()(x), expected(op, x, model), strict=True):
            scale = max(float(wanted.abs().max()), 1.0)
            torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=2e-3 if narrow else 2e-5)


def lowered(op: LinearOperator) -> Any:
    out, into = op.shape
    model = nn.Linear(into, out, bias=False, dtype=dtype_of(op))
    graph = FxGraph(exported(model, torch.randn(3, into, dtype=dtype_of(op))))
    graph.replace(graph.linear_sites()[0], op)
    return Exported().build(graph)


def bound(op: LinearOperator) -> LinearOperator:
    """The operator as a program holds it: of a choice only what is picked."""
    return bound(op.operators[int(op.index)]) if isinstance(op, Choose) else map_children(op, bound)


@pytest.mark.parametrize("name", COMES_BACK)
def test_round_trip(name: str):
    op = MARKET[name](0)
    built = lowered(op)
    (site,) = FxGraph(built.model).linear_sites()
    assert same(simplify(site.operator), simplify(op)) and site.name == "weight"


def test_a_convolution_and_what_acts_on_its_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=2, dilation=2))
    first: Any = model[0]
    graph = FxGraph(exported(model[:1], torch.randn(2, 3, 9, 8)))
    (site,) = graph.linear_sites()
    new = Product(Dense(torch.randn(8, 4)), Dense(torch.randn(4, 27)))
    graph.replace(site, new)
    built: Any = Exported().build(graph)
    x = torch.randn(5, 3, 9, 8)
    kernel = densify(new).reshape(8, 3, 3, 3)
    torch.testing.assert_close(
        built.model.module()(x), nn.functional.conv2d(x, kernel, first.bias, 2, 1), rtol=1e-4, atol=1e-4
    )
    (again,) = FxGraph(built.model).linear_sites()
    assert again.window == site.window and same(again.operator, new) and again.name == site.name
