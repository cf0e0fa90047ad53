"""SmolLM2-135M-Instruct with its key–value cache as inputs and outputs: what a decoder loop runs.

The weights, texts and figures are those of :mod:`lrcompile.zoo.smollm2`; only the graph differs. Inputs: ``input_ids``
(batch, tokens); ``attention_mask`` (batch, past + tokens), 0 where a token is padding; for each of the 30 layers
``past_key_values.N.key`` and ``.value`` (batch, 3, past, 64), where ``past`` may be 0. Outputs: ``logits`` and
``present.N.key`` and ``.value``, the caches with the new tokens appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lrcompile.zoo import smollm2
from lrcompile.zoo.base import Batch, Run, ZooModel, package_folder
from lrcompile.zoo.export import export_onnx

LAYERS, HEADS, CHANNELS = 30, 3, 64
"""Layers, key–value heads of each, channels of a head."""
PAST = tuple(f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value"))
PRESENT = tuple(f"present.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value"))
OUTPUTS = (smollm2.OUTPUT, *PRESENT)


class CachedLanguageModel(nn.Module):
    """Token ids and caches to logits and caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor] | None = None, **named: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits and caches in the order of :data:`OUTPUTS`.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, past + tokens) int64.
            past: the caches in the order of :data:`PAST`, or each by its name.
        """
        from transformers.cache_utils import DynamicCache

        old = [named[name] for name in PAST] if past is None else past
        cache = DynamicCache()
        for layer in range(len(old) // 2):
            cache.update(old[2 * layer], old[2 * layer + 1], layer)
        mask, positions = _mask(attention_mask, old[0].shape[2], input_ids.shape[1])
        found = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        kept = [value for layer in found.past_key_values.layers for value in (layer.keys, layer.values)]
        return (found.logits, *kept)


def _mask(attention_mask: Tensor, past: int, tokens: int) -> tuple[Tensor, Tensor]:
    """What each new token may look at, (batch, 1, tokens, past + tokens), and the new tokens' positions."""
    new = torch.arange(tokens) + past
    causal = torch.arange(past + tokens)[None, :] <= new[:, None]
    seen = causal[None, None] & attention_mask[:, None, None, :].bool()
    positions = (attention_mask.cumsum(1) - 1).clamp_min(0).index_select(1, new)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min), positions


def module() -> CachedLanguageModel:
    """The language model in eval mode, float32, on the CPU."""
    return CachedLanguageModel(smollm2.causal_lm()).eval()


def empty(batch: int = 1) -> Batch:
    """Caches that hold nothing yet."""
    return {name: np.zeros((batch, HEADS, 0, CHANNELS), np.float32) for name in PAST}


def fed(input_ids: np.ndarray, past: Batch | None = None) -> Batch:
    """The inputs of one step: ``input_ids`` (batch, tokens) after the ``past`` (by default nothing), no padding."""
    past = past or empty(len(input_ids))
    seen = past[PAST[0]].shape[2] + input_ids.shape[1]
    return {"input_ids": input_ids, "attention_mask": np.ones((len(input_ids), seen), np.int64), **past}


def generate(run: Run, prompt: np.ndarray, count: int) -> np.ndarray:
    """The most likely next tokens, one after the other, (batch, count), after a prompt (batch, tokens)."""
    found, step = [], fed(prompt)
    for _ in range(count):
        results = run(step)
        found.append(results[smollm2.OUTPUT][:, -1:].argmax(-1))
        step = fed(found[-1], {old: results[new] for old, new in zip(PAST, PRESENT, strict=True)})
    return np.concatenate(found, 1)


def calibration() -> list[Batch]:
    """The batches of the graph without caches, with empty ones."""
    return [fed(batch["input_ids"]) for batch in smollm2.calibration()]


def evaluation() -> list[Batch]:
    """The same for evaluation."""
    return [fed(batch["input_ids"]) for batch in smollm2.evaluation()]


def metric(run: Run) -> dict[str, float]:
    """Perplexities of :func:`lrcompile.zoo.smollm2.metric`."""
    return smollm2.metric(lambda batch: run(fed(batch["input_ids"])))


def export(path: Path) -> None:
    """Write the model as ONNX with dynamic batch, token and cache axes; takes some minutes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (2, 4), generator=generator)
    past = [torch.randn(2, HEADS, 3, CHANNELS, generator=generator) for _ in PAST]
    mask = torch.ones(2, 7, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": mask, **dict(zip(PAST, past, strict=True))}
    axes = {name: {0: "batch", 2: "past"} for name in PAST}
    axes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past + sequence"}}
    export_onnx(module(), example, Path(path), outputs=OUTPUTS, axes=axes, arguments=(ids, mask, past))


def model() -> ZooModel:
    """The registry's entry.

    Raises:
        MissingPackageError: a package that carries the weights or the texts is absent.
    """
    for package in (smollm2.PACKAGE, "gensim"):
        package_folder(package)
    return ZooModel("smollm2_cached", __doc__ or "", OUTPUTS, module, calibration, evaluation, metric, export)
