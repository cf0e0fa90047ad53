"""Row tiles: the same numbers at every size, less alive at once, nothing cut that must stay whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from lrcompile import measure
from lrcompile.errors import LrcompileError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.quantise import quantise
from lrcompile.graphs.onnx.tiling import emit, plan, tiled
from lrcompile.graphs.onnx.tiling.rows import rows
from lrcompile.graphs.onnx.tiling.sizes import measured
from tests.graphs import tiled_nets as nets

GENERATOR = np.random.default_rng(0)


def inputs(model: onnx.ModelProto, **sizes: int) -> dict[str, np.ndarray]:
    """Normal inputs; free dimensions by name, masks with every third position hidden."""
    found = {}
    for value in model.graph.input:
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        array = GENERATOR.standard_normal(shape).astype(np.float32)
        if "mask" in value.name:
            array = np.ones(shape, np.float32)
            array[..., 2::3] = 0
        found[value.name] = array if value.type.tensor_type.elem_type == 1 else np.array(True)
    return found


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)  # type: ignore[return-value]


def tile(model: onnx.ModelProto, **sizes: int) -> plan.Tiling:
    return tiled(OnnxGraph.from_proto(model).model, inputs(model, **sizes))


def proto(tiling: plan.Tiling) -> onnx.ModelProto:
    assert tiling.model is not None, tiling.reason
    return ir.to_proto(tiling.model)


CASES = {
    "masked": (nets.masked, {"batch": 1, "tokens": 96}, 0.6),
    "causal": (nets.causal, {"batch": 1, "tokens": 96}, 0.6),
    "batch": (nets.masked, {"batch": 16, "tokens": 6}, 0.5),
    "mixer": (nets.mixer, {}, 0.5),
    "convolutions": (nets.convolutions, {"batch": 1}, 0.7),
}


@pytest.mark.parametrize("name", CASES)
def test_less_is_alive_and_the_outputs_are_the_same(name: str):
    make, sizes, most = CASES[name]
    model = make()
    found = tile(model, **sizes)
    new = proto(found)
    onnx.checker.check_model(new, full_check=True)
    assert found.after <= most * found.before
    feeds = inputs(model, **sizes)
    np.testing.assert_allclose(run(new, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)
    assert [v.name for v in new.graph.output] == [v.name for v in model.graph.output]
    assert {node.domain for node in new.graph.node} == {""}
    floats = [t for t in new.graph.initializer if t.data_type == 1]
    assert len(floats) == len([t for t in model.graph.initializer if t.data_type == 1])  # weights are stored once


@pytest.mark.parametrize("name", ["masked", "causal"])
@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 40))
def test_free_dimensions_stay_free(name: str, batch: int, tokens: int):
    old, new = _pair(name)
    feeds = inputs(CASES[name][0](), batch=batch, tokens=tokens)
    for one, two in zip(old.run(None, feeds), new.run(None, feeds), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


_PAIRS: dict[str, tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]] = {}


def _pair(name: str) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    if name not in _PAIRS:
        make, sizes, _ = CASES[name]
        both = (make(), proto(tile(make(), **sizes)))
        one, two = (onnxruntime.InferenceSession(each.SerializeToString()) for each in both)
        _PAIRS[name] = one, two
    return _PAIRS[name]


def test_onnxruntime_itself_counts_less(tmp_path: Path):
    """The allocator's own statistics, for the models as ONNX Runtime optimises them."""
    model, sizes = nets.masked(), {"batch": 1, "tokens": 256}
    feeds = tmp_path / "feeds.npz"
    np.savez(feeds, **inputs(model, **sizes))
    peaks = []
    for name, each in (("old", model), ("new", proto(tile(model, **sizes)))):
        onnx.save(each, tmp_path / f"{name}.onnx")
        found = measure.arena(tmp_path / f"{name}.onnx", feeds)
        assert found is not None
        peaks.append(found.requested)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_quantised_model():
    """Q/DQ pairs are cut like any elementwise operator; codes stay equal."""
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal((1, 32, 16)).astype(np.float32)} for _ in range(4)]
    model = ir.to_proto(quantise(OnnxGraph.from_proto(nets.mixer()).model, iter(samples)))
    found = tiled(OnnxGraph.from_proto(model).model, samples[0])
    assert found.after < 0.8 * found.before
    np.testing.assert_allclose(run(proto(found), samples[1])[0], run(model, samples[1])[0], rtol=1e-4, atol=1e-5)


def test_rows_that_the_data_choose_are_left_alone():
    model = nets.by_data()
    found = tile(model, n=64)
    assert found.model is None
    assert "row" in found.reason or "alive" in found.reason or "at " in found.reason


