"""What is caught and taken back, and what is never touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.errors import GateError, InfeasibleError, UsageError
from lrcompile.graphs.base import Graph, Replacement
from lrcompile.linop import Cost, Dense, densify, low_rank
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Result
from lrcompile.rewrite import Context, GraphPass, LinearPass, Outcome, Proposal, Rewritten
from lrcompile.sites import LinearSite
from tests.e2e.running import LOOSE, QUICK, decided, held, run, sha

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
    options = Options(latency=False, max_drift=10.0, settings=QUICK)
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
    options = Options(latency=False, max_drift=10.0, settings=QUICK)
    with pytest.raises(InfeasibleError, match=r"keep 0\.85 cannot be met; the best found is keep 0\.9"):
        run(digits, file, Budget(keep=0.85), passes=[Liar()], options=options, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("how", ["shape", "nan", "raises", "nothing", "other"])
def test_what_cannot_be_installed_is_left_dense(digits: zoo.ZooModel, how: str):
    options = Options(latency=False, settings=QUICK)
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
    assert sha(tmp_path / "first.onnx") == sha(tmp_path / "second.onnx")
    one, two = (run(digits, digits.module(), Budget(keep=0.6)).model.state_dict() for _ in range(2))
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_budget_drift_is_the_gate(digits: zoo.ZooModel, file: Path):
    """``drift`` gates beside another limit; it and ``max_drift`` both hold, and presets come after them."""
    options = Options(latency=False, settings=QUICK)
    with pytest.raises(GateError, match="above the limit 1e-06"):
        run(digits, file, Budget(keep=0.5, drift=1e-6), options=options)
    report = run(digits, file, Budget(keep=0.5, drift=2.0), options=options).report
    assert (report.drift.limit, report.budget["drift"].target) == (2.0, 2.0)
    assert report.budget["drift"].reached == report.drift.relative_l2 <= 2.0
    with pytest.raises(GateError, match="above the limit 1e-06"):
        run(digits, file, Budget(keep=0.5, drift=1e-6), options=LOOSE)
    strict = Options(latency=False, max_drift=1e-7, settings=QUICK)
    with pytest.raises(GateError, match="above the limit 1e-07"):
        run(digits, file, Budget(keep=0.5, drift=0.3), options=strict)
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
