"""Every exit code from a real situation: one line and a hint, JSON all the same, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.e2e.tool import Cli, Said
from tests.models import two_layer_mlp
from tests.trust.models import external

LOSSY = ("optimize", "model.onnx", "--keep", "0.6")
CALIB = ("--calib", "calib.npz")


def fails(cli: Cli, code: int, words: str, *command: object) -> Said:
    """The command fails with this code and message or hint, as text and as JSON, and leaves no trace."""
    before = cli.listing()
    plain = cli(*command)
    assert (plain.code, plain.out) == (code, ""), plain
    said = cli.json(*command)
    assert said.code == code
    assert words in f"{said.error['where']}: {said.error['message']} ({said.error['hint']})"
    assert "Traceback" not in plain.err + said.err and "\x1b" not in plain.err + said.err
    status = {5: "gate_failed", 6: "infeasible"}.get(code, "error")
    assert said.json["status"] == status
    if command[0] == "optimize":
        assert said.json["output"] is said.json["report"] is None
    assert cli.listing() == before
    return said


# -- 2: the call ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["optimise", "model.onnx"], "unknown command 'optimise' (did you mean 'optimize'?)"),
        (["optimize", "model.onnx", "--kepe", "1"], "unknown option '--kepe' (did you mean '--keep'?)"),
        (["inspect", "model.onnx", "-x"], "unknown option '-x'"),
        (["optimize"], "Missing argument"),
        (["optimize", "model.onnx", "--keep", "much"], "Invalid value for '--keep'"),
        (["optimize", "model.onnx", "again.onnx"], "unexpected extra argument"),
        ([*LOSSY], "--calib samples.npz, or --data-free"),
        (["optimize", "model.onnx", "--keep", "0", *CALIB], "keep"),
        (["optimize", "model.onnx", "--keep", "1.5", *CALIB], "at most 1"),
        (["optimize", "model.onnx", "--keep", "nan", *CALIB], "not a positive amount"),
        (["optimize", "model.onnx", "--bytes", "6XB", *CALIB], "write 0.8, 500M or 60MB"),
        (["optimize", "model.onnx", "--macs", "-5", *CALIB], "not a positive amount"),
        ([*LOSSY, *CALIB, "--max-drift", "-1"], "max-drift"),
        ([*LOSSY, *CALIB, "--max-drift", "nan"], "max-drift"),
        ([*LOSSY, *CALIB, "--preset", "smal"], "unknown preset 'smal' (did you mean 'small'?)"),
        ([*LOSSY, *CALIB, "-p", "low-rnk"], "unknown pass 'low-rnk' (did you mean 'low-rank'?)"),
        ([*LOSSY, *CALIB, "-p", "low-rank{metrc=plain}"], "unknown option 'metrc' (did you mean 'metric'?)"),
        (
            [*LOSSY, *CALIB, "-p", "low-rank{metric=plian}"],
            "'plian' is not one of whitened, diagonal, plain (did you mean 'plain'?)",
        ),
        ([*LOSSY, *CALIB, "-p", "low-rank{shrink=much}"], "'much' is not float"),
        ([*LOSSY, *CALIB, "-p", "low-rank{shrink=1"], "closing brace"),
        ([*LOSSY, *CALIB, "-p", "clean"], "a budget needs a pass that makes weights smaller"),
        ([*LOSSY, *CALIB, "--include", "nothing*"], "the patterns select no site"),
        ([*LOSSY, *CALIB, "--metric", "nowhere:f"], "cannot load the metric"),
        ([*LOSSY, *CALIB, "-o", "model.onnx"], "the output is the input"),
        ([*LOSSY, *CALIB, "-o", "eval.npz"], "exists already"),
        ([*LOSSY, *CALIB, "-o", "."], "the output is a folder"),
        ([*LOSSY, *CALIB, "-o", "none/out.onnx"], "there is no such folder"),
        (["plan", "model.onnx"], "a plan needs a limit"),
        (["passes", "low-rnk"], "unknown pass 'low-rnk' (did you mean 'low-rank'?)"),
        (["verify", "model.onnx"], "Missing argument"),
    ],
)
def test_usage(cli: Cli, command: list[str], words: str):
    if "optimise" in command:  # no verb, no schema of its own
        said = cli(*command, "--json")
        assert said.code == 2 and said.json["schema"] == "lrcompile.usage/1"
        assert f"{said.error['message']} ({said.error['hint']})" == words
    else:
        fails(cli, 2, words, *command)


def test_a_report_in_the_way_is_told_at_once(cli: Cli):
    Path("out.report.json").write_text("{}")
    said = fails(cli, 2, "out.report.json: exists already", *LOSSY, *CALIB, "-o", "out.onnx")
    assert said.json["seconds"] < 5 and "decisions" not in said.json


def test_too_few_samples_to_hold_one_out(cli: Cli):
    np.savez("one.npz", x=np.ones((1, 64), np.float32))
    fails(cli, 2, "1 samples are too few", *LOSSY, "--calib", "one.npz")
    assert cli(*LOSSY, "--calib", "one.npz", "--eval", "eval.npz", "--dry-run", "--max-drift", "9").code == 0


# -- 3: the files --------------------------------------------------------------------------------


def samples(**arrays: np.ndarray) -> Callable[[], None]:
    return lambda: np.savez("bad.npz", **arrays)  # pyright: ignore[reportArgumentType]


X = np.ones((8, 64), np.float32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (samples(y=X), "'y' is no input of the model"),
        (samples(x=X, y=X), "'y' is no input of the model"),
        (samples(x=X[:, :7]), "has shape (8, 7), the model takes (batch, 64)"),
        (samples(x=X[0]), "the first dimension counts samples"),
        (samples(x=X.astype(np.int64)), "holds int64, the model takes float32"),
        (samples(x=X.astype(str)), "not numbers"),
        (samples(x=X[:0]), "zero samples"),
        (samples(x=np.where(np.arange(8)[:, None] == 5, np.nan, X)), "sample 5 holds NaN or infinity"),
        (samples(x=X.astype(np.float64) * 1e60), "leaves the range"),
        (lambda: Path("bad.npz").write_bytes(Path("calib.npz").read_bytes()[:900]), "cannot be read"),
        (lambda: Path("bad.npz").write_text("no archive"), "cannot be read"),
        (lambda: Path("bad.npz").mkdir(), "holds no .npz or .npy file"),
        (lambda: None, "no such file or folder of samples"),
    ],
    ids=range(13),
)
def test_samples(cli: Cli, make: Callable[[], None], words: str):
    make()
    fails(cli, 3, words, *LOSSY, "--calib", "bad.npz")
    fails(cli, 3, words, *LOSSY, *CALIB, "--eval", "bad.npz")


def test_samples_that_the_model_cannot_run_on(cli: Cli):
    """Token numbers beyond the table: names, types and shapes are right."""
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 16])
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        onnx.helper.make_node("MatMul", ["e", "w"], ["y"], name="mm"),
    ]
    weights = [numpy_helper.from_array(np.eye(5, 16, dtype=np.float32), "table")]
    weights.append(numpy_helper.from_array(np.eye(16, dtype=np.float32), "w"))
    graph = onnx.helper.make_graph(nodes, "g", [ids], [y], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), "t.onnx")
    np.savez("ids.npz", ids=np.full(8, 77))
    fails(cli, 3, "ONNX Runtime fails on these inputs", "optimize", "t.onnx", "--keep", "0.9", "--calib", "ids.npz")


@pytest.mark.parametrize("verb", ["inspect", "optimize", "plan", "verify"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"\x80\x04K\x01.", "pickle"),
        (b'{"irVersion": 8}', "text"),
        (0.6, "truncated"),
    ],
    ids=["missing", "empty", "html", "pickle", "text", "truncated"],
)
def test_files_that_are_no_model(cli: Cli, verb: str, content: bytes | float | None, words: str):
    if isinstance(content, float):
        content = Path("model.onnx").read_bytes()[: round(content * Path("model.onnx").stat().st_size)]
    if isinstance(content, bytes):
        Path("bad.onnx").write_bytes(content)
    more = {"plan": ["--keep", "0.5", *CALIB], "verify": ["model.onnx"]}.get(verb, [])
    fails(cli, 3, words, verb, "bad.onnx", *more)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(cli: Cli, value: float):
    proto = onnx.load("model.onnx")
    weight = np.array(numpy_helper.to_array(proto.graph.initializer[0]))
    weight[3, 3] = value
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "up.weight"))
    onnx.save(proto, "bad.onnx")
    fails(cli, 3, "up.weight", "optimize", "bad.onnx")


def test_external_data_outside_of_the_folder(cli: Cli):
    Path("sub").mkdir()
    Path("secret.bin").write_bytes(bytes(64))
    Path("sub/bad.onnx").write_bytes(external("../secret.bin").SerializeToString())
    fails(cli, 3, "secret.bin", "optimize", "sub/bad.onnx")


def test_a_folder_without_a_model(cli: Cli):
    Path("empty").mkdir()
    fails(cli, 3, "neither config.json nor model.onnx", "inspect", "empty")


# -- 4: beyond what is supported -----------------------------------------------------------------


def test_checkpoints_and_unknown_operators(cli: Cli):
    Path("model.pt").write_bytes(b"x")
    fails(cli, 4, "export it to ONNX", "optimize", "model.pt")
    proto = onnx.load("model.onnx")
    node = next(node for node in proto.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Mystery", "nowhere"
    proto.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(proto, "odd.onnx")
    fails(cli, 4, "ONNX Runtime cannot load the model", "plan", "odd.onnx", "--keep", "0.6", *CALIB)
    assert cli.json("inspect", "odd.onnx").json["macs"] is None


# -- 5 and 6: gate and budget --------------------------------------------------------------------


def test_gate(cli: Cli):
    said = fails(cli, 5, "above the limit 1e-06", *LOSSY, *CALIB, "--max-drift", "1e-6")
    found = said.json
    assert found["drift"]["passed"] is False and found["drift"]["relative_l2"] > 1e-6 == found["drift"]["limit"]
    assert found["sites"]["rewritten"] > 0 and any(each["pass"] == "low-rank" for each in found["decisions"])
    fails(cli, 5, "above the limit", *LOSSY, *CALIB, "--preset", "safe")


def test_gate_leaves_an_old_output_alone(cli: Cli):
    Path("out.onnx").write_text("old")
    fails(cli, 5, "above the limit", *LOSSY, *CALIB, "--max-drift", "1e-6", "-o", "out.onnx", "--force")
    assert Path("out.onnx").read_text() == "old"


def test_a_metric_replaces_the_drift_in_the_gate(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    Path("mine.py").write_text("def worst(reference, candidate):\n    print('lrcompile: noise')\n    return 7.0\n")
    Path("__pycache__").mkdir()
    monkeypatch.syspath_prepend(str(cli.folder))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    said = fails(cli, 5, "metric 7 is above the limit 6", *LOSSY, *CALIB, "--metric", "mine:worst", "--max-drift", "6")
    assert said.json["drift"]["metric"] == 7.0
    assert cli(*LOSSY, *CALIB, "--metric", "mine:worst", "--max-drift", "8").code == 0


@pytest.mark.parametrize(("limit", "value"), [("--keep", "0.01"), ("--bytes", "500"), ("--macs", "0.001")])
def test_infeasible(cli: Cli, limit: str, value: str):
    for verb in ("optimize", "plan"):
        said = fails(cli, 6, "cannot be met; the best found is", verb, "model.onnx", limit, value, *CALIB)
        budget = said.json["budget"]
        line = budget[limit.removeprefix("--")]
        assert budget["feasible"] is False and line["reached"] > line["target"] == float(value)
    best = cli.json("plan", "model.onnx", limit, f"{line['reached'] * 1.0001:.6f}", *CALIB)
    assert best.code == 0, "what is called the best must be reachable"


# -- Hugging Face folders ------------------------------------------------------------------------


def test_hugging_face_folders(cli: Cli, bert: Path):
    shutil.copytree(bert, "bert")
    Path("bert/tokens.npz").rename("tokens.npz")
    budget = ("--keep", "0.6", "--calib", "tokens.npz")
    before = {path.name: path.read_bytes() for path in Path("bert").iterdir()}
    fails(cli, 5, "above the limit", "optimize", "bert", *budget, "--max-drift", "1e-9", "-o", "new/deep/out")
    said = cli.json("optimize", "bert", *budget)
    found = said.json
    assert (said.code, said.err, found["output"]["path"]) == (0, "", "bert.lrcompile")
    assert found["report"] == "bert.lrcompile/report.json" and Path(found["report"]).is_file()
    assert found["ratio"]["bytes"] < 1 and found["budget"]["keep"]["reached"] <= 0.6
    assert {path.name: path.read_bytes() for path in Path("bert").iterdir()} == before
    same = cli.json("verify", "bert", "bert.lrcompile", "--eval", "tokens.npz", "--max-drift", "0.5")
    assert same.code == 0
    fails(cli, 2, "exists already", "optimize", "bert", *budget)
    assert cli.json("inspect", "bert").json["parameters"] == found["before"]["parameters"]
    assert cli.json("inspect", "bert.lrcompile").json["parameters"] == found["after"]["parameters"]
    np.savez("floats.npz", input_ids=np.ones((8, 4), np.float32))
    fails(
        cli,
        3,
        "the model fails on these inputs",
        "optimize",
        "bert",
        "--keep",
        "0.6",
        "--calib",
        "floats.npz",
        "-o",
        "o",
    )


def test_broken_hugging_face_folders(cli: Cli, bert: Path):
    shutil.copytree(bert, "bert")
    config, weights = Path("bert/config.json"), Path("bert/model.safetensors")
    good = config.read_text()
    config.write_text(good.replace("BertForSequenceClassification", "Nobody"))
    fails(cli, 4, "no model class 'Nobody'", "inspect", "bert")
    config.write_text("{")
    fails(cli, 3, "not readable as JSON", "inspect", "bert")
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(cli, 3, "cannot load the model", "inspect", "bert")
    weights.unlink()
    fails(cli, 3, "cannot load the model", "inspect", "bert")


def test_a_missing_extra_names_its_installation(cli: Cli, bert: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(cli, 2, 'pip install "lrcompile[zoo]"', "inspect", bert)


# -- what must not happen ------------------------------------------------------------------------


def test_a_bug_is_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr("lrcompile.stages.describe_before", broken)
    said = cli.json("optimize", "model.onnx")
    assert said.code == 1 and said.error["message"] == "ValueError: first line"
    debug = cli("optimize", "model.onnx", "--debug")
    assert debug.code == 1 and "Traceback" in debug.err and "in broken" in debug.err


def test_no_memory(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr("lrcompile.stages.make_plan", broken)
    fails(cli, 7, "not enough memory", *LOSSY, *CALIB)


def test_debug_shows_the_traceback_of_a_known_error(cli: Cli):
    said = cli(*LOSSY, *CALIB, "--max-drift", "1e-6", "--debug")
    assert said.code == 5 and "Traceback" in said.err and "\nerror: " in said.err


def test_a_larger_result_needs_to_be_asked_for(cli: Cli):
    """Factors of a tiny layer cost more in node and names than they save."""
    two_layer_mlp(Path("tiny.onnx"), features=17, hidden=17, classes=16, rank=8)
    said = cli.json("optimize", "tiny.onnx")
    if said.code == 0:
        assert said.json["status"] == "unchanged" or said.json["ratio"]["bytes"] <= 1
    else:
        fails(cli, 5, "--force-growth", "optimize", "tiny.onnx")
        assert cli("optimize", "tiny.onnx", "--force-growth").code == 0
