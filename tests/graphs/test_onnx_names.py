"""Names of sites and of what replaces them; journal, fingerprint, and the time that a long graph takes."""

from __future__ import annotations

import time

import onnx
import pytest
import torch

from lrcompile.errors import UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, densify
from tests.graphs.disguises import DISGUISES, IN, LINE, OUT, X, b, close, made, random_operator, relu, w
from tests.graphs.nets import built, model, node, normal, run


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
