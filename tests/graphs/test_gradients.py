"""Gradients through both graphs: torch's evaluation of ONNX against ONNX Runtime, G against finite differences."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from lrcompile import zoo
from lrcompile.errors import LrcompileError, UnsupportedError
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx import load
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.torched.run import TorchRun
from lrcompile.graphs.onnx.torched.table import RULES
from lrcompile.linop import Dense, densify
from lrcompile.sites import LinearSite
from tests.e2e.running import images

RANDOM = ("bernoulli", "dropout", "random", "multinomial")


@functools.cache
def cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they overflow on purpose
        found = [case for case in collect_testcases(None) if case.model is not None]  # type: ignore[arg-type]
    return [case for case in found if not any(word in case.name for word in RANDOM)]


def agrees(model: ir.Model, inputs: list[Any], expected: list[Any]) -> bool:
    """Whether torch computes what the conformance suite says; False where it refuses."""
    feeds = dict(zip([str(value.name) for value in model.graph.inputs], inputs, strict=False))
    if any(not isinstance(array, np.ndarray | np.generic) for array in feeds.values()):
        return False
    try:
        found, _ = TorchRun(model)({name: np.asarray(array) for name, array in feeds.items()})
    except LrcompileError:
        return False
    for got, want in zip(found.values(), expected, strict=False):
        want = np.asarray(want)
        loose = want.dtype.itemsize < 4 and want.dtype.kind not in "iub"
        assert tuple(got.shape) == want.shape
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if loose else {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(got.numpy().astype(np.float64), want.astype(np.float64), **tolerance)
    return True


def test_every_conformance_case_is_right_or_refused():
    """Hundreds are computed, and none of them is computed wrongly."""
    computed = 0
    for case in cases():
        if any((node.domain, node.op_type) not in RULES for node in case.model.graph.node):
            continue
        try:
            model = load.from_proto(case.model)
        except LrcompileError:
            continue
        try:
            computed += agrees(model, *case.data_sets[0])
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    assert computed >= 400


def test_a_refusal_names_the_operator():
    case = next(case for case in cases() if case.model.graph.node[0].op_type == "Det")
    with pytest.raises(UnsupportedError, match="Det"):
        TorchRun(load.from_proto(case.model))


@pytest.fixture(scope="module")
def digits() -> zoo.ZooModel:
    return zoo.load("digits_vit")


@pytest.fixture(scope="module")
def graph(digits: zoo.ZooModel) -> OnnxGraph:
    return OnnxGraph.load(zoo.exported("digits_vit"))


def test_the_exported_vit_is_computed_alike(graph: OnnxGraph, digits: zoo.ZooModel):
    feeds = images(digits, 5)
    found, _ = TorchRun(graph.model)(feeds)
    for name, array in graph.run(feeds).items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-4, atol=1e-4)


def test_constants_are_shared_with_the_model(graph: OnnxGraph):
    run = TorchRun(graph.model)
    name, value = next((n, v) for n, v in graph.model.graph.initializers.items() if v.const_value.size > 1000)
    assert run._constants[name].data_ptr() == value.const_value.numpy().__array_interface__["data"][0]


def twins(module: ModuleGraph, other: OnnxGraph) -> list[tuple[LinearSite, LinearSite]]:
    theirs = list(other.linear_sites())
    pairs = []
    for site in module.linear_sites():
        weight = densify(site.operator)
        pairs.append(
            (site, next(o for o in theirs if o.shape == site.shape and torch.equal(densify(o.operator), weight)))
        )
    return pairs


def test_both_graphs_find_the_same_gradients(graph: OnnxGraph, digits: zoo.ZooModel):
    module = ModuleGraph(digits.module(), sample=images(digits, 2))
    pairs = twins(module, graph)
    options = {"memory": 2**30, "seed": 3}
    ours = module.gradients([images(digits, 6)], [site for site, _ in pairs], **options).moments
    theirs = graph.gradients([images(digits, 6)], [site for _, site in pairs], **options).moments
    for site, twin in pairs:
        a, b = ours[site.name], theirs[twin.name]
        assert (a.tokens, a.samples) == (b.tokens, b.samples)
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-3, atol=1e-4 * float(a.gram.diagonal().max()))


def test_groups_change_nothing(graph: OnnxGraph, digits: zoo.ZooModel):
    sites = list(graph.linear_sites())
    whole = graph.gradients([images(digits, 4)], sites, memory=2**30, seed=0).moments
    parts = graph.gradients([images(digits, 4)], sites, memory=1, seed=0).moments
    for name, each in whole.items():
        torch.testing.assert_close(each.gram, parts[name].gram, rtol=1e-4, atol=1e-6)


class Net(nn.Module):
    """A linear map into a nonlinear rest; every row of the input is a sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.act = nn.ReLU(inplace=True)
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(5, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.act(self.first(x) + 0.5))


