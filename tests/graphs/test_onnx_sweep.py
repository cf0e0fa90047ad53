"""Every operator of ONNX on its way through exact rewrites: nothing crashes, nothing computes something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import lrcompile
from benchmarks.conformance import Tally, behind
from benchmarks.conformance_cases import RANDOM, cases, embedded, equal
from benchmarks.tile_rules import cut_in_two, feeds_of
from lrcompile.errors import LrcompileError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.tiling import plan
from lrcompile.graphs.onnx.tiling.sizes import measured

LIGHT = Path(str(onnx.__file__)).parent / "backend" / "test" / "data" / "light"


def session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def outputs(content: bytes, feeds: list[Any]) -> list[Any] | None:
    """What ONNX Runtime computes, or None where it has no kernel for that."""
    try:
        loaded = session(content)
        names = [value.name for value in loaded.get_inputs()]
        return list(loaded.run(None, dict(zip(names, feeds, strict=False))))
    except Exception:  # half a dozen unrelated types
        return None


def sweep(selected: list[Any], folder: Path) -> int:
    """Optimizes each case and compares; returns how many could be compared."""
    compared = 0
    path = folder / "model.onnx"
    for case in selected:
        content = case.model.SerializeToString()
        path.write_bytes(content)
        result = lrcompile.optimize(path)
        onnx.checker.check_model(ir.to_proto(result.model))
        feeds = case.data_sets[0][0]
        before = outputs(content, feeds)
        if before is None or any(word in case.name for word in RANDOM):
            continue
        after = outputs(ir.to_proto(result.model).SerializeToString(), feeds)
        assert after is not None and equal(before, after), case.name
        compared += 1
    return compared


def test_a_sample_of_all_operators(tmp_path: Path) -> None:
    windows = [case for case in cases() if "hammingwindow" in case.name]  # whose only input has no axis
    assert sweep([*cases()[5::20], *windows], tmp_path) > 50


@pytest.mark.parametrize("word", ["matmul", "gemm", "basic_conv", "if_", "loop", "scan", "sequence"])
def test_what_touches_weights_or_bodies(word: str, tmp_path: Path) -> None:
    chosen = [case for case in cases() if word in case.name][:8]
    assert sweep(chosen, tmp_path) > 0


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_whole_networks(name: str, tmp_path: Path) -> None:
    path = LIGHT / f"light_{name}.onnx"
    result = lrcompile.optimize(path)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    before, after = outputs(path.read_bytes(), [image]), outputs(ir.to_proto(result.model).SerializeToString(), [image])
    assert before is not None and equal(before, after)


def test_a_nan_that_marks_the_end_of_a_set_is_no_weight(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == "test_ai_onnx_ml_tree_ensemble_set_membership")
    assert sweep([case], tmp_path) <= 1  # ONNX Runtime may have no kernel for it
    assert lrcompile.optimize(case.model).report.status == "unchanged"


# -- behind constant linear layers -------------------------------------------------------------


def test_rewrites_are_applied_before_a_sample_of_all_operators() -> None:
    """One case in 24 here; ``python -m benchmarks conformance`` takes all."""
    tally = Tally()
    behind(tally, cases()[7::24])
    assert not tally.crashed and not tally.wrong and not tally.refused
    assert tally.applied.total() >= 50
    assert all(tally.applied[style] >= 0.9 * count for style, count in tally.eligible.items())


def test_what_is_put_before_a_case_hands_on_its_values() -> None:
    case = next(case for case in cases() if case.name == "test_softmax_example")
    for index in range(4):
        made = embedded(case, index)
        assert made is not None
        found = outputs(made.proto.SerializeToString(), list(made.feeds.values()))
        assert found is not None and equal(found, case.data_sets[0][1])


def test_row_tiles_of_a_sample_of_all_operators() -> None:
    """One case in seven; ``python -m benchmarks tile_rules`` takes all."""
    ways = 0
    for case in cases()[11::7]:
        feeds, graph = feeds_of(case), OnnxGraph.from_proto(case.model)
        if feeds is None or len(case.model.graph.node) > 2 or (graph.opset or 0) < plan.OPSET:
            continue
        try:
            measured(graph.model, feeds)
        except LrcompileError:  # ONNX Runtime has no kernel
            continue
        ways += sum(1 for _ in cut_in_two(graph.model, feeds))
    assert ways > 60
