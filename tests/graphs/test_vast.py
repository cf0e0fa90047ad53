"""Models above 2 GB, and models that are larger than the memory that a process may have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from lrcompile import Options, optimize
from tests.graphs.vast import NARROW, SIZE, WIDE, write

LIMIT = 800 * 2**20
LIMITED = """
import resource, sys
import onnxruntime, torch  # what they reserve is not the model's
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
from lrcompile.cli.app import run
sys.argv = ["lrcompile", *sys.argv[1:]]
raise SystemExit(run())
"""


def limited(*arguments: str) -> dict:
    """The JSON of a command that may have :data:`LIMIT` bytes of private memory."""
    command = [sys.executable, "-c", LIMITED.format(limit=LIMIT), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def beyond_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("memory"), 9)
    assert path.with_name("vast.onnx.data").stat().st_size == 18 * SIZE > LIMIT
    return path


def test_inspect_needs_no_room_for_the_weights(beyond_memory: Path) -> None:
    found = limited("inspect", str(beyond_memory))
    assert [site["shape"] for site in found["sites"]] == [[WIDE, NARROW], [NARROW, WIDE]] * 9
    assert found["parameters"] == 18 * NARROW * WIDE


@pytest.mark.slow
def test_a_plan_by_weights_alone_needs_room_for_one_of_them(beyond_memory: Path) -> None:
    found = limited("plan", str(beyond_memory), "--keep", "0.5", "--data-free")
    assert found["status"] == "ok" and found["sites"]["total"] == 18
    assert found["budget"]["keep"]["reached"] <= 0.5
    assert found["calibration"]["kind"] == "uncalibrated"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_file_above_two_gigabytes_is_read_rewritten_and_saved(tmp_path: Path) -> None:
    """The first layer has rank 100, so an exact rewrite applies; all other weights are copied as they are."""
    source, target = write(tmp_path, 17, first=100), tmp_path / "small" / "small.onnx"
    target.parent.mkdir()
    assert source.with_name("vast.onnx.data").stat().st_size > 2**31
    report = optimize(source, out=target, options=Options(latency=False)).report
    assert report.status == "ok" and report.sites["rewritten"] == 1
    assert report.before is not None and report.after is not None
    assert report.before.bytes - report.after.bytes > 0.5 * SIZE
    proto = onnx.load(target, load_external_data=False)
    data = {entry.key: entry.value for entry in proto.graph.initializer[-1].external_data}
    assert (target.parent / data["location"]).stat().st_size > 2**31
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    entries = {entry.key: entry.value for entry in weights["layers.33.weight"].external_data}
    copied = np.memmap(target.parent / entries["location"], np.float32, "r", int(entries["offset"]), (NARROW,))
    stored = np.memmap(source.with_name("vast.onnx.data"), np.float32, "r", 33 * SIZE, (NARROW,))
    np.testing.assert_array_equal(copied, stored)