def test_what_a_body_reads_is_put_together():
    model = nets.with_body()
    found = tile(model, n=64)
    feeds = inputs(model, n=64)
    if found.model is not None:
        np.testing.assert_allclose(run(proto(found), feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_the_limit_decides_how_far_it_goes():
    model = nets.masked()
    graph, feeds = OnnxGraph.from_proto(model).model, inputs(model, batch=1, tokens=96)
    counts, peaks = [], []
    for limit in (0.0, 0.6, 1.0):
        found = tiled(graph, feeds, limit=limit)
        counts.append(0 if found.model is None else len(list(found.model.graph)))
        peaks.append(found.after / found.before)
    assert counts[0] > counts[1] > counts[2] == 0
    assert peaks[0] < peaks[1] <= 0.62


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch):
    """A writer that takes the wrong rows for its tiles does not get through."""
    starts = emit.Writer._starts

    def shifted(self: emit.Writer, region: emit.Region, count: int) -> list[ir.Value]:
        found = starts(self, region, count)
        return [found[1], *found[1:]]  # the first rows are lost

    monkeypatch.setattr(emit.Writer, "_starts", shifted)
    with pytest.raises(LrcompileError):
        tile(nets.masked(), batch=1, tokens=96)


OPERATORS = {
    "Add": ("Add (a, b)", {"a": (4, 5), "b": (5,)}, {0, 1}),
    "Where": ("Where (bool, a, b)", {"bool": (3, 4, 5), "a": (4, 1), "b": (3, 1, 5)}, {0, 1, 2}),
    "MatMul": ("MatMul (a, b)", {"a": (2, 3, 4, 5), "b": (3, 5, 6)}, {0, 1, 2}),
    "Gemm": ("Gemm <transB = 1> (a, b, c)", {"a": (4, 5), "b": (6, 5), "c": (6,)}, {0}),
    "Softmax": ("Softmax <axis = 1> (a)", {"a": (3, 4, 5)}, {0, 2}),
    "LayerNormalization": ("LayerNormalization <axis = 1> (a, b)", {"a": (3, 4, 5), "b": (4, 5)}, {0}),
    "Transpose": ("Transpose <perm = [2, 0, 1]> (a)", {"a": (3, 4, 5)}, {0, 1, 2}),
    "Concat": ("Concat <axis = 1> (a, b)", {"a": (3, 4), "b": (3, 4)}, {0}),
    "ArgMax": ("ArgMax <axis = 1, keepdims = 0> (a)", {"a": (3, 4, 5)}, {0, 1}),
    "Conv 1x1": ("Conv (a, b)", {"a": (2, 3, 4, 5), "b": (6, 3, 1, 1)}, {0, 2, 3}),
    "Conv 3x3": ("Conv (a, b)", {"a": (2, 3, 4, 5), "b": (6, 3, 3, 3)}, {0}),
    "MaxPool": ("MaxPool <kernel_shape = [3, 3]> (a)", {"a": (2, 3, 4, 5)}, {0}),
    "Einsum": ('Einsum <equation = "bid,bjd->bij"> (a, b)', {"a": (2, 4, 5), "b": (2, 6, 5)}, {0, 1, 2}),
    "Softplus": ("Softplus (a)", {"a": (3, 4)}, {0, 1}),
    "Gather": ("Gather <axis = 1> (a, int)", {"a": (3, 4, 5), "int": (2, 3)}, {0, 1, 2, 3}),
    "GatherElements": ("GatherElements <axis = 1> (a, int)", {"a": (3, 4), "int": (3, 2)}, {0}),
}
"""One operator on inputs of these shapes, and the axes along which rows can be computed one by one."""


@pytest.mark.parametrize("name", OPERATORS)
def test_rules_name_the_rows_that_are_needed(name: str):
    """Every rule against its operator: rows of the output from the rows that the rule names, and no axis is missed."""
    call, shapes, expected = OPERATORS[name]
    feeds = {each: _array(each, shape) for each, shape in shapes.items()}
    full = _run_call(call, feeds)
    graph = OnnxGraph.from_proto(_single(call, feeds, full)).model
    node, sizes = graph.graph[0], measured(graph, feeds)
    found = {axis: rows(node, axis, sizes) for axis in range(full.ndim)}
    assert {axis for axis, axes in found.items() if axes is not None} == expected
    for axis in expected:
        part = dict(feeds)
        for value, along in zip(node.inputs, found[axis] or (), strict=True):
            if value is not None and along is not None:
                part[str(value.name)] = np.take(feeds[str(value.name)], [1, 0], along)
        np.testing.assert_allclose(_run_call(call, part), np.take(full, [1, 0], axis), rtol=1e-5, atol=1e-6)


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "int":
        return GENERATOR.integers(0, 4, shape)
    return GENERATOR.random(shape) < 0.5 if name == "bool" else GENERATOR.standard_normal(shape).astype(np.float32)


def _run_call(call: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The operator in ONNX's own reference evaluator, which needs no declared output."""
    return ReferenceEvaluator(_single(call, feeds, None)).run(None, feeds)[0]


def _single(call: str, feeds: dict[str, np.ndarray], output: np.ndarray | None) -> onnx.ModelProto:
    kinds = {"f": "float", "i": "int64", "b": "bool"}

    def typed(name: str, array: np.ndarray) -> str:
        return f"{kinds[array.dtype.kind]}[{', '.join(map(str, array.shape))}] {name}"

    ends = ", ".join(typed(name, array) for name, array in feeds.items())
    out = "float y" if output is None else typed("y", output)
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> m ({ends}) => ({out}) {{ y = {call} }}')


def test_a_better_order_where_nothing_can_be_cut():
    model = nets.branches()
    found = tile(model)
    assert [name for name, _ in found.parts] == ["graph"]
    assert found.after < 0.85 * found.before
    feeds = inputs(model)
    np.testing.assert_array_equal(run(proto(found), feeds)[0], run(model, feeds)[0])
    assert tile(proto(found)).model is None  # there is nothing left to do


def test_the_same_model_gives_the_same_file():
    one, two = (json.dumps(str(proto(tile(nets.causal(), batch=1, tokens=96)))) for _ in range(2))
    assert one == two
