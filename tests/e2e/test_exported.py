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
from torch._dynamo.exc import BackendCompilerFailed
from torch.export import ExportedProgram

import lrcompile
from lrcompile import Budget, Options, Pipeline, Settings, zoo
from lrcompile.backends.exported import Exported
from lrcompile.errors import GateError, UsageError
from lrcompile.frontend import open_graph
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_time import both
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.structured import Structured
from lrcompile.linop import densify
from lrcompile.rewrite import GraphPass, Rewritten
from tests.e2e.running import PROBED, decided, held, images, run, sha
from tests.e2e.tool import Cli, process
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
    loaded: Any = lrcompile.load(path.parent)
    torch.testing.assert_close(loaded.module()(x), small)
    assert open_graph(path.parent).files == [path]
    compiled = torch.compile(result.model.module(), backend="eager")
    torch.testing.assert_close(compiled(x), small)


def test_a_plan_without_changes(digits: zoo.ZooModel, program: ExportedProgram):
    plan = lrcompile.plan(program, Budget(keep=0.6), calibration=images(digits), options=LOOSE)
    assert plan.graph == "fx" and len(plan.entries) == len(FxGraph(program).linear_sites())
    with pytest.raises(BackendCompilerFailed, match="fx"):
        torch.compile(digits.module(), backend="lrcompile", options={"plan": plan})(
            torch.from_numpy(images(digits, 2)["images"])
        )
    with pytest.raises(UsageError):
        lrcompile.optimize(program, Budget(keep=0.6))
    with pytest.raises(GateError):
        lrcompile.optimize(
            program, Budget(keep=0.5), calibration=images(digits), evaluation=held(digits),
            options=Options(latency=False, max_drift=1e-6, settings=Settings(probes=False)),
        )  # fmt: skip


def test_what_is_timed_are_the_programs_own_operations(digits: zoo.ZooModel, program: ExportedProgram):
    graph = FxGraph(program)
    site = next(site for site in graph.linear_sites() if min(site.shape) > 16)
    graph.replace(site, lrcompile.low_rank(torch.ones(site.shape[0], 2), torch.ones(2, site.shape[1])))
    before, after = both(graph)
    feeds = {name: torch.from_numpy(value) for name, value in held(digits, 3).items()}
    for module, wanted in ((before, program), (after, graph.lowered())):
        assert not any(isinstance(each, Structured) for each in module.modules())
        torch.testing.assert_close(module(**feeds)["output"], wanted.module()(*feeds.values()))


class Wasteful(torch.nn.Module):
    """An un-merged adapter, a weight of low rank, and two layers with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.a, self.b = torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, 32, bias=False)
        self.first, self.second = torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 32)
        with torch.no_grad():
            self.low.weight.copy_(torch.randn(32, 3) @ torch.randn(3, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.base(x) + 0.5 * self.b(self.a(x)))
        return self.second(self.first(self.low(y).relu()))


def test_exact_passes_need_no_budget():
    torch.manual_seed(0)
    program = exported(Wasteful(), torch.randn(3, 5, 32))
    data = [{"x": np.random.default_rng(0).standard_normal((4, 5, 32)).astype(np.float32)}]
    result = lrcompile.optimize(program, evaluation=data, options=Options(latency=False))
    assert result.report.status == "ok" and result.report.drift.relative_l2 < 1e-6
    assert [record.rewritten for record in result.report.passes] == [0, 2, 1]
    assert sorted(result.model.state_dict) == [
        "base.bias", "base.weight", "first.weight", "low.bias", "low.factors.left.weight", "low.factors.right.weight",
        "second.bias",
    ]  # fmt: skip
    assert result.report.after.parameters == 2 * 32 * 32 + 2 * 3 * 32 + 3 * 32


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


def program_of(result: Any) -> Any:
    return Exported().build(result.graph)


def test_to_onnx_with_names_and_structure(digits: zoo.ZooModel, program: ExportedProgram, tmp_path: Path):
    """The gate measures the file that is written, in ONNX Runtime."""
    path = tmp_path / "small.onnx"
    result: Any = run(digits, program, Budget(keep=0.6), out=path)
    report = json.loads((tmp_path / "small.report.json").read_text())
    assert report["output"]["sha256"] == sha(path) and result.report.drift.passed
    feeds = held(digits, 5)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = program_of(result).run(feeds).values()
    (found,) = session.run(["output"], {"images": feeds["images"]})
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


def test_wrong_uses(cli: Cli, folder: Path, file: Path):
    files = sorted(folder.iterdir())
    limits = ("--keep", ".8", "--calib", "calib.npz")
    assert cli("optimize", file, "-o", "small.pt2", *limits, "--json").error["code"] == 2
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


LIMITED = """import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (13_000, 13_000))
from lrcompile.cli import main
main()"""


def test_full_disk(cli: Cli, folder: Path):
    before = sorted(folder.iterdir())
    words = ("optimize", "model.pt2", "--keep", "0.8", "--data-free", "-o", "out.pt2", "--json")
    said = process(*words, folder=folder, code=LIMITED, PYTHONDONTWRITEBYTECODE="1")
    assert said.code == 7 and "cannot write: File too large" in said.json["error"]["message"]
    assert sorted(folder.iterdir()) == before
