"""Every disguise in which a linear layer stands in an ONNX file: found, replaced, and computed as it should be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from lrcompile.errors import UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, LinearOperator, Product, Scaled, Stack, Sum, densify, low_rank
from tests.graphs.nets import Shape, built, model, node, normal, run, sites

IN, OUT = 12, 10
X: dict[str, Shape] = {"x": ("n", IN)}
TOKENS: dict[str, Shape] = {"x": ("n", "t", IN)}
IMAGE: dict[str, Shape] = {"x": ("n", IN, "h", "w")}
Apply = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Disguise:
    """A model, its sites and what it computes, in terms of ``linear(site, x) = x @ W.T + shift``."""

    nodes: list[onnx.NodeProto]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    weights: dict[str, np.ndarray]
    sites: dict[str, str]  # name: kind
    compute: Callable[[Apply, dict[str, np.ndarray]], dict[str, np.ndarray]]
    more: dict[str, Any] = field(default_factory=dict)


def w(out: int = OUT, into: int = IN, seed: int = 0) -> np.ndarray:
    return normal(out, into, seed=seed) / into**0.5


def b(size: int = OUT, seed: int = 100) -> np.ndarray:
    return normal(size, seed=seed)


def last(array: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(array, 1, -1)


def first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 1)


def relu(array: np.ndarray) -> np.ndarray:
    return np.maximum(array, 0)


def constant_node(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name), name=f"{name}_node")


LINE: dict[str, Shape] = {"y": ("n", OUT)}
LINES: dict[str, Shape] = {"y": ("n", "t", OUT)}
MAP: dict[str, Shape] = {"y": ("n", OUT, None, None)}

DISGUISES: dict[str, Disguise] = {
    "matmul": Disguise(
        [node("MatMul", "x fc.weight", "y")], TOKENS, LINES, {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "matmul on a vector": Disguise(
        [node("MatMul", "x fc.weight", "y")], {"x": (IN,)}, {"y": (OUT,)}, {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "matmul and add": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "p fc.bias", "y")], TOKENS, LINES,
        {"fc.weight": w().T, "fc.bias": b()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "bias first": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "fc.bias p", "y")], TOKENS, LINES,
        {"fc.weight": w().T, "fc.bias": b()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "turned weight": Disguise(
        [node("Transpose", "fc.weight", "t", perm=[1, 0]), node("MatMul", "x t", "y")], TOKENS, LINES,
        {"fc.weight": w()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "weight behind an identity": Disguise(
        [node("Identity", "fc.weight", "t"), node("MatMul", "x t", "y")], X, LINE,
        {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "gemm": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transB=1)], X, LINE, {"fc.weight": w(), "fc.bias": b()},
        {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "gemm without bias": Disguise(
        [node("Gemm", "x fc.weight", "y")], X, LINE, {"fc.weight": w().T}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "gemm with alpha and beta": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transB=1, alpha=0.5, beta=3.0)], X, LINE,
        {"fc.weight": w(), "fc.bias": b()}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + 3 * b()},
    ),
    "gemm that turns its input": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transA=1, transB=1)], {"x": (IN, "n")}, LINE,
        {"fc.weight": w(), "fc.bias": b()}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"].T) + b()},
    ),
    "gemm with a scalar bias": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", beta=2.0)], X, LINE,
        {"fc.weight": w().T, "fc.bias": np.array(0.5, np.float32)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + 1},
    ),
    "gemm with a matrix of biases": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y")], {"x": (4, IN)}, {"y": (4, OUT)},
        {"fc.weight": w().T, "fc.bias": normal(4, OUT, seed=3)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + normal(4, OUT, seed=3)},
    ),
    "gemm with a bias for each row": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y")], {"x": (OUT, IN)}, {"y": (OUT, OUT)},
        {"fc.weight": w().T, "fc.bias": normal(OUT, 1, seed=3)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + normal(OUT, 1, seed=3)},
    ),
    "gemm with a computed bias": Disguise(
        [node("Relu", "x", "r"), node("Gemm", "x fc.weight r", "y", beta=0.5)], X, {"y": ("n", IN)},
        {"fc.weight": w(IN).T}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + 0.5 * relu(i["x"])},
    ),
    "convolution": Disguise(
        [node("Conv", "x fc.weight fc.bias", "y", kernel_shape=[1, 1], pads=[0, 0, 0, 0])], IMAGE, MAP,
        {"fc.weight": w()[:, :, None, None], "fc.bias": b()}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])) + b())},
    ),
    "convolution of a line": Disguise(
        [node("Conv", "x fc.weight", "y", strides=[2])], {"x": ("n", IN, "t")}, {"y": ("n", OUT, None)},
        {"fc.weight": w()[:, :, None]}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])[:, ::2]))},
    ),
    "convolution of a volume": Disguise(
        [node("Conv", "x fc.weight fc.bias", "y", strides=[1, 2, 3])], {"x": ("n", IN, "d", "h", "w")},
        {"y": ("n", OUT, None, None, None)},
        {"fc.weight": w()[:, :, None, None, None], "fc.bias": b()}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])[:, :, ::2, ::3]) + b())},
    ),
    "constant node": Disguise(
        [constant_node("/fc/Constant_output_0", w().T), node("MatMul", "x /fc/Constant_output_0", "y", "/fc/MatMul")],
        X, LINE, {}, {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"])},
    ),
    "one weight in two nodes": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "p", "r"), node("Gemm", "r fc.weight fc.bias", "y")],
        X, {"y": ("n", IN)}, {"fc.weight": w(IN).T, "fc.bias": b(IN)}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", relu(f("fc", i["x"]))) + b(IN)},
    ),
    "one weight stored twice, once turned": Disguise(
        [node("MatMul", "x fc.weight", "y"), node("Gemm", "x copy", "z", transB=1)], X, {**LINE, "z": ("n", OUT)},
        {"fc.weight": w().T, "copy": w()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]), "z": f("fc", i["x"])},
    ),
    "a square weight and its transpose": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "p", "r"), node("MatMul", "r back.weight", "y")],
        X, {"y": ("n", IN)}, {"fc.weight": w(IN).T, "back.weight": w(IN)}, {"fc": "MatMul", "back": "MatMul"},
        lambda f, i: {"y": f("back", relu(f("fc", i["x"])))},
    ),
    "adapter": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("MatMul", "x a", "xa"), node("MatMul", "xa bb", "xab"),
         node("Mul", "xab scale", "s"), node("Add", "p s", "sum"), node("Add", "sum fc.bias", "y")],
        TOKENS, LINES,
        {"fc.weight": w().T, "a": w(3, IN, 1).T, "bb": w(OUT, 3, 2).T, "scale": np.array(2, "f4"), "fc.bias": b()},
        {"fc": "MatMul+Mul+Add"}, lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "two layers in a row": Disguise(
        [node("MatMul", "x fc.left", "p"), node("Gemm", "p fc.right bias", "y")], X, LINE,
        {"fc.left": w(5, IN).T, "fc.right": w(OUT, 5, 1).T, "bias": b()}, {"fc": "MatMul+Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "two convolutions in a row": Disguise(
        [node("Conv", "x fc.left", "p", strides=[2, 1]), node("Conv", "p fc.right bias", "y")], IMAGE, MAP,
        {"fc.left": w(5, IN)[:, :, None, None], "fc.right": w(OUT, 5, 1)[:, :, None, None], "bias": b()},
        {"fc": "Conv"}, lambda f, i: {"y": first(f("fc", last(i["x"])[:, ::2]) + b())},
    ),
    "side by side": Disguise(
        [node("MatMul", "x one", "p"), node("MatMul", "x two", "q"), node("Concat", "p q", "y", axis=2)],
        TOKENS, {"y": ("n", "t", 2 * OUT)}, {"one": w().T, "two": w(seed=1).T}, {"one": "MatMul+Concat"},
        lambda f, i: {"y": f("one", i["x"])},
    ),
    "a residual is not swallowed": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "p x", "y")], X, {"y": ("n", IN)}, {"fc.weight": w(IN).T},
        {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"]) + i["x"]},
    ),
    "two layers of different inputs": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "x", "r"), node("MatMul", "r gate.weight", "q"),
         node("Add", "p q", "y")],
        X, LINE, {"fc.weight": w().T, "gate.weight": w(seed=1).T}, {"fc": "MatMul", "gate": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + f("gate", relu(i["x"]))},
    ),
    "an interior output ends an expression": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("MatMul", "p head.weight", "y")], X, {**LINE, "p": ("n", IN)},
        {"fc.weight": w(IN).T, "head.weight": w(seed=1).T}, {"fc": "MatMul", "head": "MatMul"},
        lambda f, i: {"y": f("head", f("fc", i["x"])), "p": f("fc", i["x"])},
    ),
    "a bias that two layers share": Disguise(
        [node("Gemm", "x a.weight bias", "p"), node("Gemm", "x b.weight bias", "q"), node("Mul", "p q", "y")], X, LINE,
        {"a.weight": w().T, "b.weight": w(seed=1).T, "bias": b()}, {"a": "Gemm", "b": "Gemm"},
        lambda f, i: {"y": (f("a", i["x"]) + b()) * (f("b", i["x"]) + b())},
    ),
    "a norm between": Disguise(
        [node("Mul", "x scale", "s"), node("MatMul", "s fc.weight", "y")], X, LINE,
        {"scale": b(IN), "fc.weight": w().T}, {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"] * b(IN))},
    ),
}  # fmt: skip


def made(case: Disguise) -> onnx.ModelProto:
    return model(case.nodes, case.inputs, case.outputs, case.weights, **case.more)


def feeds(case: Disguise) -> dict[str, np.ndarray]:
    sizes = {"n": 3, "t": 5, "d": 4, "h": 5, "w": 4}
    shapes = {name: [sizes.get(str(dim), dim) for dim in shape] for name, shape in case.inputs.items()}
    return {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}  # type: ignore[misc]


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=atol * max(np.abs(array).max(), 1), err_msg=name)


def random_operator(site: Any, seed: int = 0) -> tuple[LinearOperator, torch.Tensor]:
    out, into = site.shape
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator)
    return low_rank(left / 2, right / into**0.5), torch.randn(out, generator=generator)


@pytest.mark.parametrize("name", DISGUISES)
def test_found_as_what_it_computes(name: str) -> None:
    case = DISGUISES[name]
    proto, given = made(case), feeds(case)
    found = sites(OnnxGraph.from_proto(proto))
    assert {site.name: site.kind for site in found.values()} == case.sites
    assert not any(site.frozen for site in found.values())
    wanted = case.compute(lambda site, x: x @ densify(found[site].operator).numpy().T, given)
    close(run(proto, given), wanted)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("name", DISGUISES)
def test_replaced(name: str, shifted: bool) -> None:
    case = DISGUISES[name]
    proto, given = made(case), feeds(case)
    graph = OnnxGraph.from_proto(proto)
    new = {site.name: random_operator(site, seed) for seed, site in enumerate(graph.linear_sites())}
    for site in graph.linear_sites():
        graph.replace(site, new[site.name][0], new[site.name][1] if shifted else None)

    def linear(site: str, x: np.ndarray) -> np.ndarray:
        operator, shift = new[site]
        return x @ densify(operator).numpy().T + (shift.numpy() if shifted else 0)

    lowered = built(graph)
    close(run(lowered, given), case.compute(linear, given))
    assert [v.SerializeToString() for v in lowered.graph.input] == [v.SerializeToString() for v in proto.graph.input]
    assert [v.SerializeToString() for v in lowered.graph.output] == [v.SerializeToString() for v in proto.graph.output]
    gone = {array.shape for array in case.weights.values() if array.ndim >= 2 and "bias" not in name}
    kept = {tuple(tensor.dims) for tensor in lowered.graph.initializer if len(tensor.dims) >= 2}
    assert not gone & kept or "bias" in name or "norm" in name


def test_biases_of_uses() -> None:
    def biases(name: str) -> list[Any]:
        (site,) = OnnxGraph.from_proto(made(DISGUISES[name])).linear_sites()
        return [None if use.bias is None else use.bias.numpy() for use in site.uses]

    np.testing.assert_allclose(biases("matmul and add"), [b()])
    np.testing.assert_allclose(biases("gemm with alpha and beta"), [3 * b()])
    np.testing.assert_allclose(biases("gemm with a scalar bias"), [np.ones(OUT)])
    np.testing.assert_allclose(biases("convolution"), [b()])
    assert biases("gemm with a matrix of biases") == biases("gemm with a computed bias") == [None]
    assert biases("gemm with a bias for each row") == biases("matmul") == [None]
    assert biases("one weight in two nodes")[0] is None


def test_structures() -> None:
    def operator(name: str) -> LinearOperator:
        return OnnxGraph.from_proto(made(DISGUISES[name])).linear_sites()[0].operator

    match operator("adapter"):
        case Sum(terms=(Dense(), Scaled(operator=Product(left=Dense(), right=Dense())))):
            pass
        case other:
            raise AssertionError(other)
    assert isinstance(operator("two layers in a row"), Product)
    assert isinstance(operator("side by side"), Stack)
    assert isinstance(operator("gemm with alpha and beta"), Scaled)


def test_order_of_execution() -> None:
    nodes = [node("MatMul", f"v{i} w{i}", f"p{i}") for i in range(6)]
    nodes = [part for i, each in enumerate(nodes) for part in (each, node("Relu", f"p{i}", f"v{i + 1}"))]
    weights = {f"w{i}": w(IN, IN, i) for i in reversed(range(6))}
    found = OnnxGraph.from_proto(model(nodes, {"v0": ("n", IN)}, {"v6": ("n", IN)}, weights)).linear_sites()
    assert [site.input for site in found] == [f"v{i}" for i in range(6)]


# -- what must stay ----------------------------------------------------------------------------


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


def test_subgraph_weights_are_reported_and_stay() -> None:
    def branch(name: str, seed: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}_y", 1, None)
        nodes = [node("MatMul", f"p {name}_w", f"{name}_y", f"{name}_product")]
        return helper.make_graph(nodes, name, [], [out], [numpy_helper.from_array(w(OUT, OUT, seed), f"{name}_w")])

    nodes = [node("MatMul", "x fc", "p"), node("If", "which", "y")]
    nodes[1].attribute.append(helper.make_attribute("then_branch", branch("then", 1)))
    nodes[1].attribute.append(helper.make_attribute("else_branch", branch("else", 2)))
    inputs = [helper.make_tensor_value_info("x", 1, ("n", IN)), helper.make_tensor_value_info("which", 9, ())]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w().T), "fc")]
    body = helper.make_graph(nodes, "net", inputs, [helper.make_tensor_value_info("y", 1, ("n", OUT))], tensors)
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    graph = OnnxGraph.from_proto(proto)
    assert sorted(graph.subgraph_weights()) == ["else_product", "then_product"]
    (site,) = graph.linear_sites()
    operator, shift = random_operator(site)
    graph.replace(site, operator, shift)
    lowered = built(graph)
    x = normal(3, IN)
    for which, seed in ((True, 1), (False, 2)):
        wanted = (x @ densify(operator).numpy().T + shift.numpy()) @ w(OUT, OUT, seed)
        close(run(lowered, {"x": x, "which": np.array(which)}), {"y": wanted})


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
    import onnx_ir as ir

    from lrcompile.backends.onnxruntime import lower

    assert ("custom", "Alien") in [(each.domain, each.op_type) for each in ir.to_proto(lower(graph)).graph.node]


# -- names -------------------------------------------------------------------------------------


def named(weight: str, label: str, scopes: str | None = None) -> str:
    each = node("MatMul", f"x {weight}", "y", label)
    if scopes is not None:
        each.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    return OnnxGraph.from_proto(model([each], X, LINE, {weight: w().T})).linear_sites()[0].name


def test_names() -> None:
    scopes = "['', 'encoder', 'encoder.layer.0', 'encoder.layer.0.query', 'linear']"
    assert named("encoder.layer.0.query.weight", "n") == "encoder.layer.0.query"
    assert named("val_56", "node_linear_3", scopes) == "encoder.layer.0.query"
    assert named("onnx::MatMul_35", "/encoder/layer.0/query/MatMul") == "encoder.layer.0.query"
    assert named("onnx::MatMul_35", "/encoder/layer.0/query/MatMul_1") == "encoder.layer.0.query"
    assert named("onnx::MatMul_35", "product") == "product"
    assert named("val_56", "node_linear_3", "no list") == "node_linear_3"
    assert named("val_56", "n", "['', 'linear']") == "n"


def test_names_are_unique_and_survive_a_second_pass() -> None:
    nodes = [node("MatMul", "x val_1", "p", "/fc/MatMul"), node("Relu", "p", "r")]
    nodes.append(node("MatMul", "r val_2", "y", "/fc/MatMul"))
    graph = OnnxGraph.from_proto(model(nodes, X, LINE, {"val_1": w(IN).T, "val_2": w().T}))
    assert [site.name for site in graph.linear_sites()] == ["fc", "fc#2"]
    for site in graph.linear_sites():
        graph.replace(site, random_operator(site)[0])
    assert [site.name for site in OnnxGraph.from_proto(built(graph)).linear_sites()] == ["fc", "fc#2"]


def test_new_names_hide_no_old_ones() -> None:
    """Values that are called as the site, and as what lowering would call its own."""
    nodes = [node("MatMul", "x fc.weight", "fc", "fc/MatMul"), node("Relu", "fc", "fc.right")]
    nodes += [node("Relu", "fc.right", "fc/MatMul_output"), node("MatMul", "fc/MatMul_output fc.weight", "fc.left")]
    graph = OnnxGraph.from_proto(model(nodes, X, {"fc.left": ("n", IN)}, {"fc.weight": w(IN).T}))
    (site,) = graph.linear_sites()
    for operator in (random_operator(site)[0], Dense(torch.randn(IN, IN))):
        graph.replace(site, operator, torch.ones(IN))
        lowered = built(graph)
        names = [name for each in lowered.graph.node for name in each.output]
        names += [tensor.name for tensor in lowered.graph.initializer] + ["x"]
        assert len(set(names)) == len(names)
        labels = [each.name for each in lowered.graph.node]
        assert len(set(labels)) == len(labels)
        matrix, x = densify(operator).numpy().T, normal(3, IN)
        close(run(lowered, {"x": x}), {"fc.left": relu(x @ matrix + 1) @ matrix + 1})


# -- cost and state ----------------------------------------------------------------------------


def test_rollback_leaves_the_same_bytes() -> None:
    graph = OnnxGraph.from_proto(made(DISGUISES["adapter"]))
    before, print_before = built(graph).SerializeToString(), graph.fingerprint()
    mark = graph.journal.mark()
    (site,) = graph.linear_sites()
    operator, shift = random_operator(site)
    graph.replace(site, operator, shift)
    assert graph.linear_sites()[0].operator is operator
    once = built(graph).SerializeToString()
    assert built(graph).SerializeToString() == once != before
    graph.replace(site, random_operator(site, 1)[0])
    graph.rollback(mark)
    assert built(graph).SerializeToString() == before
    assert graph.fingerprint() == print_before


def test_refuses_what_does_not_fit() -> None:
    graph = OnnxGraph.from_proto(made(DISGUISES["matmul"]))
    (site,) = graph.linear_sites()
    with pytest.raises(UsageError, match="shape"):
        graph.replace(site, Dense(torch.zeros(OUT, IN + 1)))
    with pytest.raises(UsageError, match="shift"):
        graph.replace(site, Dense(torch.zeros(OUT, IN)), torch.zeros(IN))
    assert not graph.replacements and not graph.journal.entries


def test_fingerprint_tells_structure_and_weights_apart() -> None:
    base = made(DISGUISES["matmul and add"])
    prints = {OnnxGraph.from_proto(base).fingerprint()}
    other = onnx.ModelProto.FromString(base.SerializeToString())
    other.graph.initializer[0].raw_data = w(seed=5).T.tobytes()
    prints.add(OnnxGraph.from_proto(other).fingerprint())
    nodes = [node("Relu", "x", "p"), node("Sigmoid", "x", "q"), node("Sub", "p q", "y")]
    swapped = [node("Relu", "x", "q"), node("Sigmoid", "x", "p"), node("Sub", "p q", "y")]
    prints |= {OnnxGraph.from_proto(model(each, X, {"y": ("n", IN)}, {})).fingerprint() for each in (nodes, swapped)}
    assert len(prints) == 4
    assert OnnxGraph.from_proto(base).fingerprint() in prints


@pytest.mark.parametrize("kind", ["residual", "linear", "identities"])
def test_cost_is_linear(kind: str) -> None:
    """A long chain: no recursion, no quadratic growth."""
    count = 5000 if kind != "residual" else 1250
    weights = {f"w{i}": w(4, 4, i) for i in range(8)}
    nodes, value = [], "x"
    for i in range(count):
        if kind == "residual":
            nodes += [node("MatMul", f"{value} w{i % 8}", f"p{i}"), node("Add", f"p{i} bias", f"q{i}")]
            nodes += [node("Relu", f"q{i}", f"r{i}"), node("Add", f"r{i} {value}", f"v{i}")]
        elif kind == "linear":
            nodes.append(node("MatMul", f"{value} w{i % 8}", f"v{i}"))
        else:
            nodes.append(node("Identity", value if i else "w0", f"v{i}"))
        value = f"v{i}"
    if kind == "identities":
        nodes.append(node("MatMul", f"x {value}", "end"))
        value = "end"
    weights["bias"] = b(4)
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 4)}, {value: ("n", 4)}, weights, check=False))
    start = time.process_time()
    found = graph.linear_sites()
    assert time.process_time() - start < 2
    assert len(found) == {"residual": 8, "linear": 9, "identities": 0}[kind]
    if kind == "residual":
        assert [len(site.uses) for site in found] == [157, 157, 156, 156, 156, 156, 156, 156]
