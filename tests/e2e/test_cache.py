"""A decoder with its key–value cache as inputs and outputs is made smaller, and still decodes step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lrcompile import Budget, Options, optimize
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.zoo.export import export_onnx
from lrcompile.zoo.smollm2_cached import CachedLanguageModel

WORDS, CHANNELS, HEADS, LAYERS = 60, 16, 2, 2
PAST = [f"past.{i}" for i in range(2 * LAYERS)]
PRESENT = [f"present.{i}" for i in range(2 * LAYERS)]


def exported(path: Path) -> Path:
    """A Llama of two layers with random weights; batch, tokens and cache are free."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, head_dim=CHANNELS,
        num_key_value_heads=HEADS, vocab_size=WORDS, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = CachedLanguageModel(LlamaForCausalLM(config).requires_grad_(False)).eval()
    ids, mask = torch.randint(0, WORDS, (2, 4)), torch.ones(2, 7, dtype=torch.int64)
    past = [torch.randn(2, HEADS, 3, CHANNELS) for _ in PAST]
    axes = {name: {0: "batch", 2: "past"} for name in PAST}
    axes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past + sequence"}}
    example = {"input_ids": ids, "attention_mask": mask, **dict(zip(PAST, past, strict=True))}
    export_onnx(model, example, path, outputs=("logits", *PRESENT), axes=axes, arguments=(ids, mask, past))
    return path


def fed(ids: np.ndarray, past: list[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    past = past or [np.zeros((len(ids), HEADS, 0, CHANNELS), np.float32) for _ in PAST]
    mask = np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64)
    return {"input_ids": ids, "attention_mask": mask, **dict(zip(PAST, past, strict=True))}


@pytest.mark.timeout(400)
def test_it_decodes_with_its_cache_after_it_was_made_smaller(tmp_path: Path):
    dense, small = exported(tmp_path / "dense.onnx"), tmp_path / "small.onnx"
    random = np.random.default_rng(0)
    data = [fed(random.integers(0, WORDS, (4, 24))) for _ in range(12)]
    options = Options(max_drift=2.0, latency=False)
    result = optimize(dense, Budget(keep=0.7), calibration=data[:10], evaluation=data[10:], options=options, out=small)
    assert result.report.ratio.parameters < 0.8
    run, ids = FileSession(str(small)).run, random.integers(0, WORDS, (3, 9))
    whole = run(fed(ids))
    past, seen = None, []
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
        found = run(fed(piece, past))
        past = [found[name] for name in PRESENT]
        seen.append(found["logits"])
    np.testing.assert_allclose(np.concatenate(seen, 1), whole["logits"], atol=1e-4)
    assert past is not None
    np.testing.assert_allclose(past[0], whole[PRESENT[0]], atol=1e-4)
    assert not np.allclose(whole["logits"], FileSession(str(dense)).run(fed(ids))["logits"], atol=1e-4)
