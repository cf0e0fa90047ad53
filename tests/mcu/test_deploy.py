"""``lrcompile deploy`` from the outside: what it writes, proves, and refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.cli.app import run
from tests.mcu.nets import Encoder, made

pytest.importorskip("tvm")
pytest.importorskip("unicorn")
pytest.importorskip("ziglang")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deploy") / "encoder.onnx"
    onnx.save(made(Encoder, 1, 7, 24), path)
    np.savez(path.with_name("x.npz"), x=np.random.default_rng(0).standard_normal((2, 7, 24)).astype(np.float32))
    return path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = run(["deploy", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_firmware_is_written_and_proven(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, inputs = tmp_path / "fw", model.with_name("x.npz")
    code, found = answer(capsys, str(model), "--ram", "16KB", "--flash", "256KB", "-o", str(out), "--run", str(inputs))
    assert code == 0
    assert found["status"] == "ok"
    assert found["violations"] == []
    assert found["samples"] == 2
    assert found["max_error"] < 1e-5
    assert found["instructions"] > 10_000
    ram = found["ram"]
    assert ram["total"] == ram["arena"] + ram["stack"] + ram["io"] + ram["static"] <= 16 * 1024
    assert found["flash"]["total"] <= 256 * 1024
    assert {Path(each).name for each in found["files"]} == {each.name for each in out.iterdir()}
    assert {"model.c", "model.h", "weights.S", "weights.bin", "firmware.elf", "report.json"} <= {
        each.name for each in out.iterdir()
    }
    source = (out / "model.c").read_text()
    assert "malloc" not in source
    assert len(source) < 400_000
    assert [line for line in source.splitlines() if line.startswith(("unsigned char", "static", "float", "int"))] == [
        line for line in source.splitlines() if line.startswith(("unsigned char model_arena", "static inline float"))
    ]


def test_less_memory_is_found_when_it_is_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = []
    for ram in ("64KB", "5KB"):
        code, found = answer(capsys, str(model), "--ram", ram, "-o", str(tmp_path / ram))
        assert code == 0, found
        sizes.append(found["ram"]["arena"])
        assert found["ram"]["total"] <= int(ram[:-2]) * 1024
    assert sizes[1] < sizes[0]


def test_what_does_not_fit_says_by_how_much(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "fw"
    code, found = answer(capsys, str(model), "--ram", "3KB", "-o", str(out))
    assert code == 4
    assert "more than there are" in found["error"]["message"]
    assert found["error"]["where"]
    assert "--int8" in found["error"]["hint"]
    assert not out.exists()
    code, found = answer(capsys, str(model), "--flash", "10KB", "-o", str(out))
    assert code == 4
    assert "flash" in found["error"]["message"]
    assert not out.exists()


def single(kind: str, shape: list, *, weight: np.ndarray | None = None, domain: str = "") -> onnx.ModelProto:
    node = helper.make_node(kind, ["x"] + (["w"] if weight is not None else []), ["y"], name="the_node", domain=domain)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")] if weight is not None else [],
    )
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets)


BAD = {
    "an operator without a formula": (single("NonZero", [2, 3]), (), 4, "NonZero"),
    "a custom operator": (single("Mystery", [2, 3], domain="acme"), (), 4, "acme::Mystery"),
    "a dynamic shape": (single("Relu", ["n", 3]), (), 4, "dynamic"),
    "a shape for another input": (single("Relu", ["n", 3]), ("--shape", "z=1,3"), 3, "no such input"),
    "a shape that contradicts": (single("Relu", [2, 3]), ("--shape", "x=4,3"), 3, "dimension 0"),
    "a shape that is none": (single("Relu", ["n", 3]), ("--shape", "x"), 2, "no shape"),
    "NaN weights": (single("MatMul", [1, 2], weight=np.full((2, 2), np.nan, np.float32)), (), 3, "NaN"),
    "int8 without calibration": (single("Relu", [2, 3]), ("--int8",), 2, "calibration"),
    "no RAM for the stack": (single("Relu", [2, 3]), ("--ram", "1KB"), 4, "stack"),
    "an unknown target": (single("Relu", [2, 3]), ("--target", "cortex-m8"), 2, "cortex-m8"),
    "an unknown kind": (single("Relu", [2, 3]), ("--to", "basic"), 2, "basic"),
    "no size": (single("Relu", [2, 3]), ("--ram", "much"), 2, "no size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    proto, options, wanted, words = BAD[case]
    path, out = tmp_path / "model.onnx", tmp_path / "fw"
    onnx.save(proto, path)
    code, found = answer(capsys, str(path), "-o", str(out), *options)
    assert code == wanted, found
    assert words in found["error"]["message"] + found["error"]["where"]
    assert not out.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_an_existing_folder_needs_force(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("precious")
    code, found = answer(capsys, str(model), "-o", str(tmp_path))
    assert (code, found["error"]["message"]) == (2, "exists already")
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_c_compiles_elsewhere_without_a_warning(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import shutil

    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    assert answer(capsys, str(model), "--ram", "16KB", "-o", str(tmp_path / "fw"))[0] == 0
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"]
    names = ["main.c", "model.c", "weights.S"]
    subprocess.run([compiler, *flags, *names, "-lm", "-o", "model"], cwd=tmp_path / "fw", check=True)
