"""What a board, a toolchain or a model cannot do is said before anything is written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from lrcompile.cli.app import run

FLOAT = onnx.TensorProto.FLOAT


def save(path: Path, *nodes: onnx.NodeProto, shape: tuple[int, ...] = (1, 64)) -> Path:
    """A model from ``x`` to ``y``; ``w`` is a square weight."""
    x, y = (helper.make_tensor_value_info(name, FLOAT, shape) for name in "xy")
    weight = np.random.default_rng(0).standard_normal((shape[-1], shape[-1])).astype(np.float32)
    graph = helper.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def refused(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> tuple[int, dict[str, str]]:
    """Exit code and error; the model stays as it is, nothing is written beside it."""
    before, files = model.read_bytes(), sorted(model.parent.iterdir())
    capsys.readouterr()
    code = run(["deploy", str(model), "--to", "c", "-o", str(model.parent / "firmware"), *words, "--json"])
    assert model.read_bytes() == before
    assert sorted(model.parent.iterdir()) == files
    return code, json.loads(capsys.readouterr().out)["error"]


def test_an_operator_without_a_formula_is_named_with_its_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save(tmp_path / "m.onnx", helper.make_node("Det", ["x"], ["y"], name="the_node"), shape=(64, 64))
    code, error = refused(capsys, model)
    assert code == 4
    assert "Det" in error["message"]
    assert error["where"] == "the_node"


def test_weights_that_flash_cannot_hold_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save(tmp_path / "m.onnx", helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    code, error = refused(capsys, model, "--flash", "8KB")
    assert code == 4
    assert "take 16384 bytes, 8192 more than the flash has" in error["message"]
    assert "product" in error["message"]
    assert "--int8" in error["hint"] and "--keep" in error["hint"]


def test_code_that_flash_cannot_hold_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save(tmp_path / "m.onnx", helper.make_node("Tanh", ["x"], ["y"], name="product"))
    code, error = refused(capsys, model, "--flash", "512")
    assert code == 4
    assert "FLASH of 512 bytes is" in error["message"]
    assert "bytes too small" in error["message"]


def test_ram_that_is_too_small_says_by_how_much_where_and_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    chain = helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), helper.make_node("Softmax", ["h"], ["s"])
    model = save(
        tmp_path / "m.onnx", *chain, helper.make_node("MatMul", ["w", "s"], ["y"], name="last"), shape=(64, 64)
    )
    code, error = refused(capsys, model, "--ram", "35KB")
    assert code == 4
    assert "more than there are" in error["message"]
    assert "node " in error["message"]
    assert "quantise" in error["hint"] and "rank" in error["hint"]


def test_a_stack_that_no_call_fits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]))
    code, error = refused(capsys, model, "--stack", "64")
    assert code == 2
    assert "a stack of 64 bytes is too small" in error["message"]


@pytest.mark.parametrize(("module", "package"), [("ziglang", "ziglang"), ("tvm", "apache-tvm")])
def test_a_missing_toolchain_names_its_extra(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    package: str,
):
    model = save(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    code, error = refused(capsys, model)
    assert code == 2
    assert package in error["message"]
    assert "pip install" in error["hint"]
