"""Latency as a budget: measured prices, corrections by results, kits, and what is refused.

Time is never asserted here: prices come from tables that are made up, and measured results are replaced where
a test is about what happens with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import helper, numpy_helper

from lrcompile import measure, timing
from lrcompile.budget import Budget
from lrcompile.cli.app import app as application
from lrcompile.costs import CostTable, load, to_json
from lrcompile.errors import InfeasibleError
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline
from lrcompile.planning import Settings
from lrcompile.profiling import here
from tests.e2e.tool import Cli

BATCH = ("--latency-batch", "4")
DATA = ("--calib", "calib.npz", "--eval", "eval.npz")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 256 channels, large enough that time is spent in products; ``c.npz`` beside it."""
    folder = tmp_path_factory.mktemp("wide")
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(3):
        basis = np.linalg.qr(random.standard_normal((256, 256)))[0] * 0.9 ** np.arange(256)
        matrix = (basis @ np.linalg.qr(random.standard_normal((256, 256)))[0]).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{index}"))
        nodes += [helper.make_node("MatMul", [value, f"w{index}"], [f"h{index}"], name=f"m{index}")]
        nodes += [helper.make_node("Tanh", [f"h{index}"], [f"t{index}"], name=f"a{index}")]
        value = f"t{index}"
    ends = [helper.make_tensor_value_info(name, 1, ["batch", 256]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "wide.onnx")
    np.savez(folder / "c.npz", x=random.standard_normal((300, 256)).astype(np.float32))
    return folder


def made_up(path: Path, table: CostTable, **costs: float) -> CostTable:
    """A table in which a form costs what is said here for each share of the dense arithmetic."""
    forms = {
        (shape, form): tuple(
            point._replace(ms=table.dense[shape] * point.macs / (shape.out * shape.into) * costs.get(form, 1.0))
            for point in points
        )
        for (shape, form), points in table.forms.items()
    }
    total = sum(table.counts[shape] * ms for shape, ms in table.dense.items()) / 0.8
    made = replace(table, forms=forms, total=total, scale=1.0)
    path.write_text(json.dumps(to_json(made)))
    return made


@pytest.fixture(scope="module")
def priced(wide: Path) -> Path:
    """A measured table of the wide model, by a kit in a process without anything of ours; then made regular."""
    from lrcompile.cli.app import run

    assert run(["profile", str(wide / "wide.onnx"), "--emit", str(wide / "kit"), "--shape", "batch=64", "-q"]) == 0
    command = [sys.executable, "-I", "measure.py", "--seconds", "0.01", "--threads", "1", "-o", "../measured.json"]
    hide = "import sys; sys.modules.update(dict.fromkeys(('lrcompile', 'torch', 'onnx', 'onnx_ir')))"
    code = f"{hide}; import runpy; sys.argv[:] = {command[2:]}; runpy.run_path('measure.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=wide / "kit", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    made_up(wide / "costs.json", load(wide / "measured.json"))
    return wide


def planned(folder: Path, ratio: float, costs: Any = None, **more: Any):
    options = Options(latency=False, latency_batch=64, costs=costs or folder / "costs.json", threads=1,
                      settings=Settings(probes=False, gradient_samples=0))  # fmt: skip
    return Pipeline([LowRank()], Budget(latency=ratio, **more), options).plan(folder / "wide.onnx", folder / "c.npz")


def test_a_kit_measures_on_its_own(priced: Path):
    """The kit holds no weights, leaves none behind, and its table is complete."""
    names = {path.name for path in (priced / "kit").iterdir()}
    assert {"kit.json", "measure.py", "dense.onnx", "anchor.onnx", "inputs.npz"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    assert sum(path.stat().st_size for path in (priced / "kit").iterdir()) < 200_000  # the weights alone take 786 KB
    table = load(priced / "measured.json")
    (shape,) = table.dense
    assert shape[:4] == (256, 256, 64, "float32") and table.counts[shape] == 3 and table.inputs == {"x": (64, 256)}
    forms = {form for _, form in table.forms}
    assert "low-rank" in forms and table.threads == 1 and table.scale > 0
    assert all(point.ms > 0 for points in table.forms.values() for point in points)


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4])
def test_the_plan_is_as_fast_as_asked_for(priced: Path, ratio: float):
    """Four fifths of the time are products, so by the made-up prices the rest is a fifth."""
    found, report = planned(priced, ratio)
    macs = sum(choice.cost.macs for choice in found.choices) / sum(choice.before.macs for choice in found.choices)
    assert 0.2 + 0.8 * macs == pytest.approx(report.budget["latency"].reached)
    assert ratio - 0.05 < report.budget["latency"].reached <= ratio
    assert report.ratio is not None and report.ratio.latency is None


