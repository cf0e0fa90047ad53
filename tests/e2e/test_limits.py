"""Limits on real networks, counted in the file that comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.errors import InfeasibleError
from lrcompile.frontend import open_graph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline
from tests.e2e.running import LOOSE, QUICK, held, run, values_in
from tests.models import two_layer_mlp

# -- limits -------------------------------------------------------------------------------------


def test_bytes_are_counted_in_the_file(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    before = file.stat().st_size
    for share in (0.8, 0.55):
        out = tmp_path / f"{share}.onnx"
        report = run(digits, file, Budget(bytes=share), out=out).report
        assert out.stat().st_size <= share * before
        assert report.after.bytes == out.stat().st_size and report.before.bytes == before
        assert report.budget["bytes"].reached == pytest.approx(out.stat().st_size / before)
        assert out.stat().st_size > (share - 0.06) * before


def test_bytes_may_be_an_amount(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    out = tmp_path / "small.onnx"
    run(digits, file, Budget(bytes="300kB"), out=out)
    assert 270 * 1024 < out.stat().st_size <= 300 * 1024


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_keep_is_counted_in_the_file(digits: zoo.ZooModel, file: Path, tmp_path: Path, keep: float):
    out = tmp_path / "kept.onnx"
    sites = sum(np.prod(site.shape) for site in open_graph(file).linear_sites())
    report = run(digits, file, Budget(keep=keep), out=out).report
    rest = values_in(file) - sites
    shifted = sum(decision.shape[0] for decision in report.decisions)  # a bias may be stored once more
    assert values_in(out) - rest <= keep * sites + shifted
    assert report.after.parameters == values_in(out)
    assert keep - 0.05 < report.budget["keep"].reached <= keep


def test_macs_are_counted_in_the_result(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    out = tmp_path / "fast.onnx"
    report = run(digits, file, Budget(macs=0.6), out=out).report
    graph = OnnxGraph.load(out)
    counted = graph.macs({"images": held(digits)["images"][:1]})
    assert counted == report.after.macs <= 0.6 * report.before.macs
    assert report.budget["macs"].reached == pytest.approx(counted / report.before.macs)


def test_several_limits_hold_together(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    out = tmp_path / "all.onnx"
    report = run(digits, file, Budget(keep=0.7, bytes=0.65, macs=0.75), out=out).report
    reached = {name: line.reached for name, line in report.budget.items()}
    assert reached["keep"] <= 0.7 and reached["macs"] <= 0.75
    assert out.stat().st_size <= 0.65 * file.stat().st_size
    assert report.feasible and report.status == "ok"


def test_a_module_reaches_its_limits_too(digits: zoo.ZooModel, tmp_path: Path):
    result = run(digits, digits.module(), Budget(keep=0.6, macs=0.7), out=tmp_path / "saved")
    report = result.report
    assert report.budget["keep"].reached <= 0.6 and report.budget["macs"].reached <= 0.7
    stored = sum(p.numel() for p in result.model.parameters())
    assert stored == report.after.parameters
    files = [path for path in (tmp_path / "saved").iterdir() if not path.name.startswith("report")]
    assert report.after.bytes == sum(path.stat().st_size for path in files)


def test_the_whole_budget_leaves_everything_as_it_is(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    out = tmp_path / "same.onnx"
    for budget in (Budget(keep=1.0), Budget(bytes=1.0, macs=1.0), Budget()):
        report = run(digits, file, budget, out=out).report
        assert report.status == "unchanged" and report.sites["rewritten"] == 0
        assert not out.exists()


def test_an_infeasible_limit_says_what_is_possible(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    with pytest.raises(InfeasibleError, match=r"keep 0\.01 cannot be met") as caught:
        run(digits, file, Budget(keep=0.01), out=tmp_path / "out.onnx")
    assert caught.value.code == 6 and 0.01 < caught.value.best["keep"] < 0.5
    again = run(digits, file, Budget(keep=caught.value.best["keep"] * 1.001))
    assert again.report.budget["keep"].reached == pytest.approx(caught.value.best["keep"])
    assert list(tmp_path.iterdir()) == [file]


def test_what_exact_rewrites_save_counts_towards_the_limits(tmp_path: Path):
    """Half of the weights are rank deficient: the limits are met by that alone, and nothing is lost."""
    built = two_layer_mlp(tmp_path / "mlp.onnx", features=128, hidden=128, classes=128, rank=16)
    x = built.example(40)
    for budget in (Budget(keep=0.7), Budget(bytes=0.8), Budget(macs=0.7), Budget(keep=0.7, bytes=0.8, macs=0.7)):
        out = tmp_path / "out.onnx"
        options = Options(latency=False, max_drift=10.0, force=True, settings=QUICK)
        report = Pipeline([LowRank()], budget, options).run(built.path, x, out=out).report
        assert report.drift.relative_l2 < 1e-5, budget
        assert all(line.reached <= line.target for line in report.budget.values())
    tight = Pipeline([LowRank()], Budget(keep=0.4, bytes=0.5), LOOSE).run(built.path, x, out=tmp_path / "tight.onnx")
    assert 0.3 < tight.report.budget["keep"].reached <= 0.4
    assert (tmp_path / "tight.onnx").stat().st_size <= 0.5 * built.path.stat().st_size
