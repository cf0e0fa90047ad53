"""Weights inside the bodies of If, Loop and Scan: found, replaced, probed and planned like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lrcompile import Budget, LowRank, Options, Pipeline, optimize
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify, low_rank
from lrcompile.planning import Settings
from tests.graphs.disguises import random_operator
from tests.graphs.nets import built, node, normal, run, sites

SIZE = 24


def weight(seed: int, rank: int = SIZE) -> np.ndarray:
    return (normal(SIZE, rank, seed=seed) @ normal(rank, SIZE, seed=seed + 50) / SIZE).astype(np.float32)


def info(name: str, shape: Sequence[Any] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def body(
    name: str, nodes: list[onnx.NodeProto], ins: list[Any], outs: list[Any], **weights: np.ndarray
) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, ins, outs, [numpy_helper.from_array(w, key) for key, w in weights.items()])


def whole(nodes: list[onnx.NodeProto], ins: list[Any], **weights: np.ndarray) -> onnx.ModelProto:
    shape = [dim.dim_param or dim.dim_value for dim in ins[0].type.tensor_type.shape.dim]
    graph = body("net", nodes, ins, [info("y", shape)], **weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto)
    return proto


def branches(rank: int = SIZE) -> onnx.ModelProto:
    """Two branches with weights of their own, one of which reads a weight of the main graph, too."""
    then = body("then", [node("MatMul", "p then.weight", "a"), node("Add", "a then.bias", "t")], [],
                [info("t", ["n", SIZE])], **{"then.weight": weight(1, rank), "then.bias": normal(SIZE)})  # fmt: skip
    other = body("else", [node("Tanh", "p", "b"), node("MatMul", "b fc.weight", "e")], [], [info("e", ["n", SIZE])])
    nodes = [node("MatMul", "x fc.weight", "p"),
             helper.make_node("If", ["which"], ["y"], name="if", then_branch=then, else_branch=other)]  # fmt: skip
    ins = [info("x", ["n", SIZE]), info("which", [], TensorProto.BOOL)]
    return whole(nodes, ins, **{"fc.weight": weight(0)})


def loop(rank: int = SIZE) -> onnx.ModelProto:
    """The same layer applied three times."""
    step = body("step", [node("MatMul", "h step.weight", "m"), node("Tanh", "m", "h_out"),
                         node("Identity", "going", "going_out")],
                [info("i", [], TensorProto.INT64), info("going", [], TensorProto.BOOL), info("h", ["n", SIZE])],
                [info("going_out", [], TensorProto.BOOL), info("h_out", ["n", SIZE])],
                **{"step.weight": weight(2, rank)})  # fmt: skip
    nodes = [helper.make_node("Loop", ["three", "yes", "x"], ["y"], name="loop", body=step)]
    return whole(nodes, [info("x", ["n", SIZE])], three=np.array(3), yes=np.array(True))


def scan(rank: int = SIZE) -> onnx.ModelProto:
    """A recurrent layer over the first axis; its weight is a constant of the main graph."""
    step = body("step", [node("MatMul", "h recurrent", "m"), node("Add", "m x_t", "s"), node("Tanh", "s", "h_out"),
                         node("Identity", "h_out", "y_t")],
                [info("h", ["n", SIZE]), info("x_t", ["n", SIZE])],
                [info("h_out", ["n", SIZE]), info("y_t", ["n", SIZE])])  # fmt: skip
    nodes = [node("MatMul", "x in.weight", "u"), node("ReduceSum", "u one", "h0", keepdims=0)]
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    nodes.append(
        helper.make_node("Scan", ["h0", "u"], ["last", "y"], name="scan", body=step, num_scan_inputs=1, **axes)
    )
    weights = {"in.weight": weight(3), "recurrent": weight(4, rank), "one": np.array([1])}
    return whole(nodes, [info("x", ["n", "t", SIZE])], **weights)


def nested() -> onnx.ModelProto:
    """An If within a Loop."""
    inner = body(
        "inner", [node("MatMul", "h deep.weight", "d")], [], [info("d", ["n", SIZE])], **{"deep.weight": weight(5)}
    )
    idle = body("idle", [node("Neg", "h", "k")], [], [info("k", ["n", SIZE])])
    step = body("step", [node("Greater", "i zero", "late"), node("Identity", "going", "going_out"),
                         helper.make_node("If", ["late"], ["h_out"], name="if", then_branch=inner, else_branch=idle)],
                [info("i", [], TensorProto.INT64), info("going", [], TensorProto.BOOL), info("h", ["n", SIZE])],
                [info("going_out", [], TensorProto.BOOL), info("h_out", ["n", SIZE])])  # fmt: skip
    nodes = [helper.make_node("Loop", ["three", "yes", "x"], ["y"], name="loop", body=step)]
    return whole(nodes, [info("x", ["n", SIZE])], three=np.array(3), yes=np.array(True), zero=np.array(0))


MODELS = {"if": branches, "loop": loop, "scan": scan, "nested": nested}
KINDS = {
    "if": {"fc": "MatMul", "then": "MatMul in If"},
    "loop": {"step": "MatMul in Loop"},
    "scan": {"in": "MatMul", "recurrent": "MatMul in Scan"},
    "nested": {"deep": "MatMul in If"},
}


def feeds(name: str, seed: int = 0, which: bool = True) -> dict[str, np.ndarray]:
    if name == "if":
        return {"x": normal(5, SIZE, seed=seed), "which": np.array(which)}
    return {"x": normal(4, 3, SIZE, seed=seed) if name == "scan" else normal(5, SIZE, seed=seed)}


def by_hand(name: str, w: dict[str, np.ndarray], shift: dict[str, np.ndarray], given: dict[str, Any]) -> np.ndarray:
    """What a model computes with other weights (out, in) and constants added to their outputs."""

    def f(site: str, x: np.ndarray) -> np.ndarray:
        return x @ w[site].T + shift.get(site, 0)

    x = given["x"]
    if name == "if":
        p = f("fc", x)
        return f("then", p) + normal(SIZE) if given["which"] else f("fc", np.tanh(p))
    if name == "loop":
        for _ in range(3):
            x = np.tanh(f("step", x))
        return x
    if name == "nested":
        return f("deep", f("deep", -x))
    u = f("in", x)
    h, found = u.sum(1), []
    for each in np.moveaxis(u, 1, 0):
        h = np.tanh(f("recurrent", h) + each)
        found.append(h)
    return np.stack(found, 1)


@pytest.mark.parametrize("which", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_found_and_replaced(name: str, which: bool) -> None:
    proto, given = MODELS[name](), feeds(name, which=which)
    graph = OnnxGraph.from_proto(proto)
    found = sites(graph)
    assert {site.name: site.kind for site in found.values()} == KINDS[name]
    assert not any(site.frozen for site in found.values())
    weights = {key: densify(site.operator).numpy() for key, site in found.items()}
    np.testing.assert_allclose(by_hand(name, weights, {}, given), run(proto, given)["y"], atol=1e-4)
    new = {key: random_operator(site, seed) for seed, (key, site) in enumerate(found.items())}
    for key, (operator, shift) in new.items():
        graph.replace(found[key], operator, shift)
    lowered = built(graph)
    wanted = by_hand(
        name,
        {key: densify(operator).numpy() for key, (operator, _) in new.items()},
        {key: shift.numpy() for key, (_, shift) in new.items()},
        given,
    )
    np.testing.assert_allclose(run(lowered, given)["y"], wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    stored = [t for g in OnnxGraph.from_proto(lowered).model.graphs() for t in g.initializers.values()]
    assert not any(tuple(value.shape or ()) == (SIZE, SIZE) for value in stored)  # the dense weights are gone
    again = sites(OnnxGraph.from_proto(lowered))
    assert all(site.operator.shape == (SIZE, SIZE) for site in again.values())


@pytest.mark.parametrize("name", MODELS)
def test_probes_run_the_whole_model(name: str) -> None:
    proto = MODELS[name]()
    graph = OnnxGraph.from_proto(proto)
    batches = [feeds(name, seed) for seed in range(2)]
    changes = {site.name: Replacement(*random_operator(site)) for site in graph.linear_sites()}
    found = graph.probe(batches, changes)
    for key, change in changes.items():
        other = OnnxGraph.from_proto(proto)
        other.replace(sites(other)[key], change.operator, change.shift)
        lowered = built(other)
        pairs = [(run(proto, given)["y"], run(lowered, given)["y"]) for given in batches]
        wanted = sum(float(np.square(a - b).sum()) for a, b in pairs) / sum(float(np.square(a).sum()) for a, _ in pairs)
        assert found[key] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["if", "loop", "scan"])
def test_exact_rewrites_reach_bodies(name: str) -> None:
    result = optimize(MODELS[name](4), options=Options(latency=False))
    assert result.report.status == "ok" and result.report.sites["rewritten"] == 1
    for which in (True, False):
        given = feeds(name, which=which)
        np.testing.assert_allclose(result.built.run(given)["y"], run(MODELS[name](4), given)["y"], atol=1e-4)


def test_a_budget_over_a_scan() -> None:
    """A weight in a body has no moments: it is cut in the plain norm, and its probe says what that costs."""
    options = Options(latency=False, max_drift=3.0, settings=Settings(align=2))
    data = [feeds("scan", seed) for seed in range(6)]
    result = Pipeline([LowRank()], Budget(keep=0.6), options).run(scan(), data)
    assert result.report.sites["rewritten"] == 2
    assert result.report.drift is not None and 0 < result.report.drift.relative_l2 <= 3.0
    assert result.report.after is not None and result.report.before is not None
    assert result.report.after.parameters < result.report.before.parameters


def test_two_branches_do_not_share_what_one_computes() -> None:
    """One right factor at sites of both branches and of the main graph is stored once and computed in each."""
    graph = OnnxGraph.from_proto(branches())
    left = low_rank(np_tensor(1, SIZE, 3), np_tensor(2, 3, SIZE))
    for site in graph.linear_sites():
        graph.replace(site, left)
    lowered = built(graph)
    for which in (True, False):
        given = feeds("if", which=which)
        weights = dict.fromkeys(("fc", "then"), densify(left).numpy())
        np.testing.assert_allclose(run(lowered, given)["y"], by_hand("if", weights, {}, given), rtol=1e-3, atol=1e-2)


def np_tensor(seed: int, *shape: int) -> Any:
    return torch.from_numpy(normal(*shape, seed=seed))
