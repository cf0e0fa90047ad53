"""A tiny random Llama of the zoo's class, with its cache as inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrcompile.zoo import smollm2, smollm2_cached
from lrcompile.zoo.export import export_onnx

LAYERS, HEADS, CHANNELS = 2, 2, 8
VOCABULARY, WIDTH = 96, 32
PAST, PRESENT = smollm2_cached.PAST[: 2 * LAYERS], smollm2_cached.PRESENT[: 2 * LAYERS]


def causal_lm() -> Any:
    """Two layers with grouped queries, gains that are not 1, and a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2 * HEADS, num_key_value_heads=HEADS, head_dim=CHANNELS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.copy_(0.5 + torch.rand_like(tensor))
        else:
            tensor.mul_(8)  # else all tokens would be almost alike
    return model


def fed(ids: np.ndarray, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """One step's inputs."""
    past = past or {name: np.zeros((len(ids), HEADS, 0, CHANNELS), np.float32) for name in PAST}
    return {
        "input_ids": ids,
        "attention_mask": np.ones((len(ids), past[PAST[0]].shape[2] + ids.shape[1]), np.int64),
        **past,
    }


def export(path: Path) -> Path:
    """Writes the model with its cache."""
    ids, mask = torch.randint(0, VOCABULARY, (2, 4)), torch.ones(2, 7, dtype=torch.int64)
    past = [torch.randn(2, HEADS, 3, CHANNELS) for _ in PAST]
    example = {"input_ids": ids, "attention_mask": mask, **dict(zip(PAST, past, strict=True))}
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 2: "past"} for name in PAST}
    axes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past + sequence"}}
    module = smollm2_cached.CachedLanguageModel(causal_lm()).eval()
    export_onnx(module, example, path, outputs=(smollm2.OUTPUT, *PRESENT), axes=axes, arguments=(ids, mask, past))
    return path
