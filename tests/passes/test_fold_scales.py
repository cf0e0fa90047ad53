"""Scales before layers go into their weights, where nobody else reads what they scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lrcompile import Options, Pipeline
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.passes.fold_scales import FoldScales
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.graphs.nets import built, model, node, normal, run

GAIN = normal(8, seed=5)
GIVEN = {"x": normal(3, 5, 8)}


def norm(*readers: onnx.NodeProto, outputs: dict[str, Any], gain: np.ndarray = GAIN, **weights: np.ndarray) -> Any:
    """A norm whose gain the readers read as ``s``."""
    nodes = [node("Mul", "x x", "xx"), node("ReduceMean", "xx axes", "m", keepdims=1), node("Sqrt", "m", "r"),
             node("Div", "x r", "u"), node("Mul", "u gain", "s"), *readers]  # fmt: skip
    more = {"axes": np.array([-1]), "gain": gain}
    shaped = model(nodes, {"x": ("n", "t", 8)}, outputs, weights | more)
    return onnx.shape_inference.infer_shapes(shaped)


W = {"q": normal(8, 6, seed=1), "k": normal(8, 4, seed=2)}
CASES: dict[str, tuple[Any, int]] = {
    "two layers": (
        norm(node("MatMul", "s q", "a"), node("MatMul", "s k", "b"),
             outputs={"a": ("n", "t", 6), "b": ("n", "t", 4)}, **W), 1
    ),
    "one number": (norm(node("MatMul", "s q", "a"), outputs={"a": ("n", "t", 6)}, gain=np.array(0.25, "f4"), **W), 1),
    "somebody else reads it": (
        norm(node("MatMul", "s q", "a"), node("Relu", "s", "b"),
             outputs={"a": ("n", "t", 6), "b": ("n", "t", 8)}, **W), 0
    ),
    "somebody else reads the weight": (
        norm(node("MatMul", "s q", "a"), node("MatMul", "x q", "b"),
             outputs={"a": ("n", "t", 6), "b": ("n", "t", 6)}, **W), 0
    ),
    "it is an output": (norm(node("MatMul", "s q", "a"), outputs={"a": ("n", "t", 6), "s": ("n", "t", 8)}, **W), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_folded_or_left(name: str) -> None:
    proto, count = CASES[name]
    graph = OnnxGraph.from_proto(proto)
    outcomes = FoldScales().apply(graph, Context(graph))
    assert sum(isinstance(outcome, Rewritten) for outcome in outcomes) == count
    lowered = built(graph)
    assert len(lowered.graph.node) == len(proto.graph.node) - count
    assert ("gain" in [tensor.name for tensor in lowered.graph.initializer]) == (count == 0)
    for key, wanted in run(proto, GIVEN).items():
        np.testing.assert_allclose(run(lowered, GIVEN)[key], wanted, atol=1e-5)


def test_a_gemm_that_turns_its_weight() -> None:
    nodes = [node("Mul", "x gain", "s"), node("Gemm", "s w b", "y", transB=1, alpha=0.5)]
    weights = {"gain": GAIN, "w": normal(6, 8), "b": normal(6)}
    proto = model(nodes, {"x": ("n", 8)}, {"y": ("n", 6)}, weights)
    graph = OnnxGraph.from_proto(proto)
    assert graph.fold_scales()[0] == ["s_node"]
    given = {"x": normal(4, 8)}
    np.testing.assert_allclose(run(built(graph), given)["y"], run(proto, given)["y"], atol=1e-5)


def test_a_vector_that_spreads_a_single_channel_stays() -> None:
    nodes = [node("Mul", "x gain", "s"), node("MatMul", "s w", "y")]
    proto = model(nodes, {"x": ("n", 1)}, {"y": ("n", 6)}, {"gain": GAIN, "w": normal(8, 6)})
    assert OnnxGraph.from_proto(proto).fold_scales()[0] == []


def test_overflow_stays() -> None:
    nodes = [node("Mul", "x gain", "s"), node("MatMul", "s w", "y")]
    weights = {"gain": np.full(8, 300, np.float16), "w": np.full((8, 6), 300, np.float16)}
    proto = model(nodes, {"x": ("n", 8)}, {"y": ("n", 6)}, weights, dtype=np.float16)
    assert OnnxGraph.from_proto(proto).fold_scales()[0] == []


def test_in_the_whole_job_it_comes_before_what_replaces_weights() -> None:
    proto, _ = CASES["two layers"]
    result = Pipeline([FoldScales()], options=Options(latency=False)).run(proto)
    record = next(each for each in result.report.passes if each.name == "fold-scales")
    assert record.rewritten == 1 and record.rolled_back is None and result.report.status == "ok"


def test_modules_are_refused() -> None:
    graph = ModuleGraph(nn.Sequential(nn.Linear(4, 4)), sample={"input": torch.ones(1, 4).numpy()})
    assert isinstance(FoldScales().apply(graph, Context(graph))[0], Refused)
