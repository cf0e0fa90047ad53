"""What is no site, or one that must stay: other readers, bodies, defaults, old files, unknown operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from lrcompile.backends.onnxruntime import lower
from lrcompile.errors import UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify
from tests.graphs.disguises import DISGUISES, IN, LINE, OUT, X, b, close, feeds, made, random_operator, w
from tests.graphs.nets import Shape, built, model, node, normal, run


def frozen(nodes: list[onnx.NodeProto], outputs: dict[str, Shape], weights: dict[str, np.ndarray], **more: Any) -> str:
    """Why the single site of a model is frozen; checks that it cannot be replaced."""
    inputs = [helper.make_tensor_value_info("x", 1, ("n", IN)), helper.make_tensor_value_info("ids", 7, ("n",))]
    outs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in outputs.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", inputs, outs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", more.get("opset", 20))], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    loaded = OnnxGraph.from_proto(proto)
    site = loaded.linear_sites()[0]
    if site.frozen:
        with pytest.raises(UsageError):
            loaded.replace(site, *random_operator(site))
    return site.frozen


def test_tied_embedding() -> None:
    nodes = [node("Gather", "embed ids", "e"), node("Transpose", "embed", "t", perm=[1, 0])]
    nodes += [node("MatMul", "x t", "p")]
    reason = frozen(nodes, {"e": ("n", IN), "p": ("n", OUT)}, {"embed": w()})
    assert "embedding" in reason and "e_node" in reason


def test_weight_that_others_read() -> None:
    twice = [node("MatMul", "x fc", "p"), node("ReduceSum", "fc", "q", keepdims=0)]
    assert "q_node" in frozen(twice, {"p": ("n", OUT), "q": ()}, {"fc": w().T})
    kernel = [node("Unsqueeze", "x two", "line"), node("Conv", "line fc", "p"), node("Relu", "fc", "q")]
    weights = {"fc": w()[:, :, None].copy(), "two": np.array([2])}
    assert "q_node" in frozen(kernel, {"p": ("n", OUT, 1), "q": (OUT, IN, 1)}, weights)
    both = [node("MatMul", "x fc", "p"), node("Transpose", "fc", "t", perm=[1, 0]), node("MatMul", "p t", "q")]
    both.insert(1, node("Relu", "p", "r"))
    both[-1] = node("MatMul", "r t", "q")
    assert "q_node" in frozen(both, {"q": ("n", IN)}, {"fc": w().T})
    output = [node("MatMul", "x fc", "p"), node("Identity", "fc", "q")]
    assert "output" in frozen(output, {"p": ("n", OUT), "q": (IN, OUT)}, {"fc": w().T})


def test_old_operator_set() -> None:
    proto = model([node("MatMul", "x fc", "y")], X, LINE, {"fc": w().T}, opset=6)
    (site,) = OnnxGraph.from_proto(proto).linear_sites()
    assert "opset 6" in site.frozen


def test_a_default_that_may_be_overridden_is_no_constant() -> None:
    proto = made(DISGUISES["matmul"])
    proto.graph.input.append(helper.make_tensor_value_info("fc.weight", 1, (IN, OUT)))
    graph = OnnxGraph.from_proto(proto)
    assert not graph.linear_sites()
    given = feeds(DISGUISES["matmul"])
    close(graph.run(given), run(proto, given))


def test_weights_of_an_old_file_are_constants() -> None:
    """Before IR version 4 every weight had to be listed as an input."""
    case = DISGUISES["gemm"]
    proto = made(case)
    proto.ir_version, proto.opset_import[0].version = 3, 9
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(proto, full_check=True)
    graph = OnnxGraph.from_proto(proto)
    (site,) = graph.linear_sites()
    assert [spec.name for spec in graph.input_specs] == ["x"]
    operator, shift = random_operator(site)
    graph.replace(site, operator, shift)
    given = feeds(case)
    wanted = case.compute(lambda _, x: x @ densify(operator).numpy().T + shift.numpy(), given)
    close(run(built(graph), given), wanted)


def test_an_add_inside_a_body_is_no_bias() -> None:
    out = helper.make_tensor_value_info("t", 1, None)
    then = helper.make_graph([node("Add", "p bias", "t")], "then", [], [out], [])
    other = helper.make_graph(
        [node("Identity", "bias", "e")], "else", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    nodes = [node("MatMul", "x fc", "p"), node("If", "which", "y")]
    nodes[1].attribute.extend([helper.make_attribute("then_branch", then), helper.make_attribute("else_branch", other)])
    inputs = [helper.make_tensor_value_info("x", 1, ("n", IN)), helper.make_tensor_value_info("which", 9, ())]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w().T), "fc"), numpy_helper.from_array(b(), "bias")]
    body = helper.make_graph(nodes, "net", inputs, [helper.make_tensor_value_info("y", 1, (None, None))], tensors)
    graph = OnnxGraph.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    (site,) = graph.linear_sites()
    operator, shift = random_operator(site)
    graph.replace(site, operator, shift)
    x = normal(3, IN)
    wanted = x @ densify(operator).numpy().T + shift.numpy() + b()
    close(run(built(graph), {"x": x, "which": np.array(True)}), {"y": wanted})


def test_unknown_nodes_and_local_functions_are_kept() -> None:
    swish = helper.make_function(
        "custom", "Swish", ["v"], ["o"], [node("Sigmoid", "v", "s"), node("Mul", "v s", "o")],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    nodes = [node("MatMul", "x fc", "p"), node("Swish", "p", "q", domain="custom"), node("MatMul", "q head", "y")]
    proto = model(nodes, X, LINE, {"fc": w(IN).T, "head": w().T}, functions=[swish], check=False)
    graph = OnnxGraph.from_proto(proto)
    new = {site.name: random_operator(site)[0] for site in graph.linear_sites()}
    for site in graph.linear_sites():
        graph.replace(site, new[site.name])
    lowered = built(graph)
    assert lowered.functions[0].name == "Swish" and any(each.op_type == "Swish" for each in lowered.graph.node)
    x = normal(3, IN)
    p = x @ densify(new["fc"]).numpy().T
    close(run(lowered, {"x": x}), {"y": p / (1 + np.exp(-p)) @ densify(new["head"]).numpy().T})

    alien = model([node("Alien", "x", "q", domain="custom"), node("MatMul", "q fc", "y")], X, LINE, {"fc": w().T})
    graph = OnnxGraph.from_proto(alien)
    graph.replace(graph.linear_sites()[0], new["head"])
    assert ("custom", "Alien") in [(each.domain, each.op_type) for each in ir.to_proto(lower(graph)).graph.node]
