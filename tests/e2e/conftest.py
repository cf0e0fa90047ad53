"""One small model with samples, and a folder for each test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompile import zoo
from tests.e2e.tool import Cli
from tests.models import two_layer_mlp


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.onnx`` (two linear layers), ``calib.npz`` and ``eval.npz`` with its input ``x``."""
    folder = tmp_path_factory.mktemp("made")
    built = two_layer_mlp(folder / "model.onnx")
    np.savez(folder / "calib.npz", x=built.example(40, seed=1)["x"])
    np.savez(folder / "eval.npz", x=built.example(24, seed=2)["x"])
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


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT classifier, saved by transformers, with ``tokens.npz`` beside it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    np.savez(folder / "tokens.npz", input_ids=np.random.default_rng(0).integers(0, 64, (24, 12)))
    return folder


@pytest.fixture(scope="module")
def digits() -> zoo.ZooModel:
    return zoo.load("digits_vit")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(zoo.exported("digits_vit").read_bytes())
    return path
