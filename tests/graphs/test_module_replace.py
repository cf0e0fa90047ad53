"""Replaced layers compute what they should, and go back without a trace."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lrcompile.backends.eager import Eager
from lrcompile.errors import UsageError
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.structured import Pool, StructuredConv, StructuredLinear
from lrcompile.linop import Dense, LinearOperator, Product, densify, low_rank
from tests.graphs.modules import Wrapped, encoder, factors, outputs, sites, tokens, tree
from tests.laws.market import MARKET

# -- replacing -------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_a_replacement_computes_the_dense_reconstruction(shift: bool):
    model, batch = encoder(), tokens()
    graph = ModuleGraph(model)
    operator, gain = factors(32, 16, 4), torch.linspace(-1, 1, 32) if shift else None
    graph.replace(sites(graph)["up"], operator, gain)
    with torch.no_grad():
        model.up.weight.copy_(densify(operator))
        if gain is not None:
            model.up.bias.add_(gain)
    have = Eager().build(graph).run(batch)
    want = outputs(model, batch)
    assert list(have) == list(want) == ["logits", "hidden"]
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MARKET))
def test_every_operator_works_as_a_layer(name: str):
    operator = MARKET[name](0)
    out, into = operator.shape
    x, bias = torch.randn(3, 5, into), torch.randn(out)
    layer = StructuredLinear(_factors(operator), bias)
    expected = x @ densify(operator).T.to(x.dtype) + bias
    narrow = any(t.dtype == torch.float16 for t in layer.state_dict().values())
    torch.testing.assert_close(layer(x), expected, rtol=2e-3, atol=2e-3 if narrow else 1e-4)
    twin = copy.deepcopy(layer)
    assert set(twin.state_dict()) == set(layer.state_dict())
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))
    torch.testing.assert_close(layer.weight, densify(operator))


def _factors(operator: LinearOperator) -> Any:
    return Pool().factors(operator, device=torch.device("cpu"), trainable=True)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(6, 4, 1), nn.Conv2d(6, 4, 1, stride=(1, 2)), nn.Conv3d(6, 4, 1, bias=False)]
)
@pytest.mark.parametrize("batched", [True, False])
def test_a_convolution_keeps_its_geometry(layer: nn.Module, batched: bool):
    graph = ModuleGraph(Wrapped(layer))
    site = graph.linear_sites()[0]
    operator = factors(4, 6, 3)
    graph.replace(site, operator, torch.ones(4))
    new = tree(graph).layer
    assert isinstance(new, StructuredConv)
    spatial = (5, 4, 3)[: len(new.stride)]
    x = torch.randn(*((2,) if batched else ()), 6, *spatial)
    dense: Any = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(new.weight)
        want = dense(x) + torch.ones(4).reshape(-1, *(1,) * len(spatial))
    torch.testing.assert_close(new(x), want)
    assert new(x).is_contiguous()


def test_rolling_back_brings_the_original_objects_back():
    model = encoder()
    graph = ModuleGraph(model)
    originals = list(tree(graph).modules())
    reference = graph.run(tokens())
    graph.replace(sites(graph)["up"], factors(32, 16, 4))
    mark = graph.journal.mark()
    graph.replace(sites(graph)["up"], factors(32, 16, 2), torch.ones(32))
    graph.replace(sites(graph)["head"], factors(5, 16, 2))
    graph.rollback(mark)
    assert tree(graph).up.operator.left.shape == (32, 4) and type(tree(graph).head) is nn.Linear
    assert sites(graph)["up"].operator is graph.replacements["up"].operator
    graph.rollback(0)
    assert all(a is b for a, b in zip(originals, tree(graph).modules(), strict=True))
    for name, value in graph.run(tokens()).items():
        np.testing.assert_array_equal(value, reference[name])


def test_what_is_said_about_the_given_module_survives_a_replacement():
    model = encoder()
    graph = ModuleGraph(model)
    before = (graph.nbytes, graph.parameters, graph.fingerprint(), graph.macs(tokens()), graph.run(tokens()))
    graph.replace(sites(graph)["up"], factors(32, 16, 4))
    after = (graph.nbytes, graph.parameters, graph.fingerprint(), graph.macs(tokens()), graph.run(tokens()))
    assert before[:4] == after[:4]
    np.testing.assert_array_equal(before[4]["logits"], after[4]["logits"])
    assert before[1] == sum(p.numel() for p in model.parameters()) and before[0] == 4 * before[1]
    built = Eager().build(graph)
    assert built.parameters == before[1] - 32 * 16 + 4 * 48 and built.nbytes == 4 * built.parameters
    assert built.macs(tokens()) == before[3] - 2 * 28 * (32 * 16 - 4 * 48)
    other = encoder(1)
    assert ModuleGraph(encoder()).fingerprint() == before[2] != ModuleGraph(other).fingerprint()


def test_leaves_shared_between_sites_are_stored_once():
    graph = ModuleGraph(encoder())
    shared = Dense(torch.randn(4, 16))
    for name in ("first.query", "first.key", "second.query"):
        graph.replace(sites(graph)[name], Product(Dense(torch.randn(16, 4)), shared))
    held = [
        tree(graph).get_submodule(name).factors.right.weight for name in ("first.query", "first.key", "second.query")
    ]
    assert held[0] is held[1] is held[2]
    twin = copy.deepcopy(tree(graph))
    assert twin.first.query.factors.right.weight is twin.second.query.factors.right.weight
    assert twin.first.query.factors.right.weight is not held[0]
    assert Eager().build(graph).parameters == ModuleGraph(encoder()).parameters - 3 * 16 * 16 + 3 * 64 + 64


def test_structured_layers_train_convert_and_compile():
    model = encoder()
    graph = ModuleGraph(model)
    graph.replace(sites(graph)["head"], low_rank(torch.randn(5, 2), torch.randn(2, 16)))
    head = tree(graph).head
    names = [name for name, _ in head.named_parameters()]
    assert names == ["bias", "factors.left.weight", "factors.right.weight"]
    assert "Product(Dense 5x2, Dense 2x16)" in repr(head) and "in_features=16, out_features=5" in repr(head)
    x = torch.randn(3, 16)
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), head(x))
    narrow = copy.deepcopy(head).to(torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(narrow(x.bfloat16()).float(), head(x), rtol=5e-2, atol=5e-1)
    model.up.requires_grad_(False)
    frozen = ModuleGraph(model)
    frozen.replace(sites(frozen)["up"], factors(32, 16, 4))
    assert not any(p.requires_grad for p in tree(frozen).up.parameters())


def test_wrong_shapes_are_refused():
    graph = ModuleGraph(encoder())
    with pytest.raises(UsageError, match=r"shape \(16, 32\) cannot replace \(32, 16\)"):
        graph.replace(sites(graph)["up"], factors(16, 32, 2))
    assert not graph.journal.entries and type(tree(graph).up) is nn.Linear


def test_adopting_another_module_comes_before_replacements():
    graph = ModuleGraph(encoder())
    graph.adopt(encoder(1))
    assert torch.equal(tree(graph).up.weight, encoder(1).up.weight)
    graph.replace(sites(graph)["up"], factors(32, 16, 4))
    with pytest.raises(UsageError, match="before weight rewrites"):
        graph.adopt(encoder())