def test_forms_that_measure_slower_than_dense_are_never_chosen(priced: Path, tmp_path: Path):
    """Plain factors get dearer than dense here, so the gauge alone is left; then that one too."""
    table = load(priced / "costs.json")
    made_up(tmp_path / "a.json", table, **{"low-rank": 50.0})
    found, _ = planned(priced, 0.8, tmp_path / "a.json")
    chosen = [choice.proposal for choice in found.choices if choice.proposal]
    assert chosen and all(proposal.form == "gauge" for proposal in chosen)
    made_up(tmp_path / "b.json", table, **{"low-rank": 50.0, "low-rank/gauge": 50.0})
    found, _ = planned(priced, 1.0, tmp_path / "b.json")
    assert not any(choice.proposal for choice in found.choices)
    with pytest.raises(InfeasibleError, match=r"latency 0\.8 cannot be met; the best found is latency 1"):
        planned(priced, 0.8, tmp_path / "b.json")


def test_equal_tables_give_equal_plans_and_reports_hold_them(priced: Path, tmp_path: Path):
    first, report = planned(priced, 0.6)
    (tmp_path / "report.json").write_text(json.dumps({"schema": "lrcompile.plan/1", "costs": report.costs}))
    again, _ = planned(priced, 0.6, tmp_path / "report.json")
    assert [choice.reason for choice in first.choices] == [choice.reason for choice in again.choices]


def test_all_limits_hold_together(priced: Path):
    found, report = planned(priced, 0.7, keep=0.5)
    assert report.budget["latency"].reached <= 0.7 and report.budget["keep"].reached <= 0.5
    assert found.after.parameters <= 0.5 * found.before.parameters


def test_unreachable_tells_the_best(priced: Path):
    with pytest.raises(InfeasibleError) as caught:
        planned(priced, 0.1)
    assert 0.2 < caught.value.best["latency"] < 0.3 and caught.value.code == 6


# -- results that are measured -----------------------------------------------------------------------


def measured_as(monkeypatch: pytest.MonkeyPatch, ratios: list[float]) -> list[float]:
    """Results are said to take these ratios in turn; returns what was predicted of each."""
    predicted: list[float] = []

    def found(run: Any, built: Any, files: Any) -> measure.Timing:
        predicted.append(timing.predicted(run) or 0.0)
        ratio = ratios[min(len(predicted), len(ratios)) - 1]
        return measure.Timing((1.0, ratio), (1.0, ratio), (1.0, ratio), ratio, ratio, ratio, 10, 1)

    monkeypatch.setattr(timing, "measured", found)
    return predicted


def optimized(folder: Path, ratio: float, costs: Any, **more: Any):
    options = Options(max_drift=10.0, latency_batch=64, costs=costs, threads=1,
                      settings=Settings(probes=False, gradient_samples=0, cache=folder / "cache"))  # fmt: skip
    return Pipeline([LowRank()], Budget(latency=ratio, **more), options).run(folder / "wide.onnx", folder / "c.npz")


