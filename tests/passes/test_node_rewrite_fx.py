"""Rewrites of exported programs by pattern: applied, probed, gated, rolled back and reported like every other pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lrcompile import Budget, LowRank, NodeRewrite, Options, Pipeline, Settings, optimize
from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module import ModuleGraph
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.graphs.exported import exported

PLAIN = Options(latency=False)
DATA = [{"x": np.random.default_rng(seed).standard_normal((8, 16)).astype(np.float32)} for seed in range(6)]


class Net(nn.Module):
    """Two activations written by hand, one of them an output, and a layer that a pattern may take for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.up(x)
        y = y * torch.sigmoid(y)
        z = self.down(y)
        return {"z": z * torch.sigmoid(z), "tail": torch.relu(torch.relu(z))}


def silu() -> NodeRewrite:
    return NodeRewrite("silu", fx=(lambda x: x * torch.sigmoid(x), lambda x: functional.silu(x)), doc="Names SiLU.")


def once() -> Any:
    return lambda x: x.relu().relu(), lambda x: x.relu()


@pytest.fixture
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return exported(Net(), torch.from_numpy(DATA[0]["x"]))


def kinds(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def the_record(result: Any, name: str) -> Any:
    return next(each for each in result.report.passes if each.name == name)


def test_every_match_is_rewritten_and_reported(program: ExportedProgram):
    before = kinds(program)
    result = optimize(program, passes=[NodeRewrite("tidy", fx=[silu().fx, once()])], evaluation=DATA, options=PLAIN)
    assert kinds(program) == before and isinstance(result.model, ExportedProgram)
    after = kinds(result.model)
    assert after.count("aten.silu.default") == 2 and "aten.sigmoid.default" not in after
    assert after.count("aten.relu.default") == 1
    record = the_record(result, "tidy")
    assert (record.rewritten, record.rolled_back, record.exact) == (3, None, True)
    assert result.report.status == "ok" and result.report.drift.relative_l2 < 1e-5
    for size in (1, 5):
        x = torch.randn(size, 16)
        for name, value in program.module()(x).items():
            torch.testing.assert_close(result.model.module()(x)[name], value)


def test_example_inputs_and_parameters(program: ExportedProgram):
    """A pattern over a layer; its parameters go where nothing else reads them."""

    def pattern(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(functional.linear(x, weight, bias))

    def replacement(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight).sigmoid()

    examples = (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    net = exported(nn.Sequential(nn.Linear(16, 4), nn.Sigmoid()), torch.from_numpy(DATA[0]["x"]))
    graph = FxGraph(net)
    assert len(NodeRewrite("no-bias", fx=(pattern, replacement, examples)).apply(graph, Context(graph))) == 1
    assert list(graph.lowered().state_dict) == ["0.weight"]
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        NodeRewrite("no-shapes", fx=(lambda x: x.view(5, 7).T, lambda x: x)).apply(graph, Context(graph))


def test_a_wrong_rewrite_is_taken_back(program: ExportedProgram):
    wrong = NodeRewrite("wrong", fx=(lambda x: x * torch.sigmoid(x), lambda x: x))
    result = Pipeline([wrong], options=PLAIN).run(program, None, DATA)
    assert "above the limit" in the_record(result, "wrong").rolled_back
    assert result.model is program and result.report.status == "unchanged"
    broken = NodeRewrite("broken", fx=(lambda x: x * torch.sigmoid(x), lambda x: x.sum()))
    result = Pipeline([broken], options=PLAIN).run(program, None, DATA)
    assert the_record(result, "broken").rolled_back and result.report.status == "unchanged"


def test_one_that_is_not_exact_meets_the_gate(program: ExportedProgram):
    rewrite = NodeRewrite("hard", fx=(lambda x: x * torch.sigmoid(x), lambda x: functional.hardswish(x)), exact=False)
    roomy = Pipeline([rewrite], options=Options(latency=False, max_drift=1.0)).run(program, DATA)
    assert roomy.report.status == "ok" and 1e-4 < roomy.report.drift.relative_l2 < 1
    found = [roomy.built.run(batch)["z"] for batch in DATA[5:]]
    wanted = [program.module()(torch.from_numpy(batch["x"]))["z"].detach().numpy() for batch in DATA[5:]]
    drift = np.linalg.norm(np.subtract(found, wanted)) / np.linalg.norm(wanted)
    assert 0 < drift <= roomy.report.drift.relative_l2 * 1.001  # against the program as it came
    tight = Pipeline([rewrite], options=Options(latency=False, max_drift=1e-6)).run(program, DATA)
    assert "above the limit" in the_record(tight, "hard").rolled_back


def test_together_with_a_budget(program: ExportedProgram):
    options = Options(latency=False, max_drift=3.0, settings=Settings(probes=False))
    result = Pipeline([LowRank(), silu()], Budget(keep=0.7), options).run(program, DATA)
    after = kinds(result.model)
    assert after.count("aten.silu.default") == 2 and after.count("aten.linear.default") > 2
    graph: Any = result.graph
    mark = graph.journal.mark()
    with pytest.raises(UsageError, match="before weight rewrites"):
        graph.rewrite_nodes([once()])
    assert graph.journal.mark() == mark
    graph.rollback(0)
    assert graph.lowered() is program


def test_what_cannot_be_applied_says_why(program: ExportedProgram):
    graph = FxGraph(program)
    assert silu().apply(graph, Context(graph)) == [Rewritten("mul"), Rewritten("mul_1")]
    module = ModuleGraph(Net())
    (refused,) = silu().apply(module, Context(module))
    assert isinstance(refused, Refused) and "torch.export" in refused.reason
    for fx, message in (
        ((lambda x: x, lambda x: x), "no operation"),
        ((lambda x: x.relu(), lambda x, y: x + y), "takes 1 arguments"),
        ([3], "no pattern"),
    ):
        with pytest.raises(UsageError, match=message):
            NodeRewrite("bad", fx=fx).apply(graph, Context(graph))
    with pytest.raises(UnsupportedError, match="constant tensor"):
        NodeRewrite("bad", fx=(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), lambda x: x)).apply(graph, Context(graph))
