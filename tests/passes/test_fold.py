"""The pass that multiplies constants out: what it merges, what it leaves, what rounding it adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lrcompile import optimize
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import (
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    Stack,
    Sum,
    densify,
    low_rank,
)
from lrcompile.passes.fold import Fold, folded_like
from lrcompile.rewrite import Context, Refused, Rewritten
from tests.graphs.nets import built, model, node, normal, run

W, A, B, S = (torch.from_numpy(normal(*shape, seed=i)) for i, shape in enumerate([(12, 10), (2, 10), (12, 2), (12,)]))

MERGED = {
    "an adapter": Sum((Dense(W), Scaled(torch.tensor(2.0), low_rank(B, A)))),
    "a scale": Scaled(torch.tensor(0.5), Dense(W)),
    "a scale for each channel": Product(Diagonal(S), Dense(W)),
    "channels scaled before": Product(Dense(W), Diagonal(S[:10])),
    "picked channels": Product(Select(torch.tensor([3, 1]), 12), Dense(W)),
    "wide in the middle": Product(
        Dense(torch.randn(5, 40)), Product(Dense(torch.randn(40, 40)), Dense(torch.randn(40, 6)))
    ),
    "side by side": Stack((Dense(W), Dense(W[:3] + 1))),
    "a residual": Sum((Dense(torch.randn(6, 6)), Identity(6))),
}  # fmt: skip
STAYS = {
    "two thin factors": low_rank(B, A),
    "a thin factor before codes": Product(
        Dense(torch.randn(8, 8)), Quantized(torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 1), None, 8)
    ),
    "an adapter of codes": Sum(
        (Quantized(torch.ones(12, 10, dtype=torch.int8), torch.ones(12, 1), None, 10), low_rank(B, A))
    ),
    "a convolution in two": Product(Dense(torch.randn(8, 8)), Kron(Dense(torch.randn(2, 3)), Identity(4))),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged(name: str) -> None:
    folded = folded_like(MERGED[name])
    assert isinstance(folded, Dense) and folded.weight.dtype == torch.float32
    exact = densify(MERGED[name]).double()
    torch.testing.assert_close(folded.weight.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    assert folded_like(STAYS[name]) is None


def test_a_chain_is_cut_where_it_is_cheapest() -> None:
    thin = [torch.randn(30, 2), torch.randn(2, 30), torch.randn(30, 30), torch.randn(30, 30)]
    chain: LinearOperator = Dense(thin[-1])
    for factor in reversed(thin[:-1]):
        chain = Product(Dense(factor), chain)
    folded = folded_like(chain)
    assert isinstance(folded, Product) and folded.left.shape == (30, 2) and folded.right.shape == (2, 30)
    torch.testing.assert_close(densify(folded), densify(chain), rtol=1e-4, atol=1e-3)


def test_a_scale_goes_into_a_thin_factor() -> None:
    folded = folded_like(Scaled(torch.tensor(3.0), low_rank(B, A)))
    assert isinstance(folded, Product) and isinstance(folded.left, Dense)
    torch.testing.assert_close(folded.left.weight, 3 * B)


# -- in graphs ---------------------------------------------------------------------------------

VECTORS = {name: normal(6, seed=seed) for seed, name in enumerate(("bias", "gain", "beta", "mean"))}
STATISTICS = {
    "gain": VECTORS["gain"],
    "beta": VECTORS["beta"],
    "mean": VECTORS["mean"],
    "var": np.arange(1, 7, dtype="f"),
}
LINE: dict[str, Any] = {"inputs": {"x": ("n", 6)}, "outputs": {"y": ("n", 6)}}
IMAGE: dict[str, Any] = {"inputs": {"x": ("n", 6, 7, 8)}, "outputs": {"y": ("n", 6, None, None)}}


def lora(base: list[onnx.NodeProto], last: str) -> onnx.ModelProto:
    nodes = [*base, node("MatMul", "x a", "xa"), node("MatMul", "xa b", "xab"), node("Mul", "xab s", "sab"),
             node("Add", f"{last} sab", "y")]  # fmt: skip
    weights = {"w": normal(6, 6), "a": normal(6, 2, seed=1), "b": normal(2, 6, seed=2), "s": np.array(0.5, "f4")}
    return model(nodes, weights={**weights, "bias": VECTORS["bias"]}, **LINE)


NETS: dict[str, onnx.ModelProto] = {
    "adapter": lora([node("MatMul", "x w", "p")], "p"),
    "adapter of a layer with bias": lora([node("MatMul", "x w", "m"), node("Add", "m bias", "p")], "p"),
    "adapter of a gemm": lora([node("Gemm", "x w bias", "p")], "p"),
    "two layers with a bias between": model(
        [node("Gemm", "x w bias", "p"), node("Gemm", "p v bias", "y", beta=0.5)],
        weights={"w": normal(6, 40), "v": normal(40, 6, seed=1), "bias": np.array(0.25, "f4")}, **LINE
    ),
    "a scale behind a bias": model(
        [node("MatMul", "x w", "m"), node("Add", "m bias", "p"), node("Mul", "p gain", "y")],
        weights={"w": normal(6, 6), "bias": VECTORS["bias"], "gain": VECTORS["gain"]}, **LINE
    ),
    "over a number": model(
        [node("Gemm", "x w bias", "p"), node("Div", "p eight", "y")],
        weights={"w": normal(6, 6), "bias": VECTORS["bias"], "eight": np.array(8, "f4")}, **LINE
    ),
    "a norm behind a convolution": model(
        [node("Conv", "x w bias", "p", pads=[1, 1, 1, 1]), node("BatchNormalization", "p gain beta mean var", "y")],
        weights={"w": normal(6, 6, 3, 3), "bias": VECTORS["bias"], **STATISTICS}, **IMAGE
    ),
    "a norm behind a matrix": model(
        [node("MatMul", "x w", "p"), node("BatchNormalization", "p gain beta mean var", "y")],
        weights={"w": normal(6, 6), **STATISTICS}, **LINE
    ),
    "a 1x1 convolution behind a wider one": model(
        [node("Conv", "x w bias", "p", strides=[2, 1]), node("Conv", "p v", "y")],
        weights={"w": normal(20, 6, 3, 2), "v": normal(6, 20, 1, 1, seed=1), "bias": normal(20, seed=2)}, **IMAGE
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_merged_in_a_graph(name: str) -> None:
    proto = NETS[name]
    graph = OnnxGraph.from_proto(proto)
    (outcome,) = Fold().apply(graph, Context(graph))
    assert isinstance(outcome, Rewritten), outcome
    lowered = built(graph)
    assert sum(each.op_type in ("MatMul", "Gemm", "Conv") for each in lowered.graph.node) == 1
    assert len(lowered.graph.node) <= 2
    given = {"x": normal(3, *(dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]), seed=9)}
    wanted, found = run(proto, given)["y"], run(lowered, given)["y"]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def in_float64(proto: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    """The output of a model in double precision, by onnx's own reference."""
    from onnx.reference import ReferenceEvaluator

    wide = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in wide.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), tensor.name))
    for value in (*wide.graph.input, *wide.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return ReferenceEvaluator(wide).run(None, {name: array.astype(np.float64) for name, array in given.items()})[0]


@pytest.mark.parametrize("name", [name for name in NETS if "convolution" not in name])
def test_new_error_is_rounding(name: str) -> None:
    """At most twice the original's own distance from double precision."""
    proto, given = NETS[name], {"x": normal(200, 6, seed=3)}
    graph = OnnxGraph.from_proto(proto)
    Fold().apply(graph, Context(graph))
    exact = in_float64(proto, given)
    own = np.linalg.norm(run(proto, given)["y"] - exact)
    new = np.linalg.norm(run(built(graph), given)["y"] - exact)
    assert new <= 2 * own + 1e-7 * np.linalg.norm(exact)


def test_what_other_layers_read_stays() -> None:
    nodes = [
        node("MatMul", "x w", "p"),
        node("Mul", "p gain", "q"),
        node("MatMul", "x w", "r"),
        node("Max", "q r", "y"),
    ]
    proto = model(nodes, weights={"w": normal(6, 6), "gain": VECTORS["gain"]}, **LINE)
    graph = OnnxGraph.from_proto(proto)
    outcomes = Fold().apply(graph, Context(graph))
    assert [type(outcome) for outcome in outcomes] == [Refused]
    assert "also read by" in outcomes[0].reason  # type: ignore[union-attr]


def test_overflow_is_refused() -> None:
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "p v", "y")]
    weights = {"w": np.full((6, 20), 300, np.float16), "v": np.full((20, 6), 300, np.float16)}
    proto = model(nodes, weights=weights, dtype=np.float16, **LINE)
    graph = OnnxGraph.from_proto(proto)
    (outcome,) = Fold().apply(graph, Context(graph))
    assert isinstance(outcome, Refused) and "overflows" in outcome.reason


def test_an_interior_value_that_is_read_elsewhere_ends_the_expression() -> None:
    nodes = [node("Gemm", "x w bias", "p"), node("Gemm", "p v", "y")]
    weights = {"w": normal(6, 40), "v": normal(40, 6, seed=1), "bias": normal(40, seed=2)}
    proto = model(nodes, {"x": ("n", 6)}, {"y": ("n", 6), "p": ("n", 40)}, weights)
    graph = OnnxGraph.from_proto(proto)
    assert [type(outcome) for outcome in Fold().apply(graph, Context(graph))] == [Refused]


def test_the_whole_job_merges_an_adapter() -> None:
    result = optimize(NETS["adapter of a layer with bias"])
    assert result.report.status == "ok"
    record = next(each for each in result.report.passes if each.name == "fold")
    assert record.rewritten == 1 and record.rolled_back is None
    assert result.built.parameters == 6 * 6 + 6
