"""Rewrites of nodes by onnxscript rules: applied, checked, gated, taken back and reported like any pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase, RewriteRuleSet

from lrcompile import Budget, LowRank, NodeRewrite, Options, Pipeline, optimize
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.graphs.nets import model, node, normal, run

PLAIN = Options(latency=False, settings=Settings(probes=False))


def net(opset: int = 20) -> onnx.ModelProto:
    """A layer, an activation written out, a layer."""
    nodes = [
        node("MatMul", "x w", "h"), node("Div", "h root", "d"), node("Erf", "d", "e"), node("Add", "e one", "p"),
        node("Mul", "h p", "m"), node("Mul", "m half", "g"), node("Relu", "g", "r"), node("Relu", "r", "rr"),
        node("MatMul", "rr v", "y"),
    ]  # fmt: skip
    weights = {"w": normal(24, 48) / 5, "v": normal(48, 20, seed=1) / 7, "root": np.array(2**0.5, "f4"),
               "one": np.array(1, "f4"), "half": np.array(0.5, "f4")}  # fmt: skip
    return model(nodes, {"x": ("n", 24)}, {"y": ("n", 20)}, weights, opset=opset)


DATA = [{"x": normal(8, 24, seed=seed)} for seed in range(6)]


def erf_gelu(op: Any, h: Any, root: Any, one: Any, half: Any) -> Any:
    return op.Mul(op.Mul(h, op.Add(op.Erf(op.Div(h, root)), one)), half)


TWICE = RewriteRule(lambda op, x: op.Relu(op.Relu(x)), lambda op, x: op.Relu(x), name="once")
GELU = RewriteRule(erf_gelu, lambda op, h, **_: op.Gelu(h), name="gelu")
TANH = RewriteRule(erf_gelu, lambda op, h, **_: op.Gelu(h, approximate="tanh"), name="tanh")
WRONG = RewriteRule(lambda op, x: op.Relu(x), lambda op, x: op.Identity(x), name="wrong")


class OnceByClass(RewriteRuleClassBase):
    """The same rule written as a class."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Relu(op.Relu(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Relu(x)


def kinds(result: Any) -> list[str]:
    return [each.op_type for each in result.model.graph]


def the_record(result: Any, name: str) -> Any:
    return next(each for each in result.report.passes if each.name == name)


@pytest.mark.parametrize(
    "rules",
    [TWICE, RewriteRuleSet([TWICE]), [TWICE], OnceByClass, OnceByClass.rule()],
    ids=["rule", "set", "list", "class", "rule of a class"],
)
def test_every_way_to_give_a_rule(rules: Any) -> None:
    graph = OnnxGraph.from_proto(net())
    assert NodeRewrite("once", onnx=rules).apply(graph, Context(graph)) == [Rewritten("rr_node")]
    assert [each.op_type for each in graph.model.graph].count("Relu") == 1


