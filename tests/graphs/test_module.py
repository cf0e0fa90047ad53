"""A module as a graph: what its sites are, and which of them must stay."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lrcompile.errors import GateError, InvalidInputError, UnsupportedError, UsageError
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.structured import StructuredLinear
from lrcompile.linop import Dense, densify
from lrcompile.sites import Window
from tests.graphs.modules import MEMORY, Wrapped, X, encoder, factors, gpt2, sites, tokens, tree

# -- sites -----------------------------------------------------------------------------------


def test_sites_are_the_weights_with_their_module_paths():
    graph = ModuleGraph(encoder())
    expected = [f"{b}.{n}" for b in ("first", "second") for n in ("query", "key", "value", "out")]
    assert list(sites(graph)) == [*expected, "up", "down", "head"]
    up = sites(graph)["up"]
    assert up.shape == (32, 16) and up.kind == "Linear" and len(up.uses) == 1 and not up.frozen
    assert torch.equal(densify(up.operator), tree(graph).up.weight)
    assert up.uses[0].bias is not None and sites(graph)["first.out"].uses[0].bias is None


def test_the_given_module_is_untouched_and_its_tensors_are_shared():
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    graph = ModuleGraph(model)
    graph.observe([tokens()], graph.linear_sites(), memory=MEMORY)
    graph.replace(sites(graph)["up"], factors(32, 16, 4), torch.ones(32))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert type(model.up) is nn.Linear and type(tree(graph).up) is StructuredLinear
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert tree(graph).head.weight is model.head.weight and tree(graph).head is not model.head
    assert model.training and tree(graph).training and not model._forward_hooks


def test_tied_linears_are_one_site_and_stay_tied():
    model = encoder()
    model.second.query.weight = model.first.query.weight
    graph = ModuleGraph(model)
    site = sites(graph)["first.query"]
    assert [use.node for use in site.uses] == ["first.query", "second.query"] and "second.query" not in sites(graph)
    graph.replace(site, factors(16, 16, 4))
    one, two = tree(graph).first.query, tree(graph).second.query
    assert one.factors.left.weight is two.factors.left.weight and one.bias is not two.bias
    assert len({id(p) for p in tree(graph).parameters()}) == len(list(tree(graph).parameters()))


def test_a_module_under_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    graph = ModuleGraph(Twice())
    assert list(sites(graph)) == ["a"]
    graph.replace(sites(graph)["a"], factors(8, 8, 2))
    assert tree(graph).a is tree(graph).b and isinstance(tree(graph).a, StructuredLinear)


def test_conv1d_of_gpt2_is_recognised_and_oriented():
    model = gpt2()
    graph = ModuleGraph(model)
    site = sites(graph)["transformer.h.0.attn.c_attn"]
    assert site.kind == "Conv1D" and site.shape == (96, 32)
    assert torch.equal(densify(site.operator), model.transformer.h[0].attn.c_attn.weight.T)
    graph.replace(site, Dense(densify(site.operator).clone()))
    layer = tree(graph).transformer.h[0].attn.c_attn
    assert layer.nf == 96 and torch.equal(layer.weight, model.transformer.h[0].attn.c_attn.weight)
    assert sites(graph)["lm_head"].frozen == "tied to embedding transformer.wte"
    assert sites(graph)["lm_head"].uses[-1].role == "rows"


def test_convolutions_are_sites():
    layers = {
        "plain": nn.Conv2d(6, 4, 1),
        "strided": nn.Conv2d(6, 4, 1, stride=2),
        "line": nn.Conv1d(6, 4, 1),
        "volume": nn.Conv3d(6, 4, 1),
        "wide": nn.Conv2d(6, 4, 3, padding="same", dilation=2),
        "grouped": nn.Conv2d(6, 4, 1, groups=2),
        "mirrored": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        "turned": nn.ConvTranspose2d(6, 4, 3),
    }
    graph = ModuleGraph(nn.ModuleDict(layers))
    found = sites(graph)
    assert list(found) == [name for name in layers if name != "turned"]
    assert found["strided"].window == Window((1, 1), (2, 2))
    assert found["wide"].window == Window((3, 3), (1, 1), (2, 2, 2, 2), (2, 2))
    assert found["wide"].shape == (4, 54)
    assert found["grouped"].frozen == "a convolution in 2 groups"
    assert "reflect" in found["mirrored"].frozen
    assert not any(found[name].frozen for name in ("plain", "strided", "line", "volume", "wide"))


def test_a_single_layer_is_a_model_too():
    graph = ModuleGraph(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    operator = factors(4, 6, 2)
    graph.replace(graph.linear_sites()[0], operator)
    expected = functional.linear(x, densify(operator), graph.linear_sites()[0].uses[0].bias)
    torch.testing.assert_close(tree(graph)(x), expected)


# -- what cannot be written back -------------------------------------------------------------


class RawReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw, self.called, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.called.weight.dtype != x.dtype:  # reading what a weight is does no harm
            x = x.to(self.called.weight.dtype)
        return self.called(x) + functional.linear(x, self.raw.weight[:, :].T) + self.raw(x)


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Borrower(nn.Module):
    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.owner, self.borrowed = owner, owner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.owner(x) + x @ self.borrowed


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](x)


STATIC = {
    "subclass": (lambda: Wrapped(Own(8, 8)), "layer", "a forward of its own (Own)"),
    "parametrised": (lambda: Wrapped(parametrizations.weight_norm(nn.Linear(8, 8))), "layer", "parametrised"),
    "spectral norm": (lambda: Wrapped(parametrizations.spectral_norm(nn.Linear(8, 8))), "layer", "parametrised"),
    "old weight norm": (lambda: Wrapped(torch.nn.utils.weight_norm(nn.Linear(8, 8))), "layer", "parametrised"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "out_proj", "nn.MultiheadAttention reads its weight"),
    "borrowed": (lambda: Borrower(nn.Linear(8, 8)), "owner", "shared with the model (Borrower)"),
    "plain list": (Holder, "layer", "held by the plain attribute again"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", STATIC)
def test_static_reasons_to_stay(case: str):
    build, name, reason = STATIC[case]
    graph = ModuleGraph(build())
    site = sites(graph)[name]
    assert reason in site.frozen
    with pytest.raises(UsageError, match="cannot be replaced"):
        graph.replace(site, factors(8, 8, 2))


def test_a_run_finds_raw_reads_and_idle_layers():
    graph = ModuleGraph(RawReader())
    assert not any(site.frozen for site in graph.linear_sites())
    graph.check(X)
    found = sites(graph)
    assert "read outside its forward, by the model (aten." in found["raw"].frozen
    assert found["idle"].frozen == "its forward is never called"
    assert not found["called"].frozen


def test_a_replacement_that_turns_out_frozen_fails_the_verification():
    graph = ModuleGraph(RawReader())
    graph.replace(sites(graph)["raw"], factors(8, 8, 2))
    graph.check(X)
    with pytest.raises(GateError, match="read outside its forward"):
        graph.verify()


def test_a_forward_called_without_the_module_is_seen():
    class Direct(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer.forward(x)

    graph = ModuleGraph(Direct(nn.Linear(8, 8)), sample=X)
    assert "read outside its forward" in sites(graph)["layer"].frozen


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_encoder_layers_leave_the_fast_path_where_something_was_replaced():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    batch = {"src": np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)}
    graph = ModuleGraph(model, sample=batch)
    found = sites(graph)
    assert not found["layers.0.linear1"].frozen and "MultiheadAttention" in found["layers.0.self_attn.out_proj"].frozen
    operator = factors(32, 16, 4)
    graph.replace(found["layers.0.linear1"], operator)
    expected: Any = copy.deepcopy(model)
    with torch.no_grad():
        expected.layers[0].linear1.weight.copy_(densify(operator))
        calls: list[int] = []
        tree(graph).layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 3:] = True
        x = torch.from_numpy(batch["src"])
        have = tree(graph)(x, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(have, expected(x, src_key_padding_mask=padding)[~padding], rtol=1e-4, atol=1e-5)
    assert calls == [1]
    graph.rollback(0)
    assert tree(graph).layers[0].activation_relu_or_gelu == model.layers[0].activation_relu_or_gelu == 1
    assert tree(graph).use_nested_tensor == model.use_nested_tensor


def test_unusable_models_are_refused():
    with pytest.raises(UnsupportedError, match="meta device"):
        ModuleGraph(nn.Linear(4, 4, device="meta"))
    broken = nn.Linear(4, 4)
    broken.bias.data[1] = float("nan")
    with pytest.raises(InvalidInputError, match=r"bias: .*NaN"):
        ModuleGraph(broken)
    stuck: Any = Wrapped(nn.Linear(4, 4))
    stuck.stream = (number for number in range(3))  # a generator cannot be copied
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        ModuleGraph(stuck)
