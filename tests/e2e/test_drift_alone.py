"""A drift limit alone: as few bytes as it allows, measured and not only predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs.base import Outputs
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline, Result
from tests.e2e.running import PROBED, held, images, run
from tests.e2e.tool import Cli

PLAIN = Options(latency=False, settings=PROBED)


def bytes_of(result: Result) -> int:
    return result.built.nbytes


@pytest.mark.parametrize("limit", [0.03, 0.1])
def test_limit_is_used_up_and_never_passed(digits: zoo.ZooModel, file: Path, limit: float):
    result = run(digits, file, Budget(drift=limit), options=PLAIN)
    report = result.report
    assert report.drift is not None and report.drift.passed and report.drift.limit == limit
    assert 0.5 * limit < report.drift.relative_l2 <= limit
    assert report.budget["drift"].target == limit
    assert report.budget["drift"].reached == pytest.approx(report.drift.relative_l2)


def test_a_larger_limit_gives_a_smaller_file(digits: zoo.ZooModel, file: Path):
    sizes = [bytes_of(run(digits, file, Budget(drift=limit), options=PLAIN)) for limit in (0.02, 0.1, 0.3)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_fewer_bytes_than_any_keep_of_the_same_drift(digits: zoo.ZooModel, file: Path):
    """A sweep over keep that reaches the same drift must not find a much smaller file."""
    result = run(digits, file, Budget(drift=0.05), options=PLAIN)
    loose = Options(latency=False, max_drift=10.0, settings=PROBED)
    swept = [run(digits, file, Budget(keep=keep), options=loose) for keep in (0.4, 0.5, 0.6, 0.7)]
    rivals = [bytes_of(each) for each in swept if each.report.drift and each.report.drift.relative_l2 <= 0.05]
    assert rivals and bytes_of(result) <= 1.03 * min(rivals)


def test_module_and_file_agree(digits: zoo.ZooModel, file: Path):
    both = [run(digits, graph, Budget(drift=0.05), options=PLAIN).report for graph in (digits.module(), file)]
    assert both[0].sites == both[1].sites
    drifts = [report.drift.relative_l2 for report in both if report.drift]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-3)


def test_nothing_fits_a_tiny_limit(digits: zoo.ZooModel, file: Path):
    before = file.read_bytes()
    result = run(digits, file, Budget(drift=1e-7), options=PLAIN)
    assert result.report.status == "unchanged" and result.report.sites["rewritten"] == 0
    assert file.read_bytes() == before


def test_everything_fits_a_huge_limit(digits: zoo.ZooModel, file: Path):
    result = run(digits, file, Budget(drift=50.0), options=PLAIN)
    assert result.report.sites["rewritten"] == result.report.sites["total"] - 1  # patches: 64 x 4 has no rank to cut


def test_a_limit_beside_others_is_a_gate(digits: zoo.ZooModel, file: Path):
    with pytest.raises(GateError, match="above the limit"):
        run(digits, file, Budget(keep=0.3, drift=0.01), options=PLAIN)


def test_the_smaller_of_both_limits_holds(digits: zoo.ZooModel, file: Path):
    options = Options(latency=False, max_drift=0.02, settings=PROBED)
    result = run(digits, file, Budget(drift=0.2), options=options)
    assert result.report.drift is not None and result.report.drift.relative_l2 <= 0.02


def largest_change(before: Sequence[Outputs], after: Sequence[Outputs]) -> float:
    """A metric of another scale than the drift."""
    pairs = zip(before, after, strict=True)
    return 100 * max(float(np.abs(a["logits"] - b["logits"]).max()) for a, b in pairs)


def test_a_metric_of_any_scale_decides(digits: zoo.ZooModel, file: Path):
    options = Options(latency=False, metric=largest_change, settings=PROBED)
    result = run(digits, file, Budget(drift=80.0), options=options)
    drift = result.report.drift
    assert drift is not None and drift.metric is not None and 20 < drift.metric <= 80
    assert result.report.budget["drift"].reached == pytest.approx(drift.metric)
    assert result.report.sites["rewritten"] > 0


def test_held_out_samples_that_are_harder_tighten_the_plan(digits: zoo.ZooModel, file: Path):
    """Calibration digits are nearly blank here, so the first plan fails on the real ones and a safer one is found."""
    blank = {"images": images(digits, 64)["images"] * np.float32(0.02)}
    pipeline = Pipeline([LowRank()], Budget(drift=0.1), PLAIN)
    result = pipeline.run(file, blank, held(digits, 64))
    drift = result.report.drift
    assert drift is not None and drift.passed and drift.relative_l2 <= 0.1
    assert [each.name for each in result.report.passes].count("low-rank") <= 1


def test_plan_looks_for_the_same(digits: zoo.ZooModel, file: Path):
    planned, report = Pipeline([LowRank()], Budget(drift=0.05), PLAIN).plan(file, images(digits))
    assert report.after is not None and report.before is not None and report.after.bytes < report.before.bytes
    assert any(choice.proposal for choice in planned.choices)


def test_data_is_needed(file: Path):
    options = Options(latency=False, data_free=True, settings=PROBED)
    with pytest.raises(UsageError, match="calibration"):
        Pipeline([LowRank()], Budget(drift=0.1), options).run(file)


def test_on_the_command_line(cli: Cli):
    data = ("--calib", "calib.npz", "--eval", "eval.npz")
    ran = cli.json("optimize", "model.onnx", "-o", "small.onnx", "--drift", 0.4, *data).json
    assert ran["drift"]["relative_l2"] <= 0.4 and ran["budget"]["drift"]["target"] == 0.4
    planned = cli.json("plan", "model.onnx", "--drift", 0.4, "--calib", "calib.npz").json
    assert planned["status"] == "ok"
