"""The identity gauge of half-precision layers: no step that puts channels in order where none is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lrcompile import Budget, LowRank, Options, Pipeline
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Select, leaves
from lrcompile.order import with_columns
from lrcompile.passes.absorb import Absorb
from lrcompile.planning import Settings, free_pivots
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.graphs.nets import built, model, node, normal, run, sites

WIDTH, INNER = 64, 128


def weight(into: int, out: int, seed: int) -> np.ndarray:
    """A matrix whose singular values fall."""
    rank = min(into, out)
    left, right = normal(into, rank, seed=seed), normal(rank, out, seed=seed + 50)
    return ((left * 0.97 ** np.arange(rank)) @ right / rank).astype(np.float16)


WEIGHTS = {
    "gate.weight": weight(WIDTH, INNER, 1), "up.weight": weight(WIDTH, INNER, 2),
    "down.weight": weight(INNER, WIDTH, 3),
    "gate.bias": normal(INNER, seed=4, dtype=np.float16), "scale": normal(INNER, seed=5, dtype=np.float16),
    "half": np.array(0.5, np.float16), "other.weight": weight(INNER, WIDTH, 6),
}  # fmt: skip
GATED = [
    node("MatMul", "x gate.weight", "g0"), node("Add", "g0 gate.bias", "g"), node("Sigmoid", "g", "s"),
    node("Mul", "g s", "a"), node("MatMul", "x up.weight", "u"), node("Mul", "a u", "m"), node("Mul", "m half", "h"),
]  # fmt: skip
GIVEN = {"x": normal(2, 9, WIDTH, seed=7, dtype=np.float16)}


def net(*tail: onnx.NodeProto, outputs: dict[str, Any] | None = None) -> onnx.ModelProto:
    """A gated feed-forward part in float16; the tail reads ``h``, its channels scaled."""
    nodes = [*GATED, *(tail or (node("Mul", "h scale", "t"), node("MatMul", "t down.weight", "y")))]
    read = {name for each in nodes for name in each.input}
    outputs = outputs or {"y": ("n", "t", WIDTH)}
    kept = {name: array for name, array in WEIGHTS.items() if name in read}
    return model(nodes, {"x": ("n", "t", WIDTH)}, outputs, kept, dtype=np.float16)


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in proto.graph.node]


def gauged(graph: OnnxGraph, *names: str, rank: int = 48) -> None:
    """Puts a pivoted identity gauge at sites."""
    context = Context(graph, pivots=free_pivots(graph, graph.linear_sites()))
    for name in names:
        site = sites(graph)[name]
        proposals = LowRank(metric="plain").proposals(site, context)
        chosen = next(p for p in proposals if p.rank == rank and p.form == "gauge")
        graph.replace(site, chosen.by[name].operator, torch.full((site.shape[0],), 0.25))


def test_one_order_for_a_layer_and_its_gate() -> None:
    graph = OnnxGraph.from_proto(net())
    gauged(graph, "gate", "up")
    before = built(graph)
    outcomes = Absorb().apply(graph, Context(graph))
    assert {each.site for each in outcomes if isinstance(each, Rewritten)} == {"gate", "up"}
    after = built(graph)
    assert kinds(before).count("Gather") == 2 and "Gather" not in kinds(after)
    assert sum(tensor.ByteSize() for tensor in after.graph.initializer) < sum(
        tensor.ByteSize() for tensor in before.graph.initializer
    )
    np.testing.assert_allclose(run(after, GIVEN)["y"], run(before, GIVEN)["y"], rtol=2e-2, atol=2e-3)


def test_roll_back_restores_weights_and_constants() -> None:
    graph = OnnxGraph.from_proto(net())
    wanted, mark = built(graph), graph.journal.mark()
    gauged(graph, "gate", "up")
    Absorb().apply(graph, Context(graph))
    graph.rollback(mark)
    assert built(graph).SerializeToString() == wanted.SerializeToString()


@pytest.mark.parametrize("rank", [48, 56])
def test_one_gauge_beside_a_dense_layer(rank: int) -> None:
    graph = OnnxGraph.from_proto(net())
    gauged(graph, "up", rank=rank)
    before = built(graph)
    Absorb().apply(graph, Context(graph))
    after = built(graph)
    assert "Gather" not in kinds(after)
    np.testing.assert_allclose(run(after, GIVEN)["y"], run(before, GIVEN)["y"], rtol=2e-2, atol=2e-3)


OUTSIDE = {
    "an output": net(node("MatMul", "h down.weight", "y"), outputs={"y": ("n", "t", WIDTH), "h": ("n", "t", INNER)}),
    "a softmax": net(node("Softmax", "h", "p"), node("MatMul", "p down.weight", "y")),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_order_that_somebody_sees_stays(name: str) -> None:
    graph = OnnxGraph.from_proto(OUTSIDE[name])
    assert not free_pivots(graph, graph.linear_sites())
    site, context = sites(graph)["gate"], Context(graph)
    assert not any(p.form for p in LowRank(metric="plain").proposals(site, context))
    chosen = next(p for p in LowRank(metric="plain", permute=True).proposals(site, context) if p.form)
    graph.replace(site, chosen.by["gate"].operator)
    before = built(graph)
    assert all(isinstance(each, Refused) for each in Absorb().apply(graph, Context(graph)))
    assert built(graph).SerializeToString() == before.SerializeToString()


def test_two_readers_and_a_layer_that_reads_and_writes() -> None:
    """down's outputs are read by a third layer behind an activation: its rows and columns both move."""
    tail = [node("MatMul", "h down.weight", "d"), node("Relu", "d", "r"), node("MatMul", "r last.weight", "y"),
            node("MatMul", "h other.weight", "z")]  # fmt: skip
    nodes = [*GATED, *tail]
    weights = {k: v for k, v in WEIGHTS.items() if k != "scale"} | {"last.weight": weight(WIDTH, 16, 8)}
    outputs = {"y": ("n", "t", 16), "z": ("n", "t", WIDTH)}
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", "t", WIDTH)}, outputs, weights, dtype=np.float16))
    assert [(r.writers, r.readers) for r in graph.regions()] == [
        (("gate", "up"), ("down", "other")),
        (("down",), ("last",)),
    ]
    gauged(graph, "gate", "up", "down")
    before = built(graph)
    Absorb().apply(graph, Context(graph))
    after = built(graph)
    assert "Gather" not in kinds(after)
    for name, value in run(before, GIVEN).items():
        np.testing.assert_allclose(run(after, GIVEN)[name], value, rtol=2e-2, atol=2e-3)


