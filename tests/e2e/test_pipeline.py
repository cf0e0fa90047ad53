"""The whole job on real networks: limits reached in the file, what is caught, what never happens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.data import Batches
from lrcompile.errors import GateError, InfeasibleError, UsageError
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph, Replacement
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Cost, Dense, LinearOperator, densify, low_rank
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline, Result
from lrcompile.planning import Settings
from lrcompile.rewrite import Context, GraphPass, LinearPass, Outcome, Proposal, Rewritten
from lrcompile.sites import LinearSite
from tests.models import disguises, two_layer_mlp

QUICK = Settings(probe_samples=8)
LOOSE = Options(latency=False, max_drift=10.0, settings=QUICK)


@pytest.fixture(scope="module")
def digits() -> zoo.ZooModel:
    return zoo.load("digits_vit")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(zoo.exported("digits_vit").read_bytes())
    return path


def images(digits: zoo.ZooModel, count: int = 64) -> dict[str, np.ndarray]:
    return {"images": np.concatenate([batch["images"] for batch in digits.calibration()])[:count]}


def held(digits: zoo.ZooModel, count: int = 64) -> dict[str, np.ndarray]:
    return {"images": np.concatenate([batch["images"] for batch in digits.evaluation()])[:count]}


def run(
    digits: zoo.ZooModel,
    graph: Any,
    budget: Budget,
    *,
    passes: Sequence = (LowRank(),),
    options: Options = LOOSE,
    **kw: Any,
) -> Result:
    return Pipeline(list(passes), budget, options).run(graph, images(digits), held(digits), **kw)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def values_in(path: Path) -> int:
    """Float values that a file stores, counted by onnx alone."""
    tensors = onnx.load(path).graph.initializer
    return sum(array.size for array in map(numpy_helper.to_array, tensors) if array.dtype.kind == "f")


def decided(result: Result) -> dict[str, str]:
    return {decision.site: decision.structure for decision in result.report.decisions}


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


# -- what is caught -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Liar(LinearPass):
    """Claims next to no error and gives garbage, for every second site."""

    name: ClassVar[str] = "liar"

    def refuse(self, site: LinearSite, context: Context) -> str:
        return "" if site.name.endswith(("q", "up", "matmul", "first")) else "honest"

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        for rank in context.ranks(site)[:2]:
            factors = context.randn(site.shape[0], rank), context.randn(rank, site.shape[1])
            operator = low_rank(*factors)
            by = {site.name: Replacement(operator)}
            yield Proposal(
                (site.name,), 1e-9, context.price(site, operator), lambda by=by: by, "a lie", self.name, rank
            )


@dataclass(frozen=True)
class Broken(LinearPass):
    """Promises factors, and delivers what cannot be installed."""

    name: ClassVar[str] = "broken"
    how: str = "shape"

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        def build() -> dict[str, Replacement]:
            out, into = site.shape
            if self.how == "raises":
                raise ValueError("no convergence")
            if self.how == "nothing":
                return {}
            if self.how == "other":
                return {"no.such.site": Replacement(Dense(torch.zeros(out, into)))}
            if self.how == "nan":
                return {site.name: Replacement(low_rank(torch.full((out, 4), torch.nan), torch.ones(4, into)))}
            return {site.name: Replacement(low_rank(torch.zeros(out + 1, 4), torch.zeros(4, into)))}

        yield Proposal((site.name,), 1e-9, Cost(4.0, 16, 4), build, "broken", self.name, 4)


@dataclass(frozen=True)
class Wrong(GraphPass):
    """Says that it is exact, and is not."""

    name: ClassVar[str] = "wrong"
    admits: bool = True
    raises: bool = False

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        site = next(site for site in graph.linear_sites() if not site.frozen)
        graph.replace(site, Dense(densify(site.operator) * 1.01))
        if self.raises:
            raise RuntimeError("half way")
        return [Rewritten(site.name, "one percent more")] if self.admits else []


@pytest.mark.parametrize("kind", ["onnx", "module"])
def test_a_lossy_lie_is_caught_site_by_site(digits: zoo.ZooModel, file: Path, tmp_path: Path, kind: str):
    model = file if kind == "onnx" else digits.module()
    options = Options(latency=False, max_drift=10.0, settings=Settings(probes=False))
    result = run(digits, model, Budget(keep=0.85), passes=[Liar(), LowRank()], options=options, out=tmp_path / "out")
    report = result.report
    caught = [decision for decision in report.decisions if "rolled back" in decision.reason]
    assert all("liar promised 1e-09" in decision.reason for decision in caught)
    assert all(decision.pass_ is None and decision.structure.startswith("Dense") for decision in caught)
    assert report.sites["refused"] == len(caught)
    noted = [note for note in report.notes if "rolled back" in note]
    assert len(noted) >= 2 and all(any(note.startswith(d.site) for note in noted) for d in caught)
    assert {d.pass_ for d in report.decisions} == {None, "low-rank"}  # the honest pass takes over
    assert report.drift.relative_l2 < 0.5
    changed = sum(d.keep * np.prod(d.shape) for d in report.decisions) / sum(np.prod(d.shape) for d in report.decisions)
    assert report.budget["keep"].reached == pytest.approx(changed) and changed <= 0.85
    assert [each.rewritten for each in report.passes if each.name == "liar"] == [0]


def test_nothing_but_lies_cannot_meet_a_limit(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    options = Options(latency=False, max_drift=10.0, settings=Settings(probes=False))
    with pytest.raises(InfeasibleError, match=r"keep 0\.85 cannot be met; the best found is keep 1"):
        run(digits, file, Budget(keep=0.85), passes=[Liar()], options=options, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("how", ["shape", "nan", "raises", "nothing", "other"])
def test_what_cannot_be_installed_is_left_dense(digits: zoo.ZooModel, how: str):
    options = Options(latency=False, settings=Settings(probes=False))
    report = run(digits, digits.module(), Budget(keep=0.95), passes=[Broken(how), LowRank()], options=options).report
    assert report.budget["keep"].reached <= 0.95 and report.status == "ok"
    assert {decision.pass_ for decision in report.decisions} == {None, "low-rank"}
    assert any("rolled back" in note for note in report.notes)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Wrong(), "relative L2 drift"),
        (Wrong(admits=False), "relative L2 drift"),
        (Wrong(raises=True), "RuntimeError: half way"),
    ],
)
@pytest.mark.parametrize("kind", ["onnx", "module"])
def test_a_wrong_exact_pass_is_taken_back(
    digits: zoo.ZooModel, file: Path, tmp_path: Path, kind: str, wrong: Wrong, reason: str
):
    model = file if kind == "onnx" else digits.module()
    result = run(digits, model, Budget(), passes=[wrong], out=tmp_path / "out.onnx")
    entry = next(each for each in result.report.passes if each.name.startswith("wrong"))
    assert (entry.rewritten, result.report.status) == (0, "unchanged")
    assert reason in entry.rolled_back
    assert not (tmp_path / "out.onnx").exists()
    batch = {"images": held(digits)["images"][:4]}
    np.testing.assert_array_equal(
        result.built.run(batch)[_only(result, batch)], result.graph.run(batch)[_only(result, batch)]
    )


def _only(result: Result, batch: dict) -> str:
    (name,) = result.built.run(batch)
    return name


def test_a_wrong_exact_pass_does_not_spoil_the_rest(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    alone = run(digits, file, Budget(keep=0.7), out=tmp_path / "alone.onnx")
    beside = run(digits, file, Budget(keep=0.7), passes=[Wrong(), LowRank()], out=tmp_path / "beside.onnx")
    assert sha(tmp_path / "alone.onnx") == sha(tmp_path / "beside.onnx")
    assert decided(alone) == decided(beside)


# -- what never happens -------------------------------------------------------------------------


def test_a_failed_gate_publishes_nothing(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    options = Options(latency=False, max_drift=1e-5, settings=QUICK)
    with pytest.raises(GateError, match="above the limit 1e-05") as caught:
        run(digits, file, Budget(keep=0.4), options=options, out=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == [file]
    report = caught.value.report
    assert (caught.value.code, report.status, report.drift.passed) == (5, "gate_failed", False)
    assert report.drift.relative_l2 > 1e-5 and report.decisions
    with pytest.raises(GateError):
        run(digits, digits.module(), Budget(keep=0.4), options=options, out=tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_gate_leaves_an_older_output_alone(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"older")
    options = Options(latency=False, max_drift=1e-5, force=True, settings=QUICK)
    with pytest.raises(GateError):
        run(digits, file, Budget(keep=0.4), options=options, out=out)
    assert out.read_bytes() == b"older" and sorted(p.name for p in tmp_path.iterdir()) == ["digits.onnx", "out.onnx"]
    with pytest.raises(UsageError, match="exists"):
        run(digits, file, Budget(keep=0.4), out=out)
    assert out.read_bytes() == b"older"


def test_the_input_is_not_touched(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    before, module = sha(file), digits.module()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    text = repr(module)
    run(digits, file, Budget(keep=0.6), out=tmp_path / "out.onnx")
    run(digits, module, Budget(keep=0.6))
    assert sha(file) == before and repr(module) == text
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


def test_two_runs_give_the_same_bytes(digits: zoo.ZooModel, file: Path, tmp_path: Path):
    for name in ("first", "second"):
        run(digits, file, Budget(keep=0.6), out=tmp_path / f"{name}.onnx")
        run(digits, digits.module(), Budget(keep=0.6), out=tmp_path / name)
    assert sha(tmp_path / "first.onnx") == sha(tmp_path / "second.onnx")
    weights = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    assert weights and all(sha(tmp_path / "first" / name) == sha(tmp_path / "second" / name) for name in weights)


def test_budget_drift_is_the_gate(digits: zoo.ZooModel, file: Path):
    """``drift`` gates; an explicit ``max_drift`` comes before it, and presets after it."""
    options = Options(latency=False, settings=QUICK)
    with pytest.raises(GateError, match="above the limit 1e-06"):
        run(digits, file, Budget(keep=0.5, drift=1e-6), options=options)
    report = run(digits, file, Budget(keep=0.5, drift=2.0), options=options).report
    assert (report.drift.limit, report.budget["drift"].target) == (2.0, 2.0)
    assert report.budget["drift"].reached == report.drift.relative_l2 <= 2.0
    assert run(digits, file, Budget(keep=0.5, drift=1e-6), options=LOOSE).report.drift.limit == 10.0
    assert run(digits, file, Budget(keep=0.9), options=options).report.drift.limit == 0.5


def test_a_metric_takes_the_place_of_the_drift(digits: zoo.ZooModel, file: Path):
    def disagreement(reference: list, candidate: list) -> float:
        pairs = zip(reference, candidate, strict=True)
        return float(np.mean([(a["logits"].argmax(-1) != b["logits"].argmax(-1)).mean() for a, b in pairs]))

    options = Options(latency=False, max_drift=0.1, metric=disagreement, settings=QUICK)
    report = run(digits, file, Budget(keep=0.7), options=options).report
    assert report.drift.passed and 0 <= report.drift.metric <= 0.1
    always = Options(latency=False, max_drift=0.1, metric=lambda a, b: 0.2, settings=QUICK)
    with pytest.raises(GateError, match=r"metric 0\.2 is above the limit 0\.1"):
        run(digits, file, Budget(keep=0.9), options=always)


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
    module, exported = run(digits, digits.module(), budget), run(digits, file, budget)
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
    assert sum(calls) > 64
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
    plenty = run(digits, model, Budget(keep=0.7)).report
    assert not any("fewer" in note for note in plenty.notes if "down" not in note)
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
    assert report.budget["keep"].reached <= 0.8 and report.drift.samples == 64
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
    pipeline = Pipeline([LowRank()], Budget(keep=0.6), LOOSE)
    planned, report = pipeline.plan(file, images(digits))
    done = run(digits, file, Budget(keep=0.6), out=tmp_path / "out.onnx").report
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
    for size in (1, 7, 64):
        data = Batches(images(digits), batch=size)
        planned, _ = Pipeline([LowRank()], Budget(keep=0.6), Options(settings=Settings(probes=False))).plan(file, data)
        found.append([choice.reason for choice in planned.choices])
    assert found[0] == found[1] == found[2]