def test_g_predicts_what_a_small_error_does():
    """``E[eᵀ G e]`` of an error e at a site is the squared relative change of the output: a Gauss–Newton matrix."""
    model, x = Net(), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    graph = ModuleGraph(model, sample={"x": x[:2]})
    site = next(s for s in graph.linear_sites() if s.name == "first")
    rounds = [graph.gradients([{"x": x}], [site], memory=2**30, seed=1000 * k).moments["first"] for k in range(60)]
    matrix = sum(each.gram.double() for each in rounds) / len(rounds)  # summed over the samples
    error = 1e-3 * torch.randn(5, generator=torch.Generator().manual_seed(2))  # the same for every sample
    with torch.no_grad():
        before = model(x)
        model.first.bias.add_(error)
        after = model(x)
    predicted = float(error.double() @ matrix @ error.double())
    measured = float(((after - before).square().sum(1) / before.square().sum(1)).sum())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_shared_and_unused_sites():
    """A module that is called twice adds up its uses, and one that the output ignores has a zero matrix."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(x)
            return self.layer(torch.relu(self.layer(x)))

    x = {"x": torch.randn(8, 4)}
    graph = ModuleGraph(Twice(), sample=x)
    found = graph.gradients([x], list(graph.linear_sites()), memory=2**30, seed=0).moments
    assert found["layer"].tokens == 16 and float(found["layer"].gram.abs().sum()) > 0
    assert float(found["idle"].gram.abs().sum()) == 0


def test_a_model_without_derivative_is_named():
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).argmax(-1)

    graph = ModuleGraph(Rounded(), sample={"x": torch.randn(2, 4)})
    with pytest.raises(UnsupportedError, match="gradient"):
        graph.gradients([{"x": torch.randn(2, 4)}], list(graph.linear_sites()), memory=2**30, seed=0)


def test_the_given_model_is_left_alone(digits: zoo.ZooModel):
    model = digits.module()
    graph = ModuleGraph(model, sample=images(digits, 2))
    graph.gradients([images(digits, 2)], list(graph.linear_sites()), memory=2**30, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_replacements_do_not_count(graph: OnnxGraph, digits: zoo.ZooModel, tmp_path: Path):
    """Gradients are of the loaded model."""
    own = OnnxGraph.load(zoo.exported("digits_vit"))
    site = own.linear_sites()[0]
    before = own.gradients([images(digits, 2)], [site], memory=2**30, seed=0).moments[site.name].gram.clone()
    own.replace(site, Replacement(Dense(torch.zeros(site.shape))).operator)
    after = own.gradients([images(digits, 2)], [site], memory=2**30, seed=0).moments[site.name].gram
    torch.testing.assert_close(after, before)


class Speaker(nn.Module):
    """A language model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(12, 6), nn.Linear(6, 12)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 2 * self.layer(self.table(input_ids))}


def test_of_token_logits_it_is_the_fisher_information():
    """``½ eᵀ F e`` is the KL divergence that a small error e of the logits makes; and no labels are needed."""
    model = Speaker()
    ids = torch.randint(0, 12, (40, 9), generator=torch.Generator().manual_seed(1))
    graph = ModuleGraph(model, sample={"input_ids": ids[:2]})
    site = next(s for s in graph.linear_sites() if s.name == "layer")
    rounds = [graph.gradients([{"input_ids": ids}], [site], memory=2**30, seed=1000 * k) for k in range(30)]
    assert all(each.tokens for each in rounds)
    found = rounds[0].moments["layer"]
    assert (found.tokens, found.samples) == (360, 40)
    matrix = sum(each.moments["layer"].second() for each in rounds) / len(rounds) * found.tokens / found.samples
    error = 0.01 * torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        before = model(ids)["logits"].double().log_softmax(-1)
        model.layer.bias.add_(error)
        after = model(ids)["logits"].double().log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert float(error @ matrix @ error) / 2 == pytest.approx(divergence, rel=0.1)


def test_hidden_states_are_no_logits():
    class Encoder(Speaker):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"last_hidden_state": super().forward(input_ids)["logits"]}

    graph = ModuleGraph(Encoder(), sample={"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    ids = torch.randint(0, 12, (4, 3))
    assert not graph.gradients([{"input_ids": ids}], list(graph.linear_sites()), memory=2**30, seed=0).tokens
