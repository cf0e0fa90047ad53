"""One small model with samples, and a folder for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.tool import Cli
from tests.models import two_layer_mlp


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.onnx`` (two linear layers), ``calib.npz`` and ``eval.npz`` with its input ``x``."""
    folder = tmp_path_factory.mktemp("made")
    built = two_layer_mlp(folder / "model.onnx")
    np.savez(folder / "calib.npz", **built.example(40, seed=1))
    np.savez(folder / "eval.npz", **built.example(24, seed=2))
    return folder


@pytest.fixture
def cli(
    made: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> Cli:  # fmt: skip
    """The command line in a fresh folder with the model and its samples; latency is measured only where asked for."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("LRCOMPILE_LATENCY_CHECK", "false")
    return Cli(tmp_path, capsys)