def test_a_weight_with_two_places_is_left() -> None:
    nodes = [node("MatMul", "x gate.weight", "a"), node("Relu", "a", "r"), node("MatMul", "x gate.weight", "b"),
             node("Tanh", "b", "t"), node("MatMul", "r down.weight", "y"),
             node("MatMul", "t down.weight", "z")]  # fmt: skip
    weights = {name: WEIGHTS[name] for name in ("gate.weight", "down.weight")}
    outputs = {"y": ("n", "t", WIDTH), "z": ("n", "t", WIDTH)}
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", "t", WIDTH)}, outputs, weights, dtype=np.float16))
    assert not graph.regions()


class Gated(torch.nn.Module):
    """The same in torch; a second layer behind an activation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(WIDTH, INNER, bias=bias) for bias in (True, False))
        self.down, self.last = torch.nn.Linear(INNER, WIDTH), torch.nn.Linear(WIDTH, 16)
        for name, layer in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            layer.weight.data = torch.from_numpy(WEIGHTS[f"{name}.weight"].T.copy())
        self.last.weight.data = torch.from_numpy(weight(WIDTH, 16, 8).T.copy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return self.last(torch.relu(self.down(h.view(x.shape[0], x.shape[1], -1)) * 2.0))


MODULES: dict[str, Any] = {
    "module": lambda: Gated().half(),
    "program": lambda: torch.export.export(Gated().half(), (torch.from_numpy(GIVEN["x"]),), strict=False),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules_and_exported_programs(kind: str) -> None:
    data = [{"x": normal(2, 9, WIDTH, seed=seed, dtype=np.float16)} for seed in range(40)]
    torch.manual_seed(0)
    given = MODULES[kind]()
    options = Options(max_drift=0.5, latency=False, settings=Settings(align=4))
    result = Pipeline([LowRank()], Budget(keep=0.85), options).run(given, data)
    assert result.planned is not None
    forms = [choice.proposal.form for choice in result.planned.choices if choice.proposal is not None]
    assert "gauge" in forms
    for site in result.graph.linear_sites():
        assert not any(isinstance(leaf, Select) for leaf in leaves(site.operator)), site.name
    drift, before = result.report.drift, given.module() if kind == "program" else given
    module = result.model.module() if kind == "program" else result.model
    x = torch.from_numpy(GIVEN["x"])
    with torch.no_grad():
        reference, found = before(x).double(), module(x).double()
    assert drift is not None and drift.value is not None
    assert float((found - reference).norm() / reference.norm()) < 2 * drift.value + 0.02


def test_modules_that_cannot_be_traced_have_no_regions() -> None:
    class Untraced(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if bool(x.sum() > -1e9) else x

    graph = ModuleGraph(Untraced().half())
    assert graph.regions() == []
    graph.check({"x": torch.from_numpy(GIVEN["x"])})
    assert graph.regions() == []


def test_a_hidden_reader_keeps_its_order() -> None:
    """A softmax over the channels, and a constant along them, see the order in a traced module."""

    class Seen(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.nn.functional.silu(self.gate(x)) * self.up(x)
            return self.last(torch.relu(self.down(h.softmax(-1))))

    class Scaled(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.linspace(1, 2, INNER))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.nn.functional.silu(self.gate(x)) * self.up(x)
            return self.last(torch.relu(self.down(h * self.scale)))

    for kind in (Seen, Scaled):
        graph = ModuleGraph(kind().half())
        graph.check({"x": torch.from_numpy(GIVEN["x"])})
        assert [region.writers for region in graph.regions()] == [("down",)]


def test_whole_run(tmp_path: Path) -> None:
    """A budget spends the gauge on half-precision layers; the file holds no Gather and does what it should."""
    data = [{"x": normal(1, 40, WIDTH, seed=seed, dtype=np.float16)} for seed in range(12)]
    options = Options(max_drift=0.5, latency=False, settings=Settings(align=4))
    source, out = tmp_path / "net.onnx", tmp_path / "small.onnx"
    onnx.save(net(), source)
    result = Pipeline([LowRank()], Budget(keep=0.85), options).run(source, data, out=out)
    assert result.planned is not None
    forms = {choice.proposal.form for choice in result.planned.choices if choice.proposal is not None}
    assert "gauge" in forms
    proto = onnx.load(out)
    assert "Gather" not in kinds(proto)
    assert result.report.drift is not None and result.report.drift.value is not None
    reference, found = (run(each, GIVEN)["y"].astype(np.float64) for each in (net(), proto))
    assert float(np.linalg.norm(found - reference) / np.linalg.norm(reference)) < 2 * result.report.drift.value + 0.02
    names = [each.name for each in result.report.passes]
    assert names.count("absorb") == 1


def test_no_gauge_is_chosen_that_nothing_would_absorb() -> None:
    data = [{"x": normal(1, 40, WIDTH, seed=seed, dtype=np.float16)} for seed in range(12)]
    options = Options(max_drift=0.5, latency=False, settings=Settings(align=4))
    result = Pipeline([LowRank()], Budget(keep=0.85), options, exact=False).run(net(), data)
    assert result.planned is not None
    assert not any(choice.proposal.form for choice in result.planned.choices if choice.proposal is not None)


def test_a_long_residual_stream_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer adds to one stream that a norm reads: no walk starts anew for each of them."""
    from lrcompile.graphs.onnx.channels import _OnnxFinder

    steps: list[int] = []
    ahead = _OnnxFinder.ahead
    monkeypatch.setattr(_OnnxFinder, "ahead", lambda self, value, walk: (steps.append(1), ahead(self, value, walk))[1])
    counts = []
    for layers in (8, 32):
        nodes, last = [], "x"
        for place in range(layers):
            nodes += [node("Softmax", last, f"n{place}"), node("MatMul", f"n{place} w{place}", f"m{place}"),
                      node("Add", f"{last} m{place}", f"s{place}")]  # fmt: skip
            last = f"s{place}"
        weights = {f"w{place}": weight(16, 16, place) for place in range(layers)}
        graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 16)}, {last: ("n", 16)}, weights, dtype=np.float16))
        steps.clear()
        assert graph.regions() == []
        counts.append(len(steps))
    assert counts[1] <= 4 * counts[0]


class Shuffled(Absorb):
    """A pass that puts channels in the wrong places."""

    def apply(self, graph: Any, context: Context) -> Any:
        outcomes = super().apply(graph, context)
        site = sites(graph)["down"]
        graph.replace(site, with_columns(site.operator, torch.arange(INNER).roll(1)))
        return outcomes


def test_a_wrong_order_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding that half precision is allowed hides no mistake; what was chosen stays, with its permutation."""
    monkeypatch.setattr("lrcompile.passes.absorb.Absorb", Shuffled)
    data = [{"x": normal(1, 40, WIDTH, seed=seed, dtype=np.float16)} for seed in range(12)]
    options = Options(max_drift=0.5, latency=False, settings=Settings(align=4))
    result = Pipeline([LowRank()], Budget(keep=0.85), options).run(net(), data)
    record = next(each for each in result.report.passes if each.name == "absorb")
    assert record.rewritten == 0 and record.rolled_back is not None
    assert any(isinstance(leaf, Select) for site in result.graph.linear_sites() for leaf in leaves(site.operator))
