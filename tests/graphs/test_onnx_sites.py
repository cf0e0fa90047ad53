"""Every disguise of a linear layer: found, replaced, and computed as it should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, LinearOperator, Product, Scaled, Stack, Sum, densify
from tests.graphs.disguises import DISGUISES, IN, OUT, b, close, feeds, made, random_operator, w
from tests.graphs.nets import built, model, node, run, sites


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
