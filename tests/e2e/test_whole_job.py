"""The whole job: both graphs, the cache, few data, selections, every disguise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.data import Batches
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import LinearOperator, densify, low_rank
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline, Result
from lrcompile.planning import Settings
from lrcompile.rewrite import Context, LinearPass
from lrcompile.sites import LinearSite
from tests.e2e.running import LOOSE, PROBED, QUICK, decided, held, images, run
from tests.models import disguises, two_layer_mlp

# -- laws ---------------------------------------------------------------------------------------


def pairs(digits: zoo.ZooModel, file: Path) -> list[tuple[ModuleGraph, LinearSite, OnnxGraph, LinearSite]]:
    """The same weights in both graphs."""
    module, onnx_graph = ModuleGraph(digits.module(), sample=images(digits, 2)), OnnxGraph.load(file)
    others = list(onnx_graph.linear_sites())
    found = []
    for site in module.linear_sites():
        weight = densify(site.operator)
        twin = next(o for o in others if o.shape == site.shape and torch.equal(densify(o.operator), weight))
        found.append((module, site, onnx_graph, twin))
    assert len(found) == len(others)
    return found


@pytest.mark.parametrize("each", [LowRank(), LowRank(metric="diagonal"), LowRank(metric="plain")], ids=str)
def test_same_moments_same_verdicts(digits: zoo.ZooModel, file: Path, each: LowRank):
    """A pass sees weights and statistics, never the graph: ranks, prices, errors and factors are the same."""
    twins = pairs(digits, file)
    moments = twins[0][0].observe([images(digits)], [site for _, site, _, _ in twins], memory=2**30)
    for module, site, other, twin in twins:
        contexts = (
            Context(module, {site.input: moments[site.input]}),
            Context(other, {twin.input: moments[site.input]}),
        )
        assert each.refuse(site, contexts[0]) == each.refuse(twin, contexts[1])
        ours, theirs = list(each.proposals(site, contexts[0])), list(each.proposals(twin, contexts[1]))
        assert [(p.rank, p.cost, p.label) for p in ours] == [(p.rank, p.cost, p.label) for p in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.error == pytest.approx(b.error, rel=1e-9)  # weights lie transposed in one of them
            left, right = a.by[site.name], b.by[twin.name]
            torch.testing.assert_close(densify(left.operator), densify(right.operator), rtol=1e-4, atol=1e-5)
            assert (left.shift is None) == (right.shift is None)


@pytest.mark.parametrize("budget", [Budget(keep=0.6), Budget(macs=0.7)], ids=["keep", "macs"])
def test_module_and_file_get_the_same_ranks(digits: zoo.ZooModel, file: Path, budget: Budget):
    """Each graph measured for itself: the numbers differ by rounding, the choice does not."""
    names = {twin.name: site.name for _, site, _, twin in pairs(digits, file)}
    options = Options(latency=False, max_drift=10.0, settings=PROBED)
    module, exported = (run(digits, model, budget, options=options) for model in (digits.module(), file))
    assert {names[name]: structure for name, structure in decided(exported).items()} == decided(module)
    assert exported.report.drift.relative_l2 == pytest.approx(module.report.drift.relative_l2, rel=1e-3)


@dataclass(frozen=True)
class RandomizedLowRank(LinearPass):
    """Sketch the weight with a Gaussian test matrix (Halko et al., 2011).

    rewrite:  W  ->  Q @ (Qᵀ W)
    """

    name: ClassVar[str] = "randomized-low-rank"
    oversample: int = 8

    def propose(self, site: LinearSite, context: Context) -> Iterator[LinearOperator]:
        w = densify(site.operator)
        for rank in context.ranks(site):
            q, _ = torch.linalg.qr(w @ context.randn(w.shape[1], rank + self.oversample))
            yield low_rank(q, q.T @ w)


@pytest.mark.parametrize("kind", ["onnx", "module"])
def test_ten_lines_of_a_user_go_through_everything(digits: zoo.ZooModel, file: Path, tmp_path: Path, kind: str):
    model = file if kind == "onnx" else digits.module()
    result = run(digits, model, Budget(keep=0.8), passes=[RandomizedLowRank(oversample=0)], out=tmp_path / "out.onnx")
    report = result.report
    assert report.status == "ok" and report.budget["keep"].reached <= 0.8
    assert {d.pass_ for d in report.decisions} == {None, "randomized-low-rank"}
    assert report.config["pass"] == ["randomized-low-rank{oversample=0}"]
    both = run(digits, model, Budget(keep=0.8), passes=[RandomizedLowRank(oversample=0), LowRank()]).report
    assert sum(d.predicted for d in both.decisions) <= sum(d.predicted for d in report.decisions)
    assert "low-rank" in {d.pass_ for d in both.decisions}


# -- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["onnx", "module"])
def test_a_second_budget_finds_everything_in_the_cache(
    digits: zoo.ZooModel, file: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    cls = OnnxGraph if kind == "onnx" else ModuleGraph
    for method in ("observe", "probe"):
        original = getattr(cls, method)

        def counted(self, batches, *args, original=original, **kw):
            batches = list(batches)
            calls.append(sum(len(next(iter(batch.values()))) for batch in batches))
            return original(self, batches, *args, **kw)

        monkeypatch.setattr(cls, method, counted)

    def attempt(budget: Budget, cache: Path | None) -> Result:
        calls.clear()
        options = Options(latency=False, max_drift=10.0, settings=Settings(probe_samples=8, refine=False, cache=cache))
        return run(digits, file if kind == "onnx" else digits.module(), budget, options=options)

    cold = attempt(Budget(keep=0.6), tmp_path / "cache")
    assert sum(calls) > 32
    warm = attempt(Budget(keep=0.6), tmp_path / "cache")
    assert sum(calls) <= 1  # one sample, to count the vectors
    other = attempt(Budget(keep=0.8), tmp_path / "cache")
    assert sum(calls) <= 1
    for cached, fresh in ((warm, cold), (other, attempt(Budget(keep=0.8), None))):
        assert decided(cached) == decided(fresh)
        assert [d.predicted for d in cached.report.decisions] == [d.predicted for d in fresh.report.decisions]
        assert cached.report.drift.relative_l2 == fresh.report.drift.relative_l2


def test_other_data_is_not_found_in_the_cache(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    options = Options(latency=False, max_drift=10.0, settings=Settings(probe_samples=8, cache=tmp_path / "cache"))
    pipeline = Pipeline([LowRank()], Budget(keep=0.6), options)
    one = pipeline.run(file, images(digits, 16), held(digits))
    two = pipeline.run(file, images(digits, 32), held(digits))
    assert [d.predicted for d in one.report.decisions] != [d.predicted for d in two.report.decisions]
    assert one.report.calibration.sha256 != two.report.calibration.sha256


@pytest.mark.parametrize("kind", ["onnx", "module"])
def test_few_tokens_are_noted_and_do_no_harm(digits: zoo.ZooModel, file: Path, kind: str):
    model = file if kind == "onnx" else digits.module()
    report = Pipeline([LowRank()], Budget(keep=0.7), LOOSE).run(model, images(digits, 2), held(digits)).report
    assert any("fewer calibration tokens than channels" in note for note in report.notes)
    assert np.isfinite(report.drift.relative_l2) and report.drift.relative_l2 < 1.0
    assert not any("rolled back" in decision.reason for decision in report.decisions)
    plenty = Pipeline([LowRank()], Budget(keep=0.7), LOOSE).run(model, images(digits, 72), held(digits)).report
    assert not any("fewer" in note for note in plenty.notes)
    assert plenty.drift.relative_l2 < report.drift.relative_l2


@pytest.mark.parametrize("metric", ["plain", "diagonal"])
def test_other_metrics_keep_their_promises(digits: zoo.ZooModel, file: Path, metric: str):
    """Their directions are chosen in another metric, but what they claim is measured like everything else."""
    report = run(digits, file, Budget(keep=0.8), passes=[LowRank(metric=metric)]).report  # type: ignore[arg-type]
    assert not any("rolled back" in decision.reason for decision in report.decisions)
    assert report.budget["keep"].reached <= 0.8


def test_without_data_the_result_says_so(digits: zoo.ZooModel, file: Path):
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline([LowRank()], Budget(keep=0.8), LOOSE).run(file)
    options = Options(latency=False, max_drift=10.0, data_free=True)
    result = Pipeline([LowRank()], Budget(keep=0.8), options).run(file, None, held(digits))
    report = result.report
    assert report.calibration.kind == "uncalibrated" and any("uncalibrated" in note for note in report.notes)
    assert report.budget["keep"].reached <= 0.8 and report.drift.samples == 32
    blind = Pipeline([LowRank()], Budget(keep=0.8), options).run(file).report
    assert blind.drift is None and any("no held-out samples" in note for note in blind.notes)
    assert Pipeline([], Budget(), options).run(file).report.calibration.kind == "none"


# -- who takes part -----------------------------------------------------------------------------


def test_patterns_choose_the_sites(digits: zoo.ZooModel, file: Path):
    settings = Settings(probe_samples=8, include=("*attention*",), exclude=("*.o",))
    names = [site.name for site in ModuleGraph(digits.module()).linear_sites()]
    options = Options(latency=False, max_drift=10.0, settings=settings)
    report = run(digits, digits.module(), Budget(keep=0.7), options=options).report
    chosen = {name for name in names if "attention" in name and not name.endswith(".o")}
    assert {d.site for d in report.decisions if d.pass_} <= chosen
    reasons = {d.site: d.reason for d in report.decisions}
    assert all("--include" in reasons[name] for name in names if "attention" not in name)
    assert all("--exclude" in reasons[name] for name in names if name.endswith("attention.o"))
    assert report.budget["keep"].reached <= 0.7  # of what takes part
    assert report.sites["refused"] == len(names) - len(chosen)
    nothing = Options(latency=False, settings=Settings(include=("nothing*",)))
    with pytest.raises(UsageError, match="select no site"):
        run(digits, digits.module(), Budget(keep=0.7), options=nothing)


class Peeking(nn.Module):
    """Reads one weight behind its layer's back, so that this layer must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.free, self.watched = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.watched(torch.relu(self.free(x))) + self.watched.weight.sum()


