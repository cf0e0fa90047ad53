"""Forms of wide convolutions: what is promised is what is built, refits are optimal, the whole job runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lrcompile import Budget, LowRank, Options, Pipeline
from lrcompile.errors import UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify
from lrcompile.passes.conv_low_rank import ConvLowRank
from lrcompile.planning import Settings
from lrcompile.rewrite import Context, Proposal
from lrcompile.windows import site_cost
from tests.graphs.nets import model, node, normal, run

WIDE, OUT = 24, 32


def net(bias: bool = True, kernel: tuple[int, int] = (3, 3)) -> onnx.ModelProto:
    """Two convolutions; the second reads channels that are alike."""
    inputs = "r second.weight second.bias" if bias else "r second.weight"
    nodes = [node("Conv", "x first.weight", "h"), node("Relu", "h", "r"), node("Conv", inputs, "y", pads=[1, 1, 1, 1])]
    mixed = np.einsum("or,rijk->oijk", normal(WIDE, 6, seed=1), normal(6, 4, 1, 1, seed=2))
    weights = {"first.weight": mixed.astype("f"), "second.weight": normal(OUT, WIDE, *kernel, seed=3) / 15}
    weights |= {"second.bias": normal(OUT, seed=4)} if bias else {}
    return model(nodes, {"x": ("n", 4, "h", "w")}, {"y": ("n", OUT, None, None)}, weights)


DATA = [{"x": normal(2, 4, 9, 10, seed=seed)} for seed in range(6)]


def offered(bias: bool, data: bool = True, **options: Any) -> tuple[Context, Any, list[Proposal]]:
    graph = OnnxGraph.from_proto(net(bias))
    site = next(site for site in graph.linear_sites() if site.name == "second")
    moments = graph.observe(DATA, [site], memory=2**30) if data else {}
    context = Context(graph, moments, align=4)
    return context, site, list(ConvLowRank(**options).proposals(site, context))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_promised_is_built(bias: bool, data: bool) -> None:
    context, site, proposals = offered(bias, data)
    assert {proposal.label.split()[0] for proposal in proposals} == {"channel", "spatial", "tucker"}
    for proposal in proposals:
        new = proposal.by[site.name]
        energy = context.energy(site)
        assert context.error(site, new.operator, new.shift) <= 1.05 * proposal.error + 1e-3 * energy, proposal.label
        assert proposal.cost == site_cost(site, new.operator)


def test_refit_is_optimal_and_errors_fall_with_the_rank() -> None:
    context, site, proposals = offered(False)
    for form in ("channel", "spatial", "tucker"):
        errors = [p.error for p in proposals if p.label.startswith(form)]
        assert errors == sorted(errors) and len(errors) > 3
    chosen = next(p for p in proposals if p.label == "channel 12")
    op: Any = chosen.by[site.name].operator
    base = context.error(site, op)
    for seed in range(3):  # any other factor before V is worse
        moved = op.left.weight + 0.01 * torch.from_numpy(normal(*op.left.shape, seed=seed))
        other = type(op)(type(op.left)(moved), op.right)
        assert context.error(site, other) > base


def test_moments_help() -> None:
    """Inputs that lie in few directions are kept; the plain norm cannot know them."""
    context, site, with_data = offered(False)
    _, _, plain = offered(False, data=False)
    pick = [next(p for p in each if p.label == "channel 12") for each in (with_data, plain)]
    errors = [context.error(site, p.by[site.name].operator) for p in pick]
    assert errors[0] < 0.5 * errors[1]


def test_one_form_only_and_bad_options() -> None:
    assert {p.label.split()[0] for p in offered(True, form="tucker")[2]} == {"tucker"}
    with pytest.raises(UsageError, match="unknown form"):
        ConvLowRank(form="tuker")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="damp"):
        ConvLowRank(damp=-1)


def test_layers_without_a_window_are_none_of_its_business() -> None:
    proto = model([node("MatMul", "x w", "y")], {"x": ("n", 40)}, {"y": ("n", 40)}, {"w": normal(40, 40)})
    options = Options(latency=False, data_free=True, max_drift=9, settings=Settings(probes=False))
    planned, _ = Pipeline([ConvLowRank(), LowRank()], Budget(keep=0.7), options).plan(proto)
    assert planned.choices[0].proposal is not None and planned.choices[0].proposal.source == "low-rank"


@pytest.mark.parametrize("budget", [Budget(keep=0.6), Budget(macs=0.6)], ids=str)
def test_the_whole_job(budget: Budget) -> None:
    options = Options(latency=False, max_drift=0.6, settings=Settings(align=4))
    result = Pipeline([LowRank(), ConvLowRank()], budget, options).run(net(), DATA)
    report = result.report
    assert report.status == "ok" and report.after is not None and report.before is not None
    assert report.sites["rewritten"] >= 1
    given = DATA[0]
    wanted, found = run(net(), given)["y"], result.built.run(given)["y"]
    assert np.linalg.norm(found - wanted) <= 0.6 * np.linalg.norm(wanted)
    if budget.macs is not None:
        assert report.after.macs <= 0.6 * report.before.macs
    assert densify(result.graph.linear_sites()[1].operator).shape == (OUT, WIDE * 9)
