"""The clean pass: what it takes out of an ONNX file, and that the outputs stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.passes.clean import Clean
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.models import two_layer_mlp

RANDOM = np.random.default_rng(0)
FEEDS = {"x": RANDOM.standard_normal((3, 16)).astype(np.float32)}


def untidy(path: Path) -> Path:
    """x -> Identity -> two equal MatMuls with two copies of one weight -> Add; an unused weight and an unused node."""
    weight = RANDOM.standard_normal((16, 20)).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("MatMul", ["same", "first"], ["a"]),
        helper.make_node("MatMul", ["x", "second"], ["b"]),
        helper.make_node("Relu", ["x"], ["unused"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(weight, name) for name in ("first", "second")]
    tensors.append(numpy_helper.from_array(np.ones((50, 50), np.float32), "never_read"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 20])
    graph = helper.make_graph(nodes, "untidy", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_everything_useless_goes_and_the_outputs_stay(tmp_path: Path):
    graph = OnnxGraph.load(untidy(tmp_path / "untidy.onnx"))
    before = graph.run(FEEDS)
    (outcome,) = Clean().apply(graph, Context(graph))
    assert isinstance(outcome, Rewritten)
    built = OnnxRuntime().build(graph)
    np.testing.assert_allclose(built.run(FEEDS)["y"], before["y"], rtol=1e-6)
    assert built.parameters == 16 * 20
    operators = sorted(node.op_type for node in built.model.graph)
    assert operators == ["Add", "MatMul"]
    assert [value.name for value in (*built.model.graph.inputs, *built.model.graph.outputs)] == ["x", "y"]


def test_it_can_be_taken_back(tmp_path: Path):
    graph = OnnxGraph.load(untidy(tmp_path / "untidy.onnx"))
    mark, nodes = graph.journal.mark(), graph.nodes
    Clean().apply(graph, Context(graph))
    assert graph.nodes < nodes
    graph.rollback(mark)
    assert graph.nodes == nodes


def test_a_tidy_model_is_refused(tmp_path: Path):
    graph = OnnxGraph.load(two_layer_mlp(tmp_path / "mlp.onnx").path)
    (outcome,) = Clean().apply(graph, Context(graph))
    assert isinstance(outcome, Refused) and outcome.reason
    again = OnnxGraph.load(untidy(tmp_path / "untidy.onnx"))
    Clean().apply(again, Context(again))
    assert isinstance(Clean().apply(again, Context(again))[0], Refused)


@pytest.mark.parametrize("module", [nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)])
def test_a_module_is_left_as_it_is(module: nn.Module):
    graph = ModuleGraph(module)
    assert isinstance(Clean().apply(graph, Context(graph))[0], Refused)
    assert graph.run({"input": torch.zeros(1, 4).numpy()})["output"].shape == (1, 3)
