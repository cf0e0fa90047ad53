"""``lrcompile deploy`` of quantised and compressed models."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.cli.app import run
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.quantise import quantise
from tests.mcu.nets import Encoder, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """encoder.onnx, and x.npz for it."""
    path = tmp_path_factory.mktemp("deploy")
    np.savez(path / "x.npz", x=np.random.default_rng(0).standard_normal((5, 7, 24)).astype(np.float32))
    onnx.save(made(Encoder, 1, 7, 24), path / "encoder.onnx")
    return path


def deploy(folder: Path, model: str, name: str, *options: str | Path) -> tuple[int, dict[str, Any]]:
    """(exit code, the JSON object)."""
    arguments = [folder / model, "--to", "c", "-o", folder / name, *options, "--json"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(["deploy", *map(str, arguments)])
    return code, json.loads(out.getvalue())


def test_int8_runs_within_its_memory(folder: Path):
    data = ["--calib", folder / "x.npz", "--run", folder / "x.npz"]
    code, found = deploy(folder, "encoder.onnx", "int8", "--int8", "--ram", "8KB", "--flash", "64KB", *data)
    assert code == 0, found
    assert found["precision"] == "int8"
    assert found["ram"]["total"] <= 8 << 10
    assert (found["violations"], found["samples"]) == (0, 5)
    assert found["max_error"] < 0.2
    assert 0 < found["quantisation_drift"] < 0.1


def test_a_drift_above_the_limit_is_refused(folder: Path):
    code, found = deploy(folder, "encoder.onnx", "far", "--int8", "--calib", folder / "x.npz", "--max-drift", "0.001")
    assert code == 5
    assert "0.001 is allowed" in found["error"]["message"]
    assert not (folder / "far").exists()


def test_compression_and_int8_in_one_command(folder: Path):
    options = ["--int8", "--keep", "0.6", "--max-drift", "10", "--calib", folder / "x.npz"]
    code, found = deploy(folder, "encoder.onnx", "kept", *options)
    assert code == 0, found
    whole = OnnxGraph.load(folder / "encoder.onnx").nbytes
    assert found["precision"] == "int8" and found["flash"]["weights"] < 0.4 * whole


@pytest.mark.parametrize("option", [["--int8"], ["--keep", "0.5"]])
def test_what_needs_calibration_says_so(option: list[str], folder: Path):
    code, found = deploy(folder, "encoder.onnx", "none", *option)
    assert code == 2
    assert option[0] in found["error"]["message"] and "--calib" in found["error"]["hint"]
    assert not (folder / "none").exists()


def test_a_file_with_pairs_is_computed_in_integers(folder: Path):
    samples = [{"x": each[None]} for each in np.load(folder / "x.npz")["x"]]
    ir.save(quantise(OnnxGraph.load(folder / "encoder.onnx").model, samples), folder / "pairs.onnx")
    code, found = deploy(folder, "pairs.onnx", "pairs", "--run", folder / "x.npz")
    assert (code, found["precision"]) == (0, "int8"), found
