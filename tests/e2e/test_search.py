"""``lrcompile search``: candidates that were executed, a front that nothing beats, limits that hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile import pareto
from tests.e2e.tool import Cli
from tests.graphs import tiled_nets as nets


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, ...]]):
    found = pareto.front(points, lambda each: each)
    assert len(set(found)) == len(found)

    def beats(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
        return one != two and all(a <= b for a, b in zip(one, two, strict=True))

    for each in points:
        assert (each in found) == (not any(beats(other, each) for other in points))


@pytest.fixture
def small(tmp_path: Path) -> list[object]:
    onnx.save(nets.small_mixer(), tmp_path / "mixer.onnx")
    x = np.random.default_rng(0).standard_normal((20, 8, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return [
        "search",
        tmp_path / "mixer.onnx",
        "--calib",
        tmp_path / "data.npz",
        "--max-drift",
        "9",
        "--samples",
        "1",
        "-q",
    ]


def beaten(one: dict[str, Any], two: dict[str, Any]) -> bool:
    costs = [
        (each["drift"]["relative_l2"], each["ram"]["total"], each["flash"]["total"], each["instructions"])
        for each in (one, two)
    ]
    return costs[0] != costs[1] and all(a <= b for a, b in zip(*costs, strict=True))


def test_every_candidate_was_executed(cli: Cli, small: list[object]):
    said = cli.json(*small, "--ram", "8KB", "--flash", "48KB", "--candidates", "3", "-o", "found")
    assert said.code == 0, said.err
    found = said.json
    ran = [each for each in found["candidates"] if not each["reason"]]
    assert 1 <= len(ran) <= 3
    for each in ran:
        assert each["samples"] == 1 and each["instructions"] > 0
        assert each["ram"]["total"] <= 8 << 10 and each["flash"]["total"] <= 48 << 10
        assert each["front"] == (not any(beaten(other, each) for other in ran))
    best = next(each for each in ran if each["name"] == found["best"])
    assert best["drift"]["relative_l2"] == min(each["drift"]["relative_l2"] for each in ran)
    assert json.loads(Path("found/search.json").read_text())["best"] == found["best"]
    onnx.checker.check_model(onnx.load("found/best.onnx"))
    page = Path("found/search.html").read_text()
    assert page.count("<svg") == 3 and page.count("<circle") == 3 * len(ran) and "http" not in page.split("</head>")[1]


def test_nothing_fits(cli: Cli, small: list[object]):
    said = cli.json(*small, "--ram", "8KB", "--flash", "2KB", "-o", "found")
    assert said.code == 6
    assert "weights alone take" in said.error["message"]
    assert not Path("found").exists()


def test_refusals(cli: Cli, small: list[object]):
    Path("found").mkdir()
    Path("found/mine").write_text("x")
    assert cli.json(*small, "--ram", "8KB", "-o", "found").code == 2
    assert cli.json("search", small[1], "--ram", "8KB", "-o", "new", "-q").error["where"] == "--calib"
    assert cli.json("search", "digits_vat", "--ram", "8KB", "-o", "new", "-q").code == 3
    assert not Path("new").exists()
