"""``lrcompile deploy`` of quantised and compressed models, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from lrcompile.cli.app import app
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.quantise import quantise
from lrcompile.zoo import digits_vit
from tests.mcu.nets import Encoder, made

SHAPE = "--shape=images=1,1,8,8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """calib.npz and run.npz of digits, x.npz of the encoder, encoder.onnx."""
    path = tmp_path_factory.mktemp("deploy")
    np.savez(path / "calib.npz", images=digits_vit.digits("calibration")[0])
    np.savez(path / "run.npz", images=digits_vit.digits("test")[0][:2])
    np.savez(path / "x.npz", x=np.random.default_rng(0).standard_normal((4, 7, 24)).astype(np.float32))
    onnx.save(made(Encoder, 1, 7, 24), path / "encoder.onnx")
    return path


def deploy(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """(exit code, the JSON object)."""
    done = CliRunner().invoke(app, ["deploy", *map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


def digits(folder: Path, name: str, *options: str | Path) -> tuple[int, dict[str, Any]]:
    source = ["--calib", folder / "calib.npz", "--run", folder / "run.npz", SHAPE]
    return deploy(digits_vit.ONNX, "-o", folder / name, "--ram", "16KB", *source, *options)


def test_int8_runs_within_its_memory(folder: Path):
    code, found = digits(folder, "int8", "--int8")
    assert code == 0, found
    assert found["precision"] == "int8"
    assert found["ram"]["total"] <= 16 << 10
    assert found["violations"] == [] and found["samples"] == 2
    assert found["max_error"] < 0.3  # of logits up to 15
    assert {"firmware.elf", "model.c", "model.h", "weights.bin", "main.c", "report.json"} <= {
        path.name for path in (folder / "int8").iterdir()
    }


def test_compression_and_int8_in_one_command(folder: Path):
    dense = digits(folder, "dense", "--int8")[1]
    code, found = digits(folder, "kept", "--int8", "--keep", "0.5")
    assert code == 0, found
    assert found["flash"]["weights"] < 0.62 * dense["flash"]["weights"]
    assert found["instructions"] < 0.8 * dense["instructions"]


@pytest.mark.parametrize("option", [["--int8"], ["--keep", "0.5"]])
def test_what_needs_calibration_says_so(option: list[str], folder: Path):
    code, found = deploy(digits_vit.ONNX, "-o", folder / "none", SHAPE, *option)
    assert code == 2
    assert "--calib" in found["error"]["hint"]
    assert not (folder / "none").exists()


def test_a_file_with_pairs_is_deployed_as_it_is(folder: Path):
    import onnx_ir as ir

    samples = [{"x": each[None]} for each in np.load(folder / "x.npz")["x"]]
    model = quantise(OnnxGraph.load(folder / "encoder.onnx").model, samples)
    onnx.save(ir.to_proto(model), folder / "pairs.onnx")
    code, found = deploy(folder / "pairs.onnx", "-o", folder / "pairs")
    assert (code, found["precision"]) == (0, "int8"), found


def test_not_a_number_in_a_weight(folder: Path):
    proto = onnx.load(folder / "encoder.onnx")
    weight = next(each for each in proto.graph.initializer if len(each.dims) == 2)
    numbers = numpy_helper.to_array(weight).copy()
    numbers[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(numbers, weight.name))
    onnx.save(proto, folder / "nan.onnx")
    code, found = deploy(folder / "nan.onnx", "-o", folder / "nan")
    assert code == 3
    assert weight.name in found["error"]["where"] and "NaN" in found["error"]["message"]
    assert not (folder / "nan").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ram", "3KB"], ["more than", "--int8"]),
        (["--ram", "16KB", "--flash", "8KB"], ["weights take", "--keep"]),
        (["--ram", "2KB"], ["stack"]),
        (["--ram", "1KB"], ["stack"]),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_would_help(options: list[str], words: list[str], folder: Path):
    code, found = deploy(folder / "encoder.onnx", "-o", folder / "unfit", *options)
    assert code == 4
    text = " ".join(str(found["error"][key]) for key in ("message", "where", "hint"))
    assert all(word in text for word in words), text
    assert not (folder / "unfit").exists()


def test_a_dynamic_shape_asks_for_one(folder: Path):
    code, found = deploy(digits_vit.ONNX, "-o", folder / "dynamic")
    assert code == 4
    assert "--shape" in found["error"]["hint"]


def test_an_operator_without_a_formula_is_named_with_its_node(folder: Path):
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    node = onnx.helper.make_node("RandomUniformLike", ["x"], ["y"], name="dice")
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.save(proto, folder / "dice.onnx")
    code, found = deploy(folder / "dice.onnx", "-o", folder / "dice")
    assert code == 4
    assert "RandomUniformLike" in found["error"]["message"] and "dice" in found["error"]["where"]
