"""Exported programs through the whole job: in Python and from the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import ExportedProgram

import lrcompile
from lrcompile import Budget, Options, Pipeline, Settings, zoo
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify
from lrcompile.rewrite import GraphPass, Rewritten
from tests.e2e.running import PROBED, decided, held, images, run, sha
from tests.e2e.tool import Cli
from tests.graphs.exported import exported

LOOSE = Options(latency=False, max_drift=10.0, settings=Settings(probe_samples=8))


@pytest.fixture(scope="module")
def program(digits: zoo.ZooModel) -> ExportedProgram:
    example = torch.from_numpy(images(digits, 2)["images"])
    return exported(digits.module(), example)


@pytest.fixture(scope="module")
def folder(program: ExportedProgram, digits: zoo.ZooModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported")
    torch.export.save(program, made / "model.pt2")
    np.savez(made / "calib.npz", **images(digits))
    np.savez(made / "eval.npz", **held(digits))
    return made


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(folder)
    return Cli(folder, capsys)


def test_module_and_program_get_the_same_ranks(digits: zoo.ZooModel, program: ExportedProgram):
    """Law 3: the same weights and moments give the same choice, under the same names."""
    options = Options(latency=False, max_drift=10.0, settings=PROBED)
    module, mine = (run(digits, model, Budget(keep=0.6), options=options) for model in (digits.module(), program))
    assert decided(mine) == decided(module)
    assert mine.report.drift.relative_l2 == pytest.approx(module.report.drift.relative_l2, rel=1e-3)
    assert mine.report.after.parameters == module.report.after.parameters
    assert mine.report.before.macs == module.report.before.macs


def test_python(digits: zoo.ZooModel, program: ExportedProgram, tmp_path: Path):
    text = str(program.graph)
    result = lrcompile.optimize(
        program, Budget(keep=0.6), calibration=images(digits), evaluation=held(digits), options=LOOSE
    )
    assert isinstance(result.model, ExportedProgram) and str(program.graph) == text
    x = torch.from_numpy(held(digits)["images"])
    dense, small = program.module()(x), result.model.module()(x)
    drift = float((small - dense).detach().norm() / dense.detach().norm())
    assert drift == pytest.approx(result.report.drift.relative_l2, rel=1e-3)
    values = sum(tensor.numel() for tensor in result.model.state_dict.values())
    assert values == result.report.after.parameters < 0.75 * result.report.before.parameters
    path = result.save(tmp_path / "out")
    assert path.name == "model.pt2" and (path.parent / "model.report.json").is_file()
    torch.testing.assert_close(torch.export.load(path).module()(x), small)
    compiled = torch.compile(result.model.module(), backend="eager")
    torch.testing.assert_close(compiled(x), small)


def test_a_plan_without_changes(digits: zoo.ZooModel, program: ExportedProgram):
    plan = lrcompile.plan(program, Budget(keep=0.6), calibration=images(digits), options=LOOSE)
    assert plan.graph == "fx" and len(plan.entries) == len(FxGraph(program).linear_sites())
    with pytest.raises(UsageError):
        lrcompile.optimize(program, Budget(keep=0.6))
    with pytest.raises(GateError):
        lrcompile.optimize(
            program, Budget(keep=0.5), calibration=images(digits), evaluation=held(digits),
            options=Options(latency=False, max_drift=1e-6, settings=Settings(probes=False)),
        )  # fmt: skip


def test_latency_is_a_budget_too():
    """What is timed are the program's own operations, as it came and as it is written."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(384, 384), torch.nn.ReLU(), torch.nn.Linear(384, 384))
    data = [{"input": np.random.default_rng(seed).standard_normal((128, 384)).astype(np.float32)} for seed in range(6)]
    options = Options(max_drift=10.0, seconds=0.1, threads=1, latency_batch=128, settings=Settings(probes=False))
    program = torch.export.export(wide, (torch.randn(3, 384),), dynamic_shapes=({0: torch.export.Dim("n", max=4096)},))
    result = lrcompile.optimize(program, Budget(latency=0.75), calibration=data, options=options)
    assert 0.4 < result.report.ratio.latency < 0.85
    assert sum(tensor.numel() for tensor in result.model.state_dict.values()) < 2 * 384 * 384


@dataclass(frozen=True)
class Wrong(GraphPass):
    """Claims to be exact, and halves a weight."""

    name: ClassVar[str] = "wrong"

    def apply(self, graph: Any, context: Any) -> list[Any]:
        site = next(site for site in graph.linear_sites() if not site.frozen)
        graph.replace(site, lrcompile.Dense(densify(site.operator) / 2))
        return [Rewritten(site.name)]