@pytest.fixture
def measuring(priced: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prices that would have been measured here are those of the made-up table."""
    monkeypatch.setattr(timing.here, "table", lambda *_: load(priced / "costs.json"))
    return priced


def test_a_miss_corrects_the_prices_and_is_chosen_again(measuring: Path, monkeypatch: pytest.MonkeyPatch):
    """The first result saves only three quarters of what was predicted, so more is asked for; then it fits."""
    predicted = measured_as(monkeypatch, [0.70, 0.61])
    result = optimized(measuring, 0.6, None)
    assert len(predicted) == 2 and predicted[0] == pytest.approx(0.6, abs=0.02)
    assert predicted[1] == pytest.approx(0.6, abs=0.02)
    assert result.report.budget["latency"].reached == 0.61 and result.report.budget["latency"].target == 0.6
    assert result.report.costs["latency"]["scale"] == pytest.approx(0.3 / (1 - predicted[0]))
    kept = sum(d.keep or 0 for d in result.report.decisions)
    monkeypatch.undo()
    first, _ = planned(measuring, 0.6)
    assert kept < sum(choice.cost.parameters / choice.before.parameters for choice in first.choices)


def test_a_result_faster_than_asked_for_gets_quality_back(measuring: Path, monkeypatch: pytest.MonkeyPatch):
    predicted = measured_as(monkeypatch, [0.40, 0.59])
    result = optimized(measuring, 0.6, None)
    assert len(predicted) == 2 and result.report.budget["latency"].reached == 0.59
    again = measured_as(monkeypatch, [0.3])  # here the stored values decide, not the time
    assert optimized(measuring, 0.9, None, keep=0.2).report.budget["latency"].reached == 0.3 and len(again) == 1


def test_what_stays_too_slow_is_refused(measuring: Path, monkeypatch: pytest.MonkeyPatch):
    measured_as(monkeypatch, [1.05])
    with pytest.raises(InfeasibleError, match=r"latency 0.6 cannot be met; the best found was measured at 1.050"):
        optimized(measuring, 0.6, None)
    measured_as(monkeypatch, [0.9])  # each correction asks for more, until nothing is left
    with pytest.raises(InfeasibleError, match=r"latency 0\.6 cannot be met; the best found"):
        optimized(measuring, 0.6, None)


def test_given_costs_are_not_corrected(priced: Path, monkeypatch: pytest.MonkeyPatch):
    predicted = measured_as(monkeypatch, [0.9])
    report = optimized(priced, 0.6, priced / "costs.json").report
    assert len(predicted) == 1 and any("on this machine the result takes ×0.900" in note for note in report.notes)


# -- on the command line -------------------------------------------------------------------------


def test_measured_here_in_a_file_and_in_a_module(cli: Cli, digits: Any, monkeypatch: pytest.MonkeyPatch):
    """Nothing is made up here: products are timed, though briefly, and what the plan reaches is told."""
    monkeypatch.setattr(here, "SECONDS", 0.01)
    from tests.e2e.running import images

    found = cli.json("plan", "model.onnx", "--latency", "1", "--threads", "1", *BATCH, "--calib", "calib.npz").json
    table = found["costs"]["latency"]
    assert table["schema"] == "lrcompile.costs/1" and table["runtime"] == "onnxruntime" and table["threads"] == 1
    assert [(each["out"], each["into"], each["tokens"]) for each in table["shapes"]] == [(96, 64, 4), (10, 96, 4)]
    assert found["budget"]["latency"]["reached"] <= 1 and found["config"]["latency"] == 1
    small = Settings(probes=False, gradient_samples=0, include=("*mlp*", "*fc1*", "*up*"))
    options = Options(latency=False, threads=1, latency_batch=2, settings=small)
    _, report = Pipeline([LowRank()], Budget(latency=1.0), options).plan(digits.module(), images(digits))
    assert report.costs["latency"]["runtime"] == "torch" and report.budget["latency"].reached <= 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--latency", "0.8", "--data-free"), 2, "needs inputs to measure with"),
        (("--latency", "0.8"), 2, "needs calibration data"),
        (("--latency", "1.2", *DATA), 2, "latency is a ratio to the original's"),
        (("--latency", "0.8", *DATA, "--costs", "absent.json"), 3, "cannot be read"),
        (("--latency", "0.8", *DATA, "--costs", "other.json"), 3, "is of schema 'other/1'"),
        (("--latency", "0.8", *DATA, "--threads", "-1"), 2, "too few"),
        (("--keep", "0.8", *DATA, "--costs", "other.json"), 2, "--costs is of use with --latency only"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], code: int, said: str):
    Path("other.json").write_text('{"schema": "other/1"}')
    before = cli.listing()
    found = cli.json("optimize", "model.onnx", *words)
    assert found.code == code and said in found.error["message"], found.error
    assert cli.listing() == before


def test_costs_of_another_model_or_batch(priced: Path, cli: Cli):
    costs = ("--latency", "0.8", "--costs", priced / "costs.json", *DATA)
    found = cli.json("optimize", "model.onnx", *costs)
    assert found.code == 2 and "measured with x of 64×256, the timed batch has 8×64" in found.error["message"]
    table = json.loads((priced / "costs.json").read_text())
    Path("costs.json").write_text(json.dumps({**table, "inputs": {}}))
    found = cli.json("optimize", "model.onnx", *costs[:3], "costs.json", *DATA)
    assert found.code == 3 and "lacks 96×64 float32 at 8 tokens; it holds 256×256" in found.error["message"]
    Path("costs.json").write_text(json.dumps({**table, "runtime": "torch"}))
    assert cli.json("optimize", "model.onnx", *costs[:3], "costs.json", *DATA).code == 2


def test_profile_refuses(cli: Cli, bert: Path):
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    for words, code in (
        (("model.onnx", "--emit", "full"), 2), (("model.onnx", "--emit", "no/kit"), 2),
        (("model.onnx", "--emit", "k", "--shape", "z=3"), 2), ((bert, "--emit", "k"), 4),
    ):  # fmt: skip
        assert cli.json("profile", *words).code == code
    assert not Path("k").exists() and Path("full/file").read_text() == "mine"
    assert cli.json("profile", "model.onnx", "--emit", "k").json["files"]
    assert cli.json("profile", "model.onnx", "--emit", "k").code == 2
    assert cli.json("profile", "model.onnx", "--emit", "k", "--force").code == 0
    assert not [path for path in Path().iterdir() if path.name.startswith(".k")]


# -- bench -----------------------------------------------------------------------------------------


def test_bench_says_what_is_documented(cli: Cli):
    few = ("--seconds", "0.05", "--precision", "0", "--threads", "1")
    said = cli.json("bench", "model.onnx", "model.onnx", *few)
    found = said.json
    assert (said.code, found["schema"], found["status"], found["threads"]) == (0, "lrcompile.bench/1", "ok", 1)
    for side in "ab":
        assert 0 < found[side]["p10"] <= found[side]["median_ms"] <= found[side]["p90"]
    assert 0 < found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"] and found["runs"] >= 6
    given = cli.json("bench", "model.onnx", "model.onnx", *few, "--calib", "calib.npz", "--samples", "3")
    assert given.json["inputs"] == {"x": [3, 64]}
    shaped = cli.json("bench", "model.onnx", "model.onnx", *few, "--shape", "batch=5").json
    assert shaped["inputs"] == {"x": [5, 64]}
    assert "ratio" in cli("bench", "model.onnx", "model.onnx", *few).out


def test_bench_of_modules(cli: Cli, bert: Path):
    words = ("bench", bert, bert, "--calib", bert / "tokens.npz", "--seconds", "0.05", "--precision", "0")
    said = cli.json(*words)
    assert said.code == 0, said.err
    found = said.json
    assert found["a"]["median_ms"] > 0 and found["a"]["sha256"] == found["b"]["sha256"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("absent.onnx",), 3, "no such file"),
        (("model.onnx", "--shape", "batch"), 2, "is no shape"),
        (("model.onnx", "--shape", "width=3"), 2, "no input or free dimension"),
        (("model.onnx", "--shape", "x=2x63"), 2, "does not fit"),
        (("model.onnx", "--shape", "batch=2", "--calib", "calib.npz"), 2, "samples have their own shapes"),
        (("model.onnx", "--threads", "-2"), 2, "too few"),
        (("model.onnx", "--seconds", "0"), 2, "no time"),
    ],
)
def test_bench_refuses(cli: Cli, words: tuple[str, ...], code: int, said: str):
    found = cli.json("bench", "model.onnx", *words)
    assert found.code == code and said in found.error["message"]


def test_every_option_of_a_timed_run_is_one_of_the_command_line():
    """So a report runs again."""
    commands: Any = typer.main.get_command(application)
    stored = Options(costs="c.json", latency_inputs="i.npz", threads=2).config(Budget(latency=0.8))
    known = {name.removeprefix("--") for p in commands.commands["optimize"].params for name in p.opts}
    assert {"costs", "latency-inputs", "threads", "latency-batch"} <= set(stored) <= known
