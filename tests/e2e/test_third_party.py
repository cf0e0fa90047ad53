"""A package of somebody else: its pass and its backend are found by entry point once pip has installed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from lrcompile.zoo import exported
from tests.e2e.tool import ROOT

PROJECT = """
    [build-system]
    requires = ["setuptools"]
    build-backend = "setuptools.build_meta"

    [project]
    name = "sketching"
    version = "1.0"

    [project.entry-points."lrcompile.passes"]
    sketch = "sketching:Sketch"

    [project.entry-points."lrcompile.backends"]
    recorder = "sketching:Recorder"

    [tool.setuptools]
    py-modules = ["sketching"]
"""
CODE = '''
    from dataclasses import dataclass
    from typing import ClassVar

    import torch
    from lrcompile import LinearPass, densify, low_rank
    from lrcompile.lowering import Backend


    @dataclass(frozen=True)
    class Sketch(LinearPass):
        """Sketch the weight with a Gaussian test matrix.

        More text."""

        name: ClassVar[str] = "sketch"
        exact: ClassVar[bool] = False
        oversample: int = 8
        wrong: bool = False

        def propose(self, site, context):
            weight = densify(site.operator).double()
            for rank in context.ranks(site):
                basis, _ = torch.linalg.qr(weight @ context.randn(weight.shape[1], rank + self.oversample).double())
                left = basis[:, :rank]
                yield low_rank(left * (-1 if self.wrong else 1), left.T @ weight)


    class Parcel:
        """A graph of its own."""

        kind = "parcel"


    class Recorder(Backend):
        """Builds nothing."""

        name: ClassVar[str] = "recorder"
        accepts: ClassVar[type] = Parcel

        def build(self, graph, *, out=None):
            raise NotImplementedError
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, as pip installs it."""
    folder = tmp_path_factory.mktemp("third")
    (folder / "source").mkdir()
    (folder / "source" / "pyproject.toml").write_text(dedent(PROJECT))
    (folder / "source" / "sketching.py").write_text(dedent(CODE))
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    target = ["--target", str(folder / "site"), str(folder / "source")]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, *target], check=True, cwd=folder)
    return folder / "site"


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from lrcompile import zoo

    digits, folder = zoo.load("digits_vit"), tmp_path_factory.mktemp("data")
    found = {"calib": digits.calibration(), "eval": digits.evaluation()}
    for name, batches in found.items():
        np.savez(folder / f"{name}.npz", images=np.concatenate([batch["images"] for batch in batches])[:48])
    return {name: str(folder / f"{name}.npz") for name in found}


def optimize(site: Path, data: dict[str, str], out: Path, text: str) -> tuple[int, dict[str, Any]]:
    model = str(exported("digits_vit"))
    given = ["-o", str(out), "--keep", "0.9", "-p", text, "--calib", data["calib"], "--eval", data["eval"]]
    more = ["--max-drift", "0.6", "--no-cache", "--no-latency-check", "--json", "-q"]
    done = python(site, "-m", "lrcompile", "optimize", model, *given, *more)
    return done.returncode, json.loads(done.stdout or "{}")


def test_it_is_listed_with_its_options_and_its_text(site: Path):
    done = python(site, "-m", "lrcompile", "passes", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)["passes"]}
    assert {"low-rank", "clean", "sketch"} <= set(found)
    assert found["sketch"]["options"]["oversample"] == {"type": "int", "default": 8}
    assert not found["sketch"]["exact"] and found["sketch"]["doc"].startswith("Sketch the weight")


def test_it_is_allocated_measured_and_reported_like_ours(site: Path, data: dict[str, str], tmp_path: Path):
    out = tmp_path / "small.onnx"
    code, said = optimize(site, data, out, "sketch{oversample=4}")
    assert code == 0 and said["status"] == "ok" and out.is_file()
    assert {each["pass"] for each in said["decisions"] if each["structure"] and each["keep"] < 1} == {"sketch"}
    assert said["drift"]["passed"] and 0 < said["drift"]["relative_l2"] <= 0.6


def test_it_is_gated_like_ours(site: Path, data: dict[str, str], tmp_path: Path):
    """The same pass with the sign turned: the gate must catch it, and nothing is written."""
    out = tmp_path / "small.onnx"
    code, said = optimize(site, data, out, "sketch{wrong=true}")
    assert code in (5, 6) and said["error"]["code"] == code
    assert not list(tmp_path.iterdir())


def test_its_backend_is_chosen_by_what_it_accepts(site: Path):
    program = "import sketching; from lrcompile.registry import backend_for as b; print(b(sketching.Parcel()).name)"
    done = python(site, "-c", program)
    assert done.stdout.strip() == "recorder", done.stderr


def test_without_the_package_it_is_unknown(tmp_path: Path):
    done = python(tmp_path, "-m", "lrcompile", "passes", "sketch", "--json")
    assert done.returncode == 2 and "sketch" in json.loads(done.stdout)["error"]["message"]
