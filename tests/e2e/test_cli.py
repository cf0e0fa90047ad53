"""The verbs: their JSON, what they print, what they write, and that they write nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.e2e.tool import HEAD, Cli
from tests.models import DType, two_layer_mlp

OPTIMIZE = [
    "input", "output", "report", "before", "after", "ratio", "budget", "drift", "calibration", "seed", "preset",
    "sites", "decisions",
]  # fmt: skip
SIZE = ["parameters", "bytes", "macs", "latency_ms", "peak_rss"]
RATIO = ["parameters", "bytes", "macs", "latency", "latency_low", "latency_high"]
DRIFT = {"relative_l2", "cosine", "top1", "kl", "metric", "samples", "limit", "passed"}
DECISION = {"site", "shape", "pass", "structure", "keep", "predicted", "error", "reason"}
BUDGET = ("--keep", "0.6", "--calib", "calib.npz")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_optimize_says_and_writes_what_is_documented(cli: Cli):
    before = sha256(Path("model.onnx"))
    said = cli.json("optimize", "model.onnx", "-o", "out.onnx", *BUDGET, "--eval", "eval.npz", "--latency-check")
    found = said.json
    assert (said.code, said.err, found["schema"], found["status"]) == (0, "", "lrcompile.optimize/1", "ok")
    assert set(found) >= {*HEAD, *OPTIMIZE} and "error" not in found
    out = Path("out.onnx")
    assert found["input"] == {"path": "model.onnx", "sha256": before, "bytes": Path("model.onnx").stat().st_size}
    assert found["output"] == {"path": "out.onnx", "sha256": sha256(out), "bytes": out.stat().st_size}
    assert sha256(Path("model.onnx")) == before
    assert list(found["before"]) == list(found["after"]) == SIZE
    assert all(value > 0 for size in ("before", "after") for value in found[size].values())
    assert list(found["ratio"]) == RATIO
    ratio = found["ratio"]
    assert ratio["bytes"] == pytest.approx(found["output"]["bytes"] / found["input"]["bytes"])
    assert ratio["latency_low"] <= ratio["latency"] <= ratio["latency_high"]
    assert found["budget"]["keep"]["target"] == 0.6 and found["budget"]["keep"]["reached"] <= 0.6
    assert found["budget"]["feasible"] is True
    assert set(found["drift"]) >= DRIFT and found["drift"]["samples"] == 24 and found["drift"]["passed"] is True
    assert set(found["calibration"]) == {"kind", "samples", "tokens", "sha256"}
    assert found["calibration"]["samples"] == found["calibration"]["tokens"] == 40
    assert (found["seed"], found["preset"]) == (0, "small")
    assert sum(found["sites"][name] for name in ("rewritten", "dense", "refused")) == found["sites"]["total"] == 2
    assert [set(each) for each in found["decisions"]] == [DECISION] * 2
    assert {path.name for path in Path().iterdir()} == {
        "model.onnx", "calib.npz", "eval.npz", "out.onnx", "out.report.json", "out.report.html"
    }  # fmt: skip


def test_the_drift_is_the_real_one(cli: Cli):
    found = cli.json("optimize", "model.onnx", "-o", "out.onnx", *BUDGET, "--eval", "eval.npz").json
    inputs = dict(np.load("eval.npz"))
    a, b = (np.asarray(onnxruntime.InferenceSession(name).run(None, inputs)[0]) for name in ("model.onnx", "out.onnx"))
    assert found["drift"]["relative_l2"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-3)
    assert found["drift"]["top1"] == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    stored = sum(np.prod(tensor.dims) for tensor in onnx.load("out.onnx").graph.initializer)
    assert found["after"]["parameters"] == stored


def test_the_sidecar_is_the_same_object(cli: Cli):
    found = cli.json("optimize", "model.onnx", "-o", "out.onnx", *BUDGET).json
    assert found["report"] == "out.report.json"
    stored = json.loads(Path("out.report.json").read_text())
    for key in set(OPTIMIZE) | {"schema", "status", "versions"}:
        assert stored[key] == found[key]
    page = Path("out.report.html").read_text()
    assert page.startswith("<!") and not re.search(r"(src|href)=|https?://(?!www.w3.org/)", page)


def test_paths_are_the_callers(cli: Cli):
    Path("sub").mkdir()
    found = cli.json("optimize", cli.folder / "model.onnx", "-o", "sub/out.onnx", *BUDGET).json
    assert found["input"]["path"] == str(cli.folder / "model.onnx")
    assert (found["output"]["path"], found["report"]) == ("sub/out.onnx", "sub/out.report.json")
    assert Path(found["report"]).is_file()


def test_a_plan_writes_nothing(cli: Cli):
    before = cli.listing()
    said = cli.json("plan", "model.onnx", *BUDGET)
    found = said.json
    assert (said.code, found["schema"], found["status"]) == (0, "lrcompile.plan/1", "ok")
    assert set(found) >= set(OPTIMIZE) - {"output", "after", "drift"}
    assert not {"output", "after", "drift"} & set(found)
    assert list(found["ratio"]) == ["parameters", "bytes", "macs"]
    assert found["budget"]["keep"]["reached"] <= 0.6
    assert cli.listing() == before
    assert "low-rank" in cli("plan", "model.onnx", *BUDGET).out


def test_plan_and_optimize_agree(cli: Cli):
    np.savez("four.npz", x=np.load("calib.npz")["x"][:32])
    plan = cli.json("plan", "model.onnx", "--keep", "0.6", "--calib", "four.npz").json
    done = cli.json("optimize", "model.onnx", "--keep", "0.6", "--calib", "four.npz", "--eval", "eval.npz").json
    for mine, theirs in zip(plan["decisions"], done["decisions"], strict=True):
        assert (mine["pass"], mine["keep"], mine["reason"]) == (theirs["pass"], theirs["keep"], theirs["reason"])
    assert plan["ratio"]["parameters"] == pytest.approx(done["ratio"]["parameters"], rel=0.01)


def test_inspect(cli: Cli):
    found = cli.json("inspect", "model.onnx").json
    assert list(found)[4:] == [
        "input", "opset", "inputs", "outputs", "nodes", "parameters", "bytes", "macs", "sites"
    ]  # fmt: skip
    assert (found["opset"], found["nodes"], found["macs"]) == (20, 4, 64 * 96 + 96 * 10)
    assert found["parameters"] == 64 * 96 + 96 + 96 * 10 + 10
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 64]}]
    assert [each["name"] for each in found["outputs"]] == ["y"]
    assert [(each["shape"], each["uses"]) for each in found["sites"]] == [([96, 64], 1), ([10, 96], 1)]
    assert all(set(each) >= {"name", "shape", "uses", "kind", "input"} for each in found["sites"])
    assert "96×64" in cli("inspect", "model.onnx").out


def test_verify(cli: Cli):
    cli.json("optimize", "model.onnx", "-o", "out.onnx", *BUDGET)
    said = cli.json("verify", "model.onnx", "out.onnx", "--eval", "eval.npz")
    found = said.json
    assert (said.code, found["schema"], found["status"]) == (0, "lrcompile.verify/1", "ok")
    assert found["a"]["sha256"] == sha256(Path("model.onnx")) and found["b"]["path"] == "out.onnx"
    assert set(found["drift"]) >= DRIFT and found["drift"]["samples"] == 24
    same = cli.json("verify", "model.onnx", "model.onnx").json
    assert same["drift"]["relative_l2"] == 0


def test_verify_above_the_limit(cli: Cli):
    cli.json("optimize", "model.onnx", "-o", "out.onnx", *BUDGET)
    said = cli.json("verify", "model.onnx", "out.onnx", "--max-drift", "1e-6")
    assert (said.code, said.json["status"]) == (5, "gate_failed")
    assert "above the limit 1e-06" in said.error["message"]
    assert said.json["drift"]["passed"] is False
    assert "FAILED" in cli("verify", "model.onnx", "out.onnx", "--max-drift", "1e-6").out


def test_verify_of_models_with_other_inputs(cli: Cli):
    proto = onnx.load("model.onnx")
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "z"
    onnx.save(proto, "other.onnx")
    said = cli.json("verify", "model.onnx", "other.onnx", "--eval", "eval.npz")
    assert said.code == 3 and "takes the inputs z" in said.error["message"]


def test_passes(cli: Cli):
    found = cli.json("passes").json
    table = {each["name"]: each for each in found["passes"]}
    assert {"clean", "exact-low-rank", "low-rank"} <= set(table)
    assert all(set(each) == {"name", "exact", "options", "doc"} for each in table.values())
    assert table["clean"]["exact"] is True and table["low-rank"]["exact"] is False
    assert table["low-rank"]["options"]["shrink"] == {"type": "float | None", "default": None}
    (one,) = cli.json("passes", "low-rank").json["passes"]
    assert one == table["low-rank"]
    assert "shrink=None" in cli("passes", "low-rank").out


def test_doctor(cli: Cli):
    said = cli.json("doctor")
    assert said.code == 0
    checks = {each["name"]: each for each in said.json["checks"]}
    assert all(set(each) >= {"name", "ok", "version", "hint"} for each in checks.values())
    assert checks["onnxruntime"]["version"] == onnxruntime.__version__ and checks["onnxruntime runs a model"]["ok"]
    assert "onnxruntime" in cli("doctor").out


# -- bare forms ----------------------------------------------------------------------------------


def test_bare_optimize_of_a_model_without_exact_gains(cli: Cli):
    before = cli.listing()
    said = cli("optimize", "model.onnx")
    assert said.code == 0 and cli.listing() == before
    assert "nothing was written" in said.out and "--keep 0.8 --calib" in said.out
    found = cli.json("optimize", "model.onnx").json
    assert (found["status"], found["output"], found["report"], found["preset"]) == ("unchanged", None, None, "safe")


def test_bare_optimize_writes_beside_the_model(cli: Cli):
    two_layer_mlp(Path("low.onnx"), rank=8)
    said = cli("optimize", "low.onnx")
    assert said.code == 0 and "wrote low.lrcompile.onnx" in said.out
    assert Path("low.lrcompile.onnx").stat().st_size < 0.6 * Path("low.onnx").stat().st_size
    assert cli.json("verify", "low.onnx", "low.lrcompile.onnx", "--max-drift", "1e-4").code == 0
    found = cli.json("optimize", "low.onnx", "--force").json
    assert found["sites"]["rewritten"] == 1 and found["output"]["path"] == "low.lrcompile.onnx"


def test_a_model_without_a_linear_layer(cli: Cli):
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], name="r")], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), "r.onnx")
    before = cli.listing()
    said = cli.json("optimize", "r.onnx")
    assert (said.code, said.json["status"], said.json["sites"]["total"]) == (0, "unchanged", 0)
    assert cli.listing() == before
    assert "no linear weight" in cli("optimize", "r.onnx").out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions(cli: Cli, dtype: DType):
    built = two_layer_mlp(Path("half.onnx"), dtype=dtype)
    samples = built.example(30)["x"].astype(np.float32)
    np.savez("half.npz", x=samples)
    said = cli.json("optimize", "half.onnx", "--keep", "0.7", "--calib", "half.npz")
    assert (said.code, said.json["status"]) == (0, "ok"), said.err
    kept = {tensor.data_type for tensor in onnx.load("half.lrcompile.onnx").graph.initializer}
    assert kept == {tensor.data_type for tensor in onnx.load("half.onnx").graph.initializer}
    assert cli.json("verify", "half.onnx", "half.lrcompile.onnx", "--eval", "half.npz", "--max-drift", "0.5").code == 0


def test_a_fifth_of_the_samples_is_held_out(cli: Cli):
    found = cli.json("optimize", "model.onnx", *BUDGET).json
    assert (found["calibration"]["samples"], found["drift"]["samples"]) == (32, 8)
    for count, held in ((2, 1), (4, 1), (10, 2)):
        np.savez("few.npz", x=np.load("calib.npz")["x"][:count])
        found = cli.json("optimize", "model.onnx", "--keep", "0.6", "--calib", "few.npz", "--dry-run", "--max-drift", 9)
        assert (found.json["calibration"]["samples"], found.json["drift"]["samples"]) == (count - held, held)


def test_data_free_is_stamped(cli: Cli):
    found = cli.json("optimize", "model.onnx", "--keep", "0.6", "--data-free", "--eval", "eval.npz").json
    assert found["calibration"]["kind"] == "uncalibrated" and found["drift"]["samples"] == 24
    assert "uncalibrated" in cli("optimize", "model.onnx", "--keep", "0.6", "--data-free", "--force").out
    assert "uncalibrated" in Path("model.lrcompile.report.html").read_text()


def test_several_limits_all_hold(cli: Cli):
    found = cli.json("optimize", "model.onnx", "--keep", "0.8", "--bytes", "0.7", "--macs", "5k", *BUDGET[2:]).json
    assert found["ratio"]["bytes"] <= 0.7 and found["after"]["macs"] <= 5000
    assert found["budget"]["bytes"]["reached"] <= 0.7 and found["budget"]["macs"]["target"] == 5000


def test_a_dry_run_writes_nothing(cli: Cli):
    before = cli.listing()
    said = cli.json("optimize", "model.onnx", *BUDGET, "--dry-run")
    assert (said.code, said.json["status"], said.json["output"], said.json["report"]) == (0, "ok", None, None)
    assert said.json["drift"]["passed"] is True and said.json["after"]["bytes"] < said.json["before"]["bytes"]
    assert cli.listing() == before
    assert "dry run" in cli("optimize", "model.onnx", *BUDGET, "--dry-run").out


def test_the_cache_changes_nothing(cli: Cli):
    found = []
    for name, extra in (("a", ()), ("b", ()), ("c", ("--no-cache",))):
        found.append(cli.json("optimize", "model.onnx", *BUDGET, "-o", f"{name}.onnx", *extra).json)
    assert len({each["output"]["sha256"] for each in found}) == 1
    assert found[0]["costs"] == found[1]["costs"] == found[2]["costs"]


def test_force_replaces(cli: Cli):
    assert cli("optimize", "model.onnx", *BUDGET).code == 0
    first = Path("model.lrcompile.onnx").read_bytes()
    assert cli("optimize", "model.onnx", *BUDGET).code == 2
    assert cli("optimize", "model.onnx", "--keep", "0.4", *BUDGET[2:], "--force", "--max-drift", "1").code == 0
    assert Path("model.lrcompile.onnx").read_bytes() != first
    assert cli("optimize", "model.onnx", *BUDGET, "-o", "model.onnx").code == 2
    assert cli("optimize", "model.onnx", *BUDGET, "-o", "model.onnx", "--force").code == 0
    assert cli.json("verify", "model.onnx", "model.lrcompile.onnx").code == 0


def test_progress_goes_to_stderr_without_escape_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    said = cli("optimize", "model.onnx", *BUDGET)
    assert "lrcompile: calibrating" in said.err and "lrcompile:" not in said.out
    assert "\x1b" not in said.out + said.err
    assert cli("optimize", "model.onnx", *BUDGET, "--force", "-q").err == ""