def test_frozen_sites_stay_and_say_why():
    x = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32)
    report = Pipeline([LowRank()], Budget(keep=0.7), LOOSE).run(Peeking(), {"x": x}).report
    decisions = {decision.site: decision for decision in report.decisions}
    assert decisions["free"].pass_ == "low-rank" and decisions["watched"].pass_ is None
    assert decisions["watched"].reason and (report.sites["rewritten"], report.sites["refused"]) == (1, 1)
    assert report.budget["keep"].reached <= 0.7


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_disguise_of_a_linear_layer(tmp_path: Path, dtype: Any):
    """MatMul, Gemm, Conv, shared and tied weights: the limits hold in the file, and the gate sees real outputs."""
    built = disguises(tmp_path / "in.onnx", dtype=dtype)
    options = Options(latency=False, max_drift=10.0, settings=Settings(probe_samples=8, align=2))
    out = tmp_path / "out.onnx"
    samples = {name: array.astype(np.float32) for name, array in built.example(24).items()}
    report = Pipeline([LowRank()], Budget(keep=0.7, bytes=0.95), options).run(built.path, samples, out=out).report
    assert report.sites["rewritten"] >= 5 and out.stat().st_size <= 0.95 * built.path.stat().st_size
    assert report.budget["keep"].reached <= 0.7
    onnx.checker.check_model(out, full_check=True)
    assert not any("rolled back" in decision.reason for decision in report.decisions)


