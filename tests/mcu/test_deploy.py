"""``lrcompile deploy``: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from lrcompile.backends.c.deploy import Board, check, compile_to, formulas, plan
from lrcompile.backends.c.target import target_named
from lrcompile.cli.app import run
from tests.mcu.nets import Convolutions, Encoder, made

M7 = target_named("cortex-m7")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "encoder.onnx"
    onnx.save(made(Encoder, 1, 7, 24), path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "inputs.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((2, 7, 24), np.float32))
    return path


def deploy(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    capsys.readouterr()
    code = run(["deploy", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_firmware_that_is_proven(encoder: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "firmware"
    limits = ("--ram", "8KB", "--flash", "64KB")
    code, found = deploy(capsys, encoder, "--to", "c", *limits, "-o", out, "--run", inputs)
    assert code == 0, found
    assert found["schema"] == "lrcompile.deploy/1"
    assert found["status"] == "ok"
    assert found["samples"] == 2
    assert found["violations"] == 0
    assert found["max_error"] < 1e-5
    assert found["instructions"] > 10_000
    assert found["ram"]["total"] <= found["limit"]["ram"] == 8192
    assert found["flash"]["total"] <= found["limit"]["flash"] == 65536
    assert found["stack_used"] <= found["ram"]["stack"]
    assert sorted(path.name for path in out.iterdir()) == sorted(found["files"])
    report = json.loads((out / "report.json").read_text())
    assert report["ram"] == found["ram"]
    assert report["bound"] <= found["ram"]["arena"]


def test_a_smaller_limit_is_met(tmp_path: Path):
    onnx.save(made(lambda: Encoder(tokens=31), 1, 31, 24), tmp_path / "net.onnx")
    model = formulas(tmp_path / "net.onnx")
    free, tight = plan(model, Board(M7)), plan(model, Board(M7, ram=16384))
    assert tight.arena < free.arena
    assert tight.work >= free.work


def test_convolutions_compute_the_same(tmp_path: Path):
    path = tmp_path / "net.onnx"
    onnx.save(made(Convolutions, 1, 3, 16, 16), path)
    board = Board(M7)
    firmware = compile_to(tmp_path / "build", plan(formulas(path), board), board)
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16), np.float32)
    found = check(firmware, path, [{"x": x}])
    assert found.max_error < 1e-5
    assert not found.violations


def test_the_source_is_plain_c99(encoder: Path, tmp_path: Path):
    program = compile_to(tmp_path, plan(formulas(encoder), Board(M7)), Board(M7)).program
    source = str(program.files["model.c"])
    assert not re.search(r"\b(malloc|free|alloca|printf|TVM)\w*\(", source)
    own = re.findall(r"^(?!extern|static|typedef)[a-z][a-z ]+ \w+\[\d*\](?: =.*)?;", source, re.M)
    assert [line.split()[-1].split("[")[0] for line in own] == ["model_arena"]
    host = ["cc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", str(tmp_path / "model.c")]
    command = [sys.executable, "-m", "ziglang", *host, "-o", str(tmp_path / "host.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--ram", "3KB"), 4, "bytes of RAM"),
        (("--ram", "100"), 4, "inputs and outputs"),
        (("--target", "cortex-m99"), 2, "no target"),
        (("--shape", "x=big"), 2, "not a shape"),
        (("--shape", "y=1,2"), 3, "no such input"),
        (("--ram", "-3"), 2, "not a positive amount"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], code: int, said: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "firmware"
    got, found = deploy(capsys, encoder, "--to", "c", "-o", out, *words)
    assert got == code, found
    assert said in found["error"]["message"]
    assert not out.exists()


def test_an_output_that_exists(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("keep")
    code, _ = deploy(capsys, encoder, "--to", "c", "-o", tmp_path)
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dynamic_shape_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    h = onnx.helper
    x, y = (h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    code, found = deploy(capsys, tmp_path / "m.onnx", "--to", "c", "-o", tmp_path / "a")
    assert code == 4
    assert "--shape x=" in found["error"]["hint"]
    code, found = deploy(capsys, tmp_path / "m.onnx", "--to", "c", "-o", tmp_path / "a", "--shape", "x=3,4")
    assert code == 0, found


def test_nan_weights_and_wrong_samples(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.savez(tmp_path / "bad.npz", x=np.zeros((1, 9, 24), np.float32))
    code, found = deploy(capsys, encoder, "--to", "c", "-o", tmp_path / "a", "--run", tmp_path / "bad.npz")
    assert code == 3, found
    model = onnx.load(encoder)
    weight = next(each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    code, found = deploy(capsys, tmp_path / "nan.onnx", "--to", "c", "-o", tmp_path / "a")
    assert code == 3, found
    assert not (tmp_path / "a").exists()