def test_a_wrong_pass_is_caught(digits: zoo.ZooModel, program: ExportedProgram):
    result = Pipeline([Wrong()], options=LOOSE).run(program, None, held(digits))
    record = next(each for each in result.report.passes if each.name.startswith("wrong"))
    assert record.rolled_back
    assert result.model is program and result.report.status == "unchanged"


def test_to_onnx_with_names_and_structure(digits: zoo.ZooModel, program: ExportedProgram, tmp_path: Path):
    result: Any = run(digits, program, Budget(keep=0.6))
    path = tmp_path / "small.onnx"
    torch.onnx.export(result.model, f=path, dynamo=True, verbose=False)
    feeds = held(digits, 5)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = result.built.run(feeds).values()
    (found,) = session.run(None, {session.get_inputs()[0].name: feeds["images"]})
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    sites = {site.name: site for site in OnnxGraph.load(path).linear_sites()}
    low = {name: text for name, text in decided(result).items() if text.startswith("Product(Dense")}
    assert len(low) >= 3
    for name in low:
        (site,) = [site for other, site in sites.items() if other == name or other.startswith(f"{name}.")]
        replaced = result.graph.replacements[name].operator
        torch.testing.assert_close(densify(site.operator), densify(replaced), rtol=1e-4, atol=1e-5)


def test_an_optimised_module_becomes_a_program(digits: zoo.ZooModel):
    """Structured layers are raised again from the operations that torch.export makes of them."""
    result = run(digits, digits.module(), Budget(keep=0.6))
    module = copy.deepcopy(result.model).eval()
    graph = FxGraph(exported(module, torch.from_numpy(images(digits, 2)["images"])))
    found = {site.name: repr(site.operator) for site in graph.linear_sites()}
    low = {name: text for name, text in decided(result).items() if text.startswith("Product(Dense")}
    assert low and low.items() <= found.items()
    assert isinstance(result.graph, ModuleGraph)


# -- command line ----------------------------------------------------------------------------


def test_the_command_line(cli: Cli, folder: Path):
    before = sha(folder / "model.pt2")
    said = cli(
        "optimize", "model.pt2", "-o", "small.pt2", "--keep", ".8", "--calib", "calib.npz", "--eval", "eval.npz",
        "--max-drift", "2", "--no-probes", "--json",
    )  # fmt: skip
    report = said.json
    assert said.code == 0 and report["status"] == "ok" and report["output"]["path"] == "small.pt2"
    assert sha(folder / "model.pt2") == before and report["output"]["sha256"] == sha(folder / "small.pt2")
    assert json.loads((folder / "small.report.json").read_text())["output"]["sha256"] == report["output"]["sha256"]
    assert (folder / "small.pt2").stat().st_size == report["after"]["bytes"] < report["before"]["bytes"]
    again = torch.export.load(folder / "small.pt2")
    assert sum(tensor.numel() for tensor in again.state_dict.values()) == report["after"]["parameters"]
    facts = cli("inspect", "small.pt2", "--json").json
    assert facts["parameters"] == report["after"]["parameters"] and facts["macs"] == report["after"]["macs"]
    assert any(site["structure"].startswith("Product") for site in facts["sites"])
    drift = cli("verify", "model.pt2", "small.pt2", "--eval", "eval.npz", "--json").json["drift"]
    assert drift["relative_l2"] == pytest.approx(report["drift"]["relative_l2"], rel=1e-6)
    planned = cli("plan", "model.pt2", "--keep", ".8", "--calib", "calib.npz", "--no-probes", "--json").json
    assert {d["site"]: d["structure"] for d in planned["decisions"] if d["pass"]}.keys() >= {
        d["site"] for d in report["decisions"] if d["pass"]
    }


def test_wrong_uses(cli: Cli, folder: Path):
    files = sorted(folder.iterdir())
    limits = ("--keep", ".8", "--calib", "calib.npz")
    assert cli("optimize", "model.pt2", "-o", "small.onnx", *limits, "--json").error["code"] == 2
    assert cli("optimize", "model.pt2", "-o", "model.pt2", *limits, "--json").error["code"] == 2
    (folder / "broken.pt2").write_bytes((folder / "model.pt2").read_bytes()[:1000])
    for words in (
        ("optimize", "broken.pt2", *limits),
        ("inspect", "broken.pt2"),
        ("verify", "model.pt2", "broken.pt2"),
    ):
        error = cli(*words, "--json").error
        assert error["code"] == 3 and error["where"].endswith("broken.pt2") and error["hint"]
    (folder / "broken.pt2").unlink()
    assert sorted(folder.iterdir()) == files
