"""What lies beside the C in the folder of ``lrcompile deploy``: it builds elsewhere, and tells the truth."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from lrcompile.backends.c.elf import Image
from lrcompile.backends.c.sharing import share
from lrcompile.cli.app import run
from tests.mcu.nets import Encoder, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as int8 firmware, run on one sample."""
    root = tmp_path_factory.mktemp("deploy")
    onnx.save(made(Encoder, 1, 7, 24), root / "encoder.onnx")
    np.savez(root / "x.npz", x=np.random.default_rng(0).standard_normal((3, 7, 24)).astype(np.float32))
    words = [root / "encoder.onnx", "--to", "c", "-o", root / "out", "--int8", "--calib", root / "x.npz"]
    assert run(["deploy", *map(str, words), "--run", str(root / "x.npz"), "--quiet"]) == 0
    return root / "out"


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_every_file_is_named(folder: Path):
    assert sorted(report(folder)["files"]) == sorted(path.name for path in folder.iterdir())
    wanted = {"model.h", "model.c", "weights.bin", "main.c", "CMakeLists.txt", "firmware.elf", "report.html"}
    assert wanted <= set(report(folder)["files"])


def test_costs_are_those_of_the_image(folder: Path):
    found = report(folder)
    image = Image(folder / "firmware.elf")
    assert image.ram() == found["ram"] and image.flash() == found["flash"]
    for each in found["functions"]:
        assert each["code"] == image.symbols[each["symbol"]][1] > 0
        assert each["calls"] == sum(kernel["symbol"] == each["symbol"] for kernel in found["kernels"])
    assert sum(each["instructions"] for each in found["functions"]) <= found["instructions"]
    assert max(kernel["alive"] for kernel in found["kernels"]) == found["bound"] <= found["ram"]["arena"]


def test_the_page_is_whole_and_runs_nothing(folder: Path):
    page = (folder / "report.html").read_text()
    assert page.count("<rect") == len(report(folder)["arena"])
    assert "<script" not in page and not re.search(r"(?:src|href)=", page)
    assert all(each["symbol"] in page for each in report(folder)["functions"])


def test_the_command_in_main_builds_it(folder: Path, tmp_path: Path):
    command = re.search(r"^ \* cc (.*) -o example", (folder / "main.c").read_text(), re.M)
    assert command is not None
    strict = ["-Wall", "-Wextra", "-Werror", *command[1].split(), "-o", str(tmp_path / "example")]
    compiler = [shutil.which("cc")] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run([*map(str, compiler), *strict], cwd=folder, check=True)
    subprocess.run([str(tmp_path / "example")], check=True)


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_cmake_builds_it(folder: Path, tmp_path: Path):
    configure = ["cmake", "-S", str(folder), "-B", str(tmp_path), "-DCMAKE_C_FLAGS=-Werror"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    subprocess.run([str(tmp_path / "example")], check=True)


# -- one function for kernels that differ in numbers -----------------------------------------------


def test_numbers_that_differ_become_parameters():
    body = "    for (int32_t i = 0; i < {0}; ++i) {{\n        acc[0] = t0[(i * {1})] {2};\n    }}\n"
    texts = {
        0: ("int8_t *t0", body.format(24, 48, "- 7")),
        1: ("int8_t *t0", body.format(16, 32, "+ 5")),
        2: ("int8_t *t0", body.replace("acc[0]", "acc[1]").format(16, 32, "+ 5")),
    }
    functions, found = share(texts)
    assert len(functions) == 2  # an index into registers is no number to share
    parameters, text = functions[found[0].function]
    assert found[0].function == found[1].function != found[2].function
    assert parameters == "int8_t *t0, int32_t c0, int32_t c1"
    assert (found[0].arguments, found[1].arguments) == (("-7", "24"), ("5", "16"))
    assert "i < c1" in text and "(i * (c1 * 2))" in text and "+ c0" in text


def test_kernels_that_are_kept_apart_keep_their_bounds():
    texts = {
        at: ("int8_t *t0", f"    for (int32_t i = 0; i < {n}; ++i) {{ t0[i] = {n}; }}\n") for at, n in ((0, 3), (1, 4))
    }
    functions, found = share(texts, apart={0, 1})
    assert [found[at].function for at in (0, 1)] == [0, 1]
    assert functions == [texts[0], texts[1]]
