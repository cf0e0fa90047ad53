"""Statistics of an ONNX model against plain NumPy, and probes against really built models."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from lrcompile.errors import InvalidInputError
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import low_rank
from tests.graphs.disguises import DISGUISES, feeds, made, random_operator
from tests.graphs.nets import built, model, node, normal, run, sites

MEMORY = 2**24
WIDTH = 8


def encoder() -> onnx.ModelProto:
    """Token ids and a padding mask; one layer used twice, one on flattened tokens, an output that is pooled."""
    nodes = [
        node("Gather", "embed ids", "e"),
        node("MatMul", "e up", "u"), node("Add", "u up.bias", "ub"), node("Relu", "ub", "a"),
        node("MatMul", "a up", "v"), node("Add", "v up.bias", "vb"), node("Add", "vb e", "hidden"),
        node("Reshape", "hidden flat", "rows"), node("Gemm", "rows head head.bias", "scores"),
        node("Cast", "attention_mask", "real", to=onnx.TensorProto.FLOAT), node("Unsqueeze", "real two", "column"),
        node("Mul", "hidden column", "masked"), node("ReduceSum", "masked one", "total", keepdims=0),
        node("MatMul", "total pool", "pooled"),
    ]  # fmt: skip
    weights = {"embed": normal(11, WIDTH), "up": normal(WIDTH, WIDTH, seed=1) / 3, "up.bias": normal(WIDTH, seed=2)}
    weights |= {"head": normal(WIDTH, 5, seed=3), "head.bias": normal(5, seed=4), "pool": normal(WIDTH, 3, seed=5)}
    weights |= {"flat": np.array([-1, WIDTH]), "one": np.array([1]), "two": np.array([2])}
    outputs = {"hidden": ("n", "t", WIDTH), "scores": (None, 5), "pooled": ("n", 3)}
    proto = model(nodes, {"x": ("n",)}, outputs, weights, check=False)
    del proto.graph.input[:]
    for name in ("ids", "attention_mask"):
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ("n", "t")))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def batches(count: int = 2) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    made = []
    for size in range(3, 3 + count):
        lengths = random.integers(1, 7, size)
        mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
        made.append({"ids": random.integers(0, 11, (size, 6)), "attention_mask": mask})
    return made


def reference() -> dict[str, np.ndarray]:
    """The vectors that each site reads, padding left out."""
    proto = encoder()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found: dict[str, list[np.ndarray]] = {"up": [], "head": [], "pool": []}
    for batch in batches():
        real = batch["attention_mask"].astype(bool)
        e = weights["embed"][batch["ids"]]
        a = np.maximum(e @ weights["up"] + weights["up.bias"], 0)
        hidden = a @ weights["up"] + weights["up.bias"] + e
        found["up"] += [e[real], a[real]]
        found["head"].append(hidden[real])
        found["pool"].append((hidden * real[:, :, None]).sum(1))
    return {name: np.concatenate(rows).astype(np.float64) for name, rows in found.items()}


@pytest.mark.parametrize("memory", [MEMORY, 1], ids=["together", "one by one"])
def test_moments_leave_padding_out(memory: int) -> None:
    graph = OnnxGraph.from_proto(encoder())
    found = sites(graph)
    moments = graph.observe(batches(), list(found.values()), memory=memory)
    for name, rows in reference().items():
        m = moments[found[name].input]
        assert m.tokens == len(rows)
        np.testing.assert_allclose(m.gram.numpy(), rows.T @ rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(m.mean().numpy(), rows.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(m.absmax.numpy(), np.abs(rows).max(0), rtol=1e-5)
        np.testing.assert_allclose(m.absolute.numpy(), np.abs(rows).sum(0), rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["convolution", "convolution of a volume", "convolution of a line", "gemm that turns its input", "adapter"]
)
def test_moments_are_of_what_meets_the_weight(name: str) -> None:
    case = DISGUISES[name]
    graph, given = OnnxGraph.from_proto(made(case)), feeds(case)
    seen: list[np.ndarray] = []

    def record(site: str, x: np.ndarray) -> np.ndarray:
        seen.append(x.reshape(-1, x.shape[-1]))
        return np.zeros((*x.shape[:-1], 10), np.float32)

    case.compute(record, given)
    (site,) = graph.linear_sites()
    moments = graph.observe([given], [site], memory=MEMORY)[site.input]
    assert moments.tokens == len(seen[0])
    np.testing.assert_allclose(moments.gram.numpy(), seen[0].T @ seen[0], rtol=1e-4, atol=1e-4)


def test_channels_and_columns_of_one_value_are_told_apart() -> None:
    """A value that a MatMul reads along its last axis, and convolutions along its first, with other strides too."""
    nodes = [node("MatMul", "x row", "r"), node("Conv", "x plain", "p"), node("Conv", "x wide", "s", strides=[2])]
    weights = {"row": normal(6, 4), "plain": normal(5, 7, 1), "wide": normal(3, 7, 1)}
    outputs = {"r": ("n", 7, 4), "p": ("n", 5, 6), "s": ("n", 3, 3)}
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 7, 6)}, outputs, weights))
    x = normal(2, 7, 6, seed=7)
    moments = graph.observe([{"x": x}], graph.linear_sites(), memory=MEMORY)
    channels = np.moveaxis(x, 1, -1)
    wanted = {"row": x.reshape(-1, 6), "plain": channels.reshape(-1, 7), "wide": channels[:, ::2].reshape(-1, 7)}
    for name, site in sites(graph).items():
        rows = wanted[name]
        assert moments[site.input].tokens == len(rows)
        np.testing.assert_allclose(moments[site.input].gram.numpy(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_bad_calibration_data_is_named() -> None:
    graph = OnnxGraph.from_proto(made(DISGUISES["two layers of different inputs"]))
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        graph.observe([{"x": np.full((2, 12), np.inf, np.float32)}], graph.linear_sites(), memory=MEMORY)


# -- probes ------------------------------------------------------------------------------------


def measured(proto: onnx.ModelProto, name: str, change: Replacement, given: list[dict[str, np.ndarray]]) -> float:
    """The squared relative change of the outputs when the model is really built with one site replaced."""
    graph = OnnxGraph.from_proto(proto)
    graph.replace(sites(graph)[name], change.operator, change.shift)
    lowered = built(graph)
    change_of: dict[str, float] = {}
    norm: dict[str, float] = {}
    for batch in given:
        mask = batch.get("attention_mask")
        old, new = run(proto, batch), run(lowered, batch)
        for key in old:
            a, b = old[key].astype(np.float64), new[key].astype(np.float64)
            if mask is not None and a.shape[:2] == mask.shape:
                a, b = a[mask.astype(bool)], b[mask.astype(bool)]
            elif mask is not None and len(a) == mask.size:
                a, b = a[mask.astype(bool).ravel()], b[mask.astype(bool).ravel()]
            change_of[key] = change_of.get(key, 0.0) + float(((a - b) ** 2).sum())
            norm[key] = norm.get(key, 0.0) + float((a**2).sum())
    return sum(change_of[key] / norm[key] for key in norm)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("name", DISGUISES)
def test_probes_say_what_building_does(name: str, shifted: bool) -> None:
    proto, given = made(DISGUISES[name]), [feeds(DISGUISES[name])]
    graph = OnnxGraph.from_proto(proto)
    changes = {}
    for seed, site in enumerate(graph.linear_sites()):
        operator, shift = random_operator(site, seed)
        changes[site.name] = Replacement(operator, shift if shifted else None)
    found = graph.probe(given, changes)
    assert found.keys() == changes.keys()
    for site, change in changes.items():
        assert found[site] == pytest.approx(measured(proto, site, change, given), rel=1e-3)
    assert not graph.replacements


def test_probes_of_a_model_with_padding_and_a_layer_used_twice() -> None:
    proto = encoder()
    graph = OnnxGraph.from_proto(proto)
    assert {site.name: len(site.uses) for site in graph.linear_sites()} == {"up": 2, "head": 1, "pool": 1}
    changes = {}
    for site in graph.linear_sites():
        left, right = torch.randn(site.shape[0], 2) / 2, torch.randn(2, site.shape[1]) / 2
        changes[site.name] = Replacement(low_rank(left, right), torch.randn(site.shape[0]))
    found = graph.probe(batches(), changes)
    for site, change in changes.items():
        assert found[site] == pytest.approx(measured(proto, site, change, batches()), rel=1e-3)


def test_a_probe_of_the_same_operator_is_nothing() -> None:
    graph = OnnxGraph.from_proto(encoder())
    found = graph.probe(batches(), {site.name: Replacement(site.operator) for site in graph.linear_sites()})
    assert all(value < 1e-10 for value in found.values())
