"""The pass for memory as a user meets it: beside others, on the command line, in a pipeline."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lrcompile import Budget, LowRank, Options, Pipeline
from lrcompile.errors import UsageError
from lrcompile.passes.schedule_memory import ScheduleMemory
from tests.e2e.tool import Cli
from tests.graphs import tiled_nets as nets

SHAPE = "schedule-memory{shape=batch=1;tokens=128}"


def samples(count: int, tokens: int = 128) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).standard_normal((count, tokens, 16)).astype(np.float32)}


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    onnx.save(nets.causal(), tmp_path / "causal.onnx")
    return tmp_path / "causal.onnx"


def test_sizes_by_name(cli: Cli, causal: Path):
    said = cli.json("optimize", causal, "-o", "small.onnx", "-p", SHAPE, "--force-growth")
    assert said.code == 0, said.err
    report = said.json
    record = next(each for each in report["passes"] if each["name"] == SHAPE)
    assert record["exact"] and record["rewritten"] >= 1 and record["rolled_back"] is None
    assert any("activations at once" in note for note in report["notes"])
    assert Counter(node.op_type for node in onnx.load("small.onnx").graph.node)["Softmax"] > 1
    feeds = samples(3, 50)
    one, two = (onnxruntime.InferenceSession(str(path)).run(None, feeds)[0] for path in (causal, "small.onnx"))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_without_sizes_nothing_is_guessed(cli: Cli, causal: Path):
    said = cli.json("optimize", causal, "-o", "small.onnx", "-p", "schedule-memory")
    assert said.code == 0
    assert said.json["status"] == "unchanged"
    assert any("batch, tokens are not known" in note for note in said.json["notes"])
    assert not Path("small.onnx").exists()


def test_a_larger_file_needs_permission(cli: Cli, causal: Path):
    said = cli.json("optimize", causal, "-o", "small.onnx", "-p", SHAPE)
    assert said.code == 5
    assert not Path("small.onnx").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("schedule-memory{tiles=1}", "tiles"),
        ("schedule-memory{limit=lots}", "limit"),
        ("schedule-memory{rows=3}", "rows"),
    ],
)
def test_options_are_checked(cli: Cli, causal: Path, text: str, word: str):
    said = cli.json("optimize", causal, "-p", text)
    assert said.code == 2
    assert word in said.err


def test_a_shape_that_the_model_does_not_have(cli: Cli, causal: Path):
    said = cli.json("optimize", causal, "-p", "schedule-memory{shape=rows=3}")
    assert said.json["status"] == "unchanged"
    assert any("rows" in each["rolled_back"] for each in said.json["passes"] if each["rolled_back"])


def test_after_low_rank(causal: Path):
    """Weights are factorised first, then what is left is cut; the gate sees the result of both."""
    options = Options(latency=False, max_drift=10.0, force_growth=True)
    passes = [LowRank(), ScheduleMemory()]
    result = Pipeline(passes, Budget(keep=0.8), options).run(causal, samples(12), samples(2))
    rewritten = {each.name: each.rewritten for each in result.report.passes}
    assert rewritten["low-rank"] >= 1 and rewritten["schedule-memory"] >= 1
    assert len([each for each in result.report.passes if each.name == "schedule-memory"]) == 1
    alone = Pipeline([LowRank()], Budget(keep=0.8), options).run(causal, samples(12), samples(2))
    assert result.report.budget["keep"].reached == pytest.approx(alone.report.budget["keep"].reached)
    feeds = samples(1, 77)
    np.testing.assert_allclose(result.built.run(feeds)["y"], alone.built.run(feeds)["y"], rtol=1e-3, atol=1e-4)


def test_a_saved_result_is_the_one_that_was_built(causal: Path, tmp_path: Path):
    passes = [ScheduleMemory(shape="batch=1;tokens=96")]
    result = Pipeline(passes, options=Options(latency=False)).run(onnx.load(causal))
    path = result.save(tmp_path / "saved")
    counts = [
        Counter(node.op_type for node in each)["Softmax"] for each in (result.model.graph, onnx.load(path).graph.node)
    ]
    assert counts[0] == counts[1] > 1


def test_a_module_has_no_nodes():
    result = Pipeline([ScheduleMemory()], options=Options(latency=False)).run(torch.nn.Linear(4, 4), torch.ones(4, 4))
    assert result.report.status == "unchanged"


def test_too_few_tiles():
    with pytest.raises(UsageError):
        ScheduleMemory(tiles=1)
