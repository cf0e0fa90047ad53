"""Quantised weights: DequantizeLinear in all its layouts, and ONNX Runtime's packed MatMulNBits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from lrcompile import Budget, Options, Pipeline, optimize
from lrcompile.backends.onnxruntime import lower
from lrcompile.errors import UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, LinearOperator, Quantized, Sum, densify, low_rank, nbytes, same
from lrcompile.passes.exact_low_rank import ExactLowRank
from lrcompile.passes.fold import Fold
from lrcompile.passes.low_rank import LowRank
from lrcompile.planning import Settings
from lrcompile.rewrite import Context, Refused
from lrcompile.sites import LinearSite
from tests.graphs.nets import built, model, node, normal, run

IN, OUT = 32, 24
LINE: dict[str, Any] = {"inputs": {"x": ("n", IN)}, "outputs": {"y": ("n", OUT)}}
X = {"x": normal(5, IN, seed=9)}


def codes(*shape: int, dtype: Any = np.int8, seed: int = 0) -> np.ndarray:
    low, high = (-100, 100) if dtype == np.int8 else (0, 200)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    return (0.001 * (1 + np.random.default_rng(1).random(shape))).astype(np.float32)


def qdq(weights: dict[str, np.ndarray], *, gemm: bool = False, **attributes: Any) -> onnx.ModelProto:
    names = " ".join(name for name in ("codes", "scale", "zero") if name in weights)
    last = node("Gemm", "x w b", "y", transB=1) if gemm else node("MatMul", "x w", "y")
    more = {"b": normal(OUT, seed=2)} if gemm else {}
    return model(
        [node("DequantizeLinear", names, "w", **attributes), last], weights={**weights, **more}, opset=21, **LINE
    )


LAYOUTS: dict[str, onnx.ModelProto] = {
    "one scale": qdq({"codes": codes(IN, OUT), "scale": scales()}),
    "one scale and a zero": qdq({"codes": codes(IN, OUT, dtype=np.uint8), "scale": scales(), "zero": np.uint8(77)}),
    "a scale for each output": qdq({"codes": codes(IN, OUT), "scale": scales(OUT), "zero": np.zeros(OUT, np.int8)}),
    "zeros for each output": qdq(
        {"codes": codes(IN, OUT, dtype=np.uint8), "scale": scales(OUT), "zero": codes(OUT, dtype=np.uint8)}
    ),
    "a scale for each input": qdq({"codes": codes(IN, OUT), "scale": scales(IN)}, axis=0),
    "rows of a gemm": qdq({"codes": codes(OUT, IN), "scale": scales(OUT)}, gemm=True, axis=0),
    "one scale of a gemm": qdq({"codes": codes(OUT, IN), "scale": scales()}, gemm=True),
    "blocks of a gemm": qdq({"codes": codes(OUT, IN), "scale": scales(OUT, 2)}, gemm=True, axis=1, block_size=16),
    "blocks along the inputs": qdq({"codes": codes(IN, OUT), "scale": scales(4, OUT)}, axis=0, block_size=8),
}


def exactly(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The output without ONNX Runtime's fusions, which round what a quantised weight is multiplied with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = proto.SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content, options).run(None, feeds)[0])


def the_site(graph: OnnxGraph) -> LinearSite:
    (site,) = graph.linear_sites()
    return site


def is_quantised(operator: LinearOperator) -> bool:
    return any(isinstance(each, Quantized) for each in (operator, *vars(operator).values()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_raised(name: str) -> None:
    proto = LAYOUTS[name]
    graph = OnnxGraph.from_proto(proto)
    site = the_site(graph)
    assert site.shape == (OUT, IN) and not site.frozen and is_quantised(site.operator)
    bias = 0 if site.uses[0].bias is None else site.uses[0].bias.numpy()
    np.testing.assert_allclose(X["x"] @ densify(site.operator).numpy().T + bias, exactly(proto, X), atol=1e-4)
    graph.replace(site, site.operator)  # back to a file, and raised again
    lowered = built(graph)
    np.testing.assert_allclose(run(lowered, X)["y"], exactly(proto, X), atol=1e-4)
    again = the_site(OnnxGraph.from_proto(lowered)).operator
    assert same(again, site.operator) and nbytes(again) <= nbytes(site.operator)


def packed(bits: int = 4, block: int = 16, zero: bool = True, bias: bool = False, k: int = IN) -> onnx.ModelProto:
    generator, blocks, share = np.random.default_rng(0), -(-k // block), 8 // bits
    weights: dict[str, np.ndarray] = {
        "fc.weight": generator.integers(0, 256, (OUT, blocks, block // share)).astype(np.uint8),
        "fc.scales": (0.01 * (1 + generator.random(OUT * blocks))).astype(np.float32),
    }
    names = "x fc.weight fc.scales"
    if zero:
        weights["fc.zeros"] = generator.integers(0, 256, OUT * -(-blocks // share)).astype(np.uint8)
        names += " fc.zeros"
    inputs = names.split()
    if bias:
        weights["fc.bias"] = normal(OUT)
        inputs += [""] * (5 - len(inputs)) + ["fc.bias"]
    attributes = {"K": k, "N": OUT, "bits": bits, "block_size": block}
    last = helper.make_node("MatMulNBits", inputs, ["y"], name="fc", domain="com.microsoft", **attributes)
    proto = model([last], {"x": ("n", k)}, {"y": ("n", OUT)}, weights, opset=20, check=False)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


PACKED = {
    "4 bits": packed(),
    "4 bits without zeros": packed(zero=False),
    "8 bits": packed(bits=8, block=32),
    "2 bits": packed(bits=2, block=32),
    "an incomplete block": packed(k=40),
    "with a bias": packed(bias=True),
}


def session_run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray | None:
    try:
        return run(proto, feeds)["y"]
    except Exception as error:  # onnxruntime raises half a dozen unrelated types
        assert "bits" in str(error), error
        return None


@pytest.mark.parametrize("name", PACKED)
def test_packed_codes(name: str) -> None:
    proto = PACKED[name]
    width = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    given = {"x": normal(5, width, seed=9)}
    wanted = session_run(proto, given)
    graph = OnnxGraph.from_proto(proto)
    site = the_site(graph)
    assert site.kind == "MatMulNBits" and isinstance(site.operator, Quantized) and not site.frozen
    bias = 0 if site.uses[0].bias is None else site.uses[0].bias.numpy()
    found = given["x"] @ densify(site.operator).numpy().T + bias
    if wanted is None:
        pytest.skip("this ONNX Runtime has no kernel for that many bits")
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    # codes stay packed, also beside a correction
    better = Sum((site.operator, low_rank(torch.zeros(OUT, 1), torch.zeros(1, width))))
    for new in (site.operator, better):
        graph.replace(site, new)
        lowered = ir.to_proto(lower(graph))
        assert "MatMulNBits" in [each.op_type for each in lowered.graph.node]
        np.testing.assert_allclose(run(lowered, given)["y"], wanted, atol=2e-3 * np.abs(wanted).max())
        again = the_site(OnnxGraph.from_proto(lowered))
        codes = again.operator if isinstance(again.operator, Quantized) else again.operator.terms[0]  # type: ignore
        assert same(codes, site.operator)


@pytest.mark.parametrize("what", ["shuffled columns", "real zeros"])
def test_packed_codes_of_other_kinds_pass_through(what: str) -> None:
    proto = packed(zero=False)
    fc = proto.graph.node[0]
    if what == "shuffled columns":
        fc.input.extend(["", "order"])
        proto.graph.initializer.append(numpy_helper.from_array(np.arange(IN, dtype=np.int32), "order"))
    else:
        fc.input.append("zeros")
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((OUT, 2), np.float32), "zeros"))
    assert OnnxGraph.from_proto(proto).linear_sites() == []
    assert optimize(proto, options=Options(latency=False)).report.status == "unchanged"


ACTIVATIONS: dict[str, Any] = {"xs": np.float32(0.02), "xz": np.uint8(128)}


def activations() -> onnx.ModelProto:
    """A layer as quantisers write it: its input, its weight and its bias are all dequantised."""
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "codes scale zero", "w", axis=0), node("DequantizeLinear", "bq bs", "b"),
        node("Gemm", "xd w b", "y", transB=1),
    ]  # fmt: skip
    weights = {
        **ACTIVATIONS, "codes": codes(OUT, IN), "scale": scales(OUT), "zero": np.zeros(OUT, np.int8),
        "bq": np.arange(OUT, dtype=np.int32), "bs": np.float32(0.01),
    }  # fmt: skip
    return model(nodes, weights=weights, opset=21, **LINE)


def test_a_layer_between_quantised_activations() -> None:
    proto = activations()
    graph = OnnxGraph.from_proto(proto)
    site = the_site(graph)
    assert site.input == "xd" and site.kind == "Gemm" and isinstance(site.operator, Quantized)
    new = low_rank(torch.randn(OUT, 3) / 10, torch.randn(3, IN) / 10)
    graph.replace(site, new)
    lowered = built(graph)
    before = model(proto.graph.node[:2], {"x": ("n", IN)}, {"xd": ("n", IN)}, ACTIVATIONS)
    seen = run(before, X)
    wanted = seen["xd"] @ densify(new).numpy().T + 0.01 * np.arange(OUT)
    np.testing.assert_allclose(run(lowered, X)["y"], wanted, atol=1e-5)


def convolution(axis: int = 0) -> onnx.ModelProto:
    nodes = [node("DequantizeLinear", "codes scale", "w", axis=axis), node("Conv", "x w", "y", pads=[1, 1, 1, 1])]
    weights = {"codes": codes(8, 6, 3, 3), "scale": scales(8 if axis == 0 else 6)}
    return model(nodes, {"x": ("n", 6, "h", "v")}, {"y": ("n", 8, "h", "v")}, weights, opset=21)


def test_kernels() -> None:
    proto = convolution()
    graph = OnnxGraph.from_proto(proto)
    site = the_site(graph)
    assert isinstance(site.operator, Quantized) and site.shape == (8, 54)
    given = {"x": normal(2, 6, 5, 7)}
    graph.replace(site, site.operator)
    lowered = built(graph)
    np.testing.assert_allclose(run(lowered, given)["y"], run(proto, given)["y"], atol=1e-5)
    assert same(the_site(OnnxGraph.from_proto(lowered)).operator, site.operator)
    assert OnnxGraph.from_proto(convolution(axis=1)).linear_sites() == []  # a scale for each input channel


def test_exact_passes_leave_codes_alone() -> None:
    graph = OnnxGraph.from_proto(LAYOUTS["rows of a gemm"])
    for each in (Fold(), ExactLowRank()):
        assert all(isinstance(outcome, Refused) for outcome in each.apply(graph, Context(graph)))
    result = optimize(LAYOUTS["rows of a gemm"], options=Options(latency=False))
    assert result.report.status == "unchanged"


def test_a_budget_of_bytes_never_makes_codes_larger() -> None:
    """Factors in float32 cost four times what codes do: only a rank far below break-even is offered."""
    proto, settings = LAYOUTS["rows of a gemm"], Settings(probes=False, align=1)
    options = Options(latency=False, max_drift=10.0, settings=settings, data_free=True)
    planned, _ = Pipeline([LowRank()], Budget(bytes=0.9), options).plan(proto)
    choice = planned.choices[0]
    assert choice.proposal is not None and choice.proposal.cost.nbytes < choice.before.nbytes
    assert choice.proposal.rank is not None and choice.proposal.rank * (IN + OUT) * 4 < IN * OUT


def test_packed_weights_are_not_written_into_a_window() -> None:
    graph = OnnxGraph.from_proto(convolution())
    with pytest.raises(UsageError):
        graph.replace(the_site(graph), Dense(torch.zeros(8, 5)))


def test_inspect_shows_them(tmp_path: Any) -> None:
    from lrcompile.cli.inspecting import facts

    path = tmp_path / "model.onnx"
    path.write_bytes(packed().SerializeToString())
    found = facts(path)
    (site,) = found["sites"]
    assert (site["kind"], site["shape"]) == ("MatMulNBits", [OUT, IN])
    assert site["structure"] == f"Quantized {OUT}x{IN} 4-bit/16"
    assert found["macs"] == OUT * IN
