"""``lrcompile schedule``: plans that hold, on a device and in ONNX Runtime, without writing anything."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.e2e.tool import Cli
from tests.graphs import tiled_nets as nets


@pytest.fixture
def mixer(tmp_path: Path) -> Path:
    onnx.save(nets.mixer(), tmp_path / "mixer.onnx")
    return tmp_path / "mixer.onnx"


def test_a_plan_for_a_device(cli: Cli, mixer: Path):
    before = cli.listing()
    said = cli.json("schedule", mixer, "--target", "cortex-m7", "--ram", "16KB", "-q")
    assert said.code == 0, said.err
    found = said.json
    assert found["limit"] == {"ram": 16 << 10}
    assert found["bound"] <= found["arena"] <= 16 << 10
    assert max(each["alive"] for each in found["kernels"]) == found["bound"]
    buffers = found["buffers"]
    assert max(each["offset"] + each["bytes"] for each in buffers) == found["arena"]
    for at, one in enumerate(buffers):  # no two that are alive at once overlap
        for two in buffers[:at]:
            if one["first"] <= two["last"] and two["first"] <= one["last"]:
                assert one["offset"] + one["bytes"] <= two["offset"] or two["offset"] + two["bytes"] <= one["offset"]
    assert "bytes are alive" in found["reason"]
    assert cli.listing() == before


def test_people_see_the_plan(cli: Cli, mixer: Path):
    said = cli("schedule", mixer, "-q")
    assert said.code == 0
    assert "arena" in said.out and "not lower: at " in said.out


def test_too_little_is_refused_with_the_amount(cli: Cli, mixer: Path):
    said = cli.json("schedule", mixer, "--ram", "6KB", "-q")
    assert said.code == 4
    assert "bytes of RAM" in said.error["message"] or "bytes" in said.error["message"]


def test_a_plan_for_onnxruntime(cli: Cli, tmp_path: Path):
    onnx.save(nets.causal(), tmp_path / "causal.onnx")
    before = cli.listing()
    said = cli.json(
        "schedule", "causal.onnx", "--target", "onnxruntime", "--shape", "batch=1", "--shape", "tokens=96", "-q"
    )
    assert said.code == 0, said.err
    found = said.json
    assert found["activations"]["after"] < 0.6 * found["activations"]["before"]
    assert found["parts"] and found["inputs"] == {"x": [1, 96, 16]}
    limit = ["--ram", found["activations"]["after"] // 2]
    said = cli.json("schedule", "causal.onnx", "--target", "ort", "--shape", "x=1,96,16", *limit, "-q")
    assert said.code == 4 and said.error["where"] == "--ram"
    assert cli.listing() == before


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--target", "cortex-m8"], 2, "cortex-m7"),
        (["--target", "onnxruntime"], 4, "batch"),
        (["--ram", "much"], 2, "amount"),
        (["--shape", "x=a"], 2, "shape"),
    ],
)
def test_refusals(cli: Cli, tmp_path: Path, words: list[str], code: int, part: str):
    onnx.save(nets.causal(), tmp_path / "causal.onnx")
    said = cli.json("schedule", "causal.onnx", *words, "-q")
    assert said.code == code
    assert part in said.err
