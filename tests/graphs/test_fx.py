"""Exported programs: which sites there are, what they are called, and what replacing them leaves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrcompile.backends.exported import Exported
from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.fx.flat import stored
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import Dense, Product, Scaled, Sum, densify, low_rank, tensors
from tests.graphs.exported import DISGUISED, attending, disguises, exported, sites
from tests.graphs.modules import MEMORY, factors


def whole(operator: Any) -> Any:
    """The same map as two factors of full rank."""
    u, s, v = torch.linalg.svd(densify(operator).double(), full_matrices=False)
    return low_rank((u * s).to(torch.float32), v.to(torch.float32))


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 2e-4) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        scale = max(float(np.abs(value).max()), 1.0)
        np.testing.assert_allclose(found[name] / scale, value / scale, atol=tolerance, err_msg=name)


# -- sites -----------------------------------------------------------------------------------


def test_every_disguise_is_found_under_its_parameters_name():
    model, program, feeds = disguises()
    graph = FxGraph(program)
    found = sites(graph)
    assert {name: site.kind for name, site in found.items() if name in DISGUISED} == DISGUISED
    weights = dict(model.named_parameters())
    for name in ("mm", "matmul", "addmm", "batched", "added", "turned"):  # stored (in, out)
        torch.testing.assert_close(densify(found[name].operator), weights[name].detach().T)
    for name in ("einsum", "functional"):
        torch.testing.assert_close(densify(found[name].operator), weights[name].detach())
    assert found["conv1"].shape == (12, 36) and found["conv2"].window.kernel == (3, 1)
    assert "2 groups" in found["grouped"].frozen and not any(found[name].frozen for name in DISGUISED)
    packed = [site for name, site in found.items() if name.startswith("packed.")]
    torch.testing.assert_close(torch.cat([densify(site.operator) for site in packed]), weights["packed"].detach())
    assert torch.equal(found["addmm"].uses[0].bias, model.bias) and torch.equal(found["added"].uses[0].bias, model.bias)
    assert {found[name].input for name in DISGUISED if not name.startswith("conv")} == {"x"}
    with torch.no_grad():
        wanted = {name: value.numpy() for name, value in model(torch.from_numpy(feeds["x"])).items()}
    close(graph.run(feeds), wanted, 1e-6)


def test_attention_ties_and_adapters():
    model, program, feeds = attending()
    graph = FxGraph(program)
    found = sites(graph)
    assert found["itself.in_proj"].shape == (48, 16) and found["down"].input.count("+") == 1
    parts = [name for name in found if name.startswith("across.in_proj")]
    assert parts == ["across.in_proj.rows_0_16", "across.in_proj.rows_16_48"]
    assert found["head"].frozen.startswith("tied to embedding") and [u.role for u in found["head"].uses] == [
        "apply",
        "rows",
    ]
    match found["again"].operator:
        case Sum(terms=(Dense(weight=weight), Scaled(operator=Product()))):
            assert any(weight is tensor for _, tensor in tensors(found["up"].operator))
        case other:
            pytest.fail(f"{other!r}")
    assert graph.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        wanted = model(torch.from_numpy(feeds["ids"]), torch.from_numpy(feeds["memory"]))
    close(graph.run(feeds), {"output": wanted[0].numpy(), "output_1": wanted[1].numpy()}, 1e-6)


def test_decomposed_programs_have_the_same_sites():
    _, program, feeds = attending()
    graph, lower = FxGraph(program), FxGraph(program.run_decompositions())
    assert lower.nodes > graph.nodes
    one, other = sites(graph), sites(lower)
    shapes = {name: site.shape for name, site in one.items() if name != "again"}  # its adapter is two sites now
    assert shapes.items() <= {name: site.shape for name, site in other.items()}.items()
    close(lower.run(feeds), graph.run(feeds), 1e-6)


def test_what_is_read_by_others_stays():
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
            self.register_buffer("count", torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            y = self.one(x) * self.one.weight.square().sum()
            y = y + x @ self.count
            return (
                y + self.two(x).relu() + nn.functional.linear(x, self.two.weight[:, :8].flip(0)) + self.three(x).relu()
            )

    program = exported(Reading(), torch.randn(2, 8))
    graph = FxGraph(program)
    found = sites(graph)
    feeds = {"x": np.ones((2, 8), np.float32)}
    close(graph.run(feeds), graph.run(feeds), 0)  # every run starts from what is stored
    graph.observe([feeds], graph.linear_sites(), memory=MEMORY)
    assert not program.state_dict["count"].any()
    assert "also read by" in found["one"].frozen
    assert "count" not in found and not found["three"].frozen
    with pytest.raises(UsageError, match="cannot be replaced"):
        graph.replace(found["one"], factors(8, 8, 2))


def test_regions_of_their_own_are_listed_and_can_be_taken_apart():
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inside(x)
            return self.outside(y.float())

    program = exported(Region(), torch.randn(2, 8))
    found = sites(FxGraph(program))
    assert "run_decompositions" in found["inside"].frozen and not found["outside"].frozen
    apart = sites(FxGraph(program.run_decompositions({})))
    assert not apart["inside"].frozen and apart["inside"].kind == "linear"


# -- replacing -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [disguises, attending])
def test_the_program_computes_what_the_expressions_do(make: Any):
    _, program, feeds = make()
    graph = FxGraph(program)
    before, text = graph.run(feeds), str(program.graph)
    for site in graph.linear_sites():
        if not site.frozen and min(site.shape) > 1:
            graph.replace(site, whole(site.operator))
    built: Any = Exported().build(graph)
    close(built.run(feeds), before)
    assert str(program.graph) == text and graph.run(feeds).keys() == before.keys()
    again = built.model.module()
    fed = {name: torch.from_numpy(array[:1]) for name, array in feeds.items()}
    ids = [fed.pop("ids")] if "ids" in fed else [fed.pop("x")]
    assert len(again(*ids, **fed)["hidden" if make is disguises else 0]) == 1  # another batch


def test_dense_weights_are_gone_and_names_stay():
    _, program, _ = attending()
    graph = FxGraph(program)
    for name in ("itself.in_proj", "up", "again", "down"):
        graph.replace(sites(graph)[name], factors(*sites(graph)[name].shape, 3))
    built: Any = Exported().build(graph)
    held = built.model.state_dict
    assert "itself.in_proj_weight" not in held and "up.weight" not in held and "again.weight" not in held
    assert held["up.factors.left.weight"].shape == (32, 3) and held["up.bias"] is program.state_dict["up.bias"]
    removed = 48 * 16 + 32 * 16 + 16 * 32 + 4 * 48
    assert built.parameters == graph.parameters - removed + 3 * (64 + 48 + 48 + 48)
    assert built.parameters == sum(t.numel() for t in stored(built.model).values() if t.is_floating_point())
    assert isinstance(held["up.factors.left.weight"], nn.Parameter) and held["up.factors.left.weight"].requires_grad
    outputs = [spec.arg.name for spec in built.model.graph_signature.output_specs]
    assert outputs == [spec.arg.name for spec in program.graph_signature.output_specs]


def test_one_part_of_a_packed_weight():
    """The other part becomes a weight of its own: the whole need not stay."""
    _, program, feeds = attending()
    graph = FxGraph(program)
    first, second = [site for site in graph.linear_sites() if site.name.startswith("across.in_proj")]
    before = graph.run(feeds)
    graph.replace(second, whole(second.operator))
    built: Any = Exported().build(graph)
    close(built.run(feeds), before)
    assert "across.in_proj_weight" not in built.model.state_dict
    assert built.model.state_dict[f"{first.name}.weight"].shape == first.shape
    assert built.parameters == graph.parameters + 16 * 16


def test_shared_leaves_are_stored_once_and_shifts_added():
    _, program, feeds = disguises()
    graph = FxGraph(program)
    shared = Dense(torch.randn(3, 12) / 4)
    for name in ("mm", "matmul", "linear"):
        graph.replace(sites(graph)[name], Product(Dense(torch.randn(12, 3) / 2), shared), torch.ones(12))
    built: Any = Exported().build(graph)
    assert sum(tensor.shape == (3, 12) for tensor in built.model.state_dict.values()) == 1
    with graph.as_given():
        before = graph.run(feeds)
    after = built.run(feeds)
    assert any(np.abs(after[name] - before[name]).max() > 1e-3 for name in before)
    wanted = graph.model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    close(after, {name: value.detach().numpy() for name, value in wanted.items()}, 1e-5)


def test_rolling_back():
    _, program, feeds = attending()
    graph = FxGraph(program)
    before = graph.run(feeds)
    mark = graph.journal.mark()
    graph.replace(sites(graph)["up"], factors(32, 16, 2))
    assert Exported().build(graph).parameters != graph.parameters
    graph.rollback(mark)
    built: Any = Exported().build(graph)
    assert built.model is program
    close(built.run(feeds), before, 0)


# -- measuring -------------------------------------------------------------------------------


def test_statistics_are_those_of_the_module():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 5))
    program = exported(copy.deepcopy(model), torch.randn(3, 7, 12))
    batches = [{"input": np.random.default_rng(seed).standard_normal((4, 7, 12)).astype(np.float32)} for seed in (0, 1)]
    graph, module = FxGraph(program), ModuleGraph(model.eval())
    assert [site.name for site in graph.linear_sites()] == [site.name for site in module.linear_sites()]
    one = graph.observe(batches, graph.linear_sites(), memory=MEMORY)
    other = module.observe(batches, module.linear_sites(), memory=MEMORY)
    changes = {}
    for site, twin in zip(graph.linear_sites(), module.linear_sites(), strict=True):
        torch.testing.assert_close(one[site.input].gram, other[twin.input].gram)
        changes[site.name] = Replacement(factors(*site.shape, 2))
    assert graph.probe(batches, changes) == pytest.approx(module.probe(batches, changes), rel=1e-4)
    assert graph.macs(batches[0]) == module.macs(batches[0])
    mine = graph.gradients(batches, graph.linear_sites(), memory=MEMORY, seed=0)
    theirs = module.gradients(batches, module.linear_sites(), memory=MEMORY, seed=0)
    assert mine.tokens == theirs.tokens
    for name, moments in mine.moments.items():
        torch.testing.assert_close(moments.gram, theirs.moments[name].gram)


def test_facts():
    _, program, _ = attending()
    graph = open_graph(program)
    assert isinstance(graph, FxGraph) and graph.kind == "fx"
    assert [(spec.name, spec.shape[1:]) for spec in graph.input_specs] == [("ids", (7,)), ("memory", (5, 16))]
    assert graph.input_specs[0].dtype == np.int64 and isinstance(graph.input_specs[0].shape[0], str)
    assert [each["name"] for each in graph.outputs] == ["output", "output_1"]
    assert graph.fingerprint() == FxGraph(program).fingerprint() != FxGraph(disguises()[1]).fingerprint()


# -- refusals --------------------------------------------------------------------------------


def test_a_parameter_that_holds_nan():
    _, program, _ = attending()
    with torch.no_grad():
        program.state_dict["up.weight"][0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN"):
        FxGraph(program)


def test_an_input_that_is_no_tensor():
    class Counting(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    program = torch.export.export(Counting(), (torch.randn(2), 3), dynamic_shapes=(None, torch.export.Dim.DYNAMIC))
    with pytest.raises(UnsupportedError, match="only tensors"):
        FxGraph(program)