def test_published_and_reported(tmp_path: Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "small.onnx"
    source.write_bytes(net().SerializeToString())
    before = source.read_bytes()
    rewrite = NodeRewrite("tidy", onnx=[TWICE, GELU])
    result = Pipeline([rewrite], options=PLAIN).run(source, out=target)
    assert result.report.status == "ok" and source.read_bytes() == before
    proto = onnx.load(target)
    assert [each.op_type for each in proto.graph.node] == ["MatMul", "Gelu", "Relu", "MatMul"]
    np.testing.assert_allclose(run(proto, DATA[0])["y"], run(net(), DATA[0])["y"], atol=1e-5)
    assert the_record(result, "tidy").rewritten == 2 and the_record(result, "tidy").rolled_back is None
    assert any(note == "tidy: rr_node: " for note in result.report.notes)


def test_a_wrong_rule_is_taken_back() -> None:
    result = Pipeline([NodeRewrite("wrong", onnx=WRONG)], options=PLAIN).run(net())
    assert result.report.status == "unchanged"
    assert "above the limit" in the_record(result, "wrong").rolled_back
    assert kinds(result).count("Relu") == 2


def test_a_rule_that_fails_is_taken_back() -> None:
    def broken(op: Any, x: Any) -> Any:
        raise RuntimeError("no such thing")

    rule = RewriteRule(lambda op, x: op.Relu(x), broken, name="broken")
    result = Pipeline([NodeRewrite("broken", onnx=rule)], options=PLAIN).run(net())
    assert "no such thing" in the_record(result, "broken").rolled_back
    assert result.report.status == "unchanged"


def test_the_opset_is_never_raised() -> None:
    rule = RewriteRule(lambda op, x: op.Relu(op.Relu(x)), lambda op, x: op.Relu(x, _version=22), name="newer")
    result = Pipeline([NodeRewrite("newer", onnx=rule)], options=PLAIN).run(net(opset=20))
    assert result.model.opset_imports[""] == 20
    assert "opset" in (the_record(result, "newer").rolled_back or "opset")


def test_a_lossy_rule_needs_data_and_meets_the_gate() -> None:
    rewrite = NodeRewrite("tanh", onnx=TANH, exact=False)
    with pytest.raises(UsageError, match="not exact needs calibration"):
        Pipeline([rewrite], options=PLAIN).run(net())
    roomy = Options(latency=False, max_drift=0.01)
    result = Pipeline([rewrite], options=roomy).run(net(), DATA)
    drift = result.report.drift
    assert result.report.status == "ok" and drift is not None and drift.relative_l2 is not None
    wanted = np.concatenate([run(net(), batch)["y"] for batch in DATA[5:]])
    found = np.concatenate([result.built.run(batch)["y"] for batch in DATA[5:]])
    assert 0 < drift.relative_l2 <= 0.01  # against the model as it came
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) <= 0.01
    tight = Pipeline([rewrite], options=Options(latency=False, max_drift=1e-6)).run(net(), DATA)
    assert tight.report.status == "unchanged" and "above the limit" in the_record(tight, "tanh").rolled_back


def test_an_exact_pass_after_a_lossy_one_is_measured_against_it() -> None:
    rewrites = [NodeRewrite("tanh", onnx=TANH, exact=False), NodeRewrite("once", onnx=TWICE)]
    result = Pipeline(rewrites, options=Options(latency=False, max_drift=0.01)).run(net(), DATA)
    assert [the_record(result, name).rewritten for name in ("tanh", "once")] == [1, 1]


def test_together_with_a_budget() -> None:
    passes = [LowRank(), NodeRewrite("tidy", onnx=[TWICE, GELU])]
    options = Options(latency=False, max_drift=2.0, settings=Settings(probes=False))
    result = Pipeline(passes, Budget(keep=0.7), options).run(net(), DATA)
    assert "Gelu" in kinds(result) and kinds(result).count("MatMul") > 2
    assert result.report.drift is not None and result.report.drift.relative_l2 > 0
    with pytest.raises(GateError):
        Pipeline(passes, Budget(keep=0.7), Options(latency=False, max_drift=1e-3)).run(net(), DATA)


def test_nothing_to_rewrite_and_no_rules() -> None:
    proto = model([node("Tanh", "x", "y")], {"x": ("n", 4)}, {"y": ("n", 4)}, {})
    assert Pipeline([NodeRewrite("once", onnx=TWICE)], options=PLAIN).run(proto).report.status == "unchanged"
    graph = OnnxGraph.from_proto(net())
    only_fx = NodeRewrite("fx", fx=(lambda x: x, lambda x: x))
    assert isinstance(only_fx.apply(graph, Context(graph))[0], Refused)
    with pytest.raises(UsageError, match="no rewrite rule"):
        NodeRewrite("bad", onnx=lambda x: x).apply(graph, Context(graph))


def test_bodies_are_rewritten_too() -> None:
    from onnx import TensorProto, helper

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", 4])
        return helper.make_graph(list(nodes), name, [], [out])

    then = branch("then", node("Relu", "x", "a"), node("Relu", "a", "t"))
    other = branch("else", node("Neg", "x", "o"))
    nodes = [node("ReduceSum", "x", "s", keepdims=0), node("Greater", "s zero", "c"),
             helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)]  # fmt: skip
    proto = model(nodes, {"x": ("n", 4)}, {"y": ("n", 4)}, {"zero": np.array(0, "f4")})
    result = optimize(proto, passes=[NodeRewrite("once", onnx=TWICE)], options=PLAIN)
    assert the_record(result, "once").rewritten == 1
    for sign in (1, -1):
        given = {"x": sign * np.abs(normal(3, 4))}
        np.testing.assert_array_equal(result.built.run(given)["y"], run(proto, given)["y"])