def test_data_is_split_when_none_is_held_out(digits: zoo.ZooModel, file: Path):
    report = Pipeline([LowRank()], Budget(keep=0.8), LOOSE).run(file, images(digits, 40)).report
    assert (report.calibration.samples, report.drift.samples) == (32, 8)
    with pytest.raises(UsageError, match="too few"):
        Pipeline([LowRank()], Budget(keep=0.8), LOOSE).run(file, images(digits, 1))


def test_a_plan_is_what_a_run_does(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    options = Options(latency=False, max_drift=10.0, settings=PROBED)
    pipeline = Pipeline([LowRank()], Budget(keep=0.6), options)
    planned, report = pipeline.plan(file, images(digits))
    done = run(digits, file, Budget(keep=0.6), options=options, out=tmp_path / "out.onnx").report
    assert [c.reason for c in planned.choices] == [d.reason for d in done.decisions]
    assert report.budget["keep"].reached == done.budget["keep"].reached
    assert report.after.macs == done.after.macs
    assert report.after.parameters == pytest.approx(done.after.parameters, rel=0.01)
    assert report.after.bytes == pytest.approx(done.after.bytes, rel=0.02)


def test_growth_is_refused_unless_forced(tmp_path: Path):
    """A tiny model whose factors save less than their nodes cost."""
    built = two_layer_mlp(tmp_path / "in.onnx", features=8, hidden=12, classes=8)
    settings = Settings(probes=False, align=1)
    out = tmp_path / "out.onnx"
    pipeline = Pipeline([LowRank()], Budget(keep=0.98), Options(latency=False, max_drift=10.0, settings=settings))
    with pytest.raises(GateError, match="times the bytes") as caught:
        pipeline.run(built.path, built.example(40), out=out)
    assert caught.value.report.status == "gate_failed" and not out.exists()
    forced = Options(latency=False, max_drift=10.0, force_growth=True, settings=settings)
    report = Pipeline([LowRank()], Budget(keep=0.98), forced).run(built.path, built.example(40), out=out).report
    assert out.stat().st_size > built.path.stat().st_size
    assert report.budget["keep"].reached <= 0.98


def test_batches_of_any_size_give_the_same_plan(digits: zoo.ZooModel, file: Path):
    found = []
    for size in (1, 7, 32):
        data = Batches(images(digits), batch=size)
        planned, _ = Pipeline([LowRank()], Budget(keep=0.6), Options(settings=QUICK)).plan(file, data)
        found.append([choice.reason for choice in planned.choices])
    assert found[0] == found[1] == found[2]
