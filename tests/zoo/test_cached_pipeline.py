"""A decoder with its cache as inputs and outputs goes through the whole job, whatever its caches hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrcompile import Budget, Options, optimize
from lrcompile.calibrate import Moments
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.samples import Thinned, sample_inputs
from lrcompile.zoo import smollm2
from tests.zoo import tiny_llama

OPTIONS = Options(max_drift=9.0, latency=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.export(tmp_path_factory.mktemp("llama") / "tiny.onnx")


def ids(samples: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny_llama.VOCABULARY, (samples, tokens))


def decoding(samples: int, tokens: int, past: int) -> dict[str, np.ndarray]:
    """Steps with caches that hold something."""
    generator = np.random.default_rng(1)
    shape = (samples, tiny_llama.HEADS, past, tiny_llama.CHANNELS)
    caches = {name: generator.standard_normal(shape).astype(np.float32) for name in tiny_llama.PAST}
    return tiny_llama.fed(ids(samples, tokens), caches)


def moments(file: Path, data: dict[str, np.ndarray]) -> Moments:
    graph = OnnxGraph.load(file)
    site = graph.linear_sites()[0]
    return graph.observe([data], [site], memory=2**30)[site.input]


def test_an_optimised_decoder_keeps_its_caches(file: Path, tmp_path: Path):
    calibration = [tiny_llama.fed(ids(32, 24))]
    out = tmp_path / "small.onnx"
    optimize(file, Budget(keep=0.8), calibration=calibration, options=OPTIONS, out=out)
    before, after = FileSession(str(file)), FileSession(str(out))
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert out.stat().st_size < file.stat().st_size

    known, step = ids(2, 7, seed=3), tiny_llama.fed(ids(2, 7, seed=3))
    for _ in range(4):  # with the caches, and all tokens anew
        stepped, whole = after.run(step), after.run(tiny_llama.fed(known))
        np.testing.assert_allclose(stepped[smollm2.OUTPUT][:, -1], whole[smollm2.OUTPUT][:, -1], atol=1e-4)
        token = stepped[smollm2.OUTPUT][:, -1:].argmax(-1)
        known = np.concatenate([known, token], 1)
        caches = zip(tiny_llama.PAST, tiny_llama.PRESENT, strict=True)
        step = tiny_llama.fed(token, {old: stepped[new] for old, new in caches})


@pytest.mark.parametrize("past", [0, 20])
def test_statistics_are_of_the_new_tokens(file: Path, past: int):
    data = decoding(8, 6, past)
    assert moments(file, data).tokens == 48
    assert Thinned([data, data], 96).batches == 2
    data["attention_mask"][:, :past] = 0  # padding inside the cache
    data["attention_mask"][::2, past : past + 2] = 0
    assert moments(file, data).tokens == 40


def test_calibration_on_steps_with_a_cache(file: Path, tmp_path: Path):
    data = decoding(16, 6, 20)
    data["attention_mask"][::2, :20] = 0
    result = optimize(file, Budget(keep=0.8), calibration=[data], options=OPTIONS, out=tmp_path / "small.onnx")
    drift = result.report.drift
    assert drift is not None
    assert drift.kl is not None


def test_made_up_inputs_follow_sums_of_sizes(file: Path):
    graph = OnnxGraph.load(file)
    made = sample_inputs(graph, 0, {"input_ids": (1, 1), "past": (12,)})
    assert made is not None
    assert made["attention_mask"].shape == (1, 13)
    plain = sample_inputs(graph)
    assert plain is not None
    assert plain["attention_mask"].shape[1] == plain["input_ids"].shape[1] + plain[tiny_llama.PAST[0]].shape[2]


def test_the_timed_loop_generates_what_plain_runs_do(file: Path):
    from benchmarks.decode_child import OnnxRuntime, loop, score

    prompt = ids(1, 9, seed=5)
    known, session = prompt, FileSession(str(file))
    for _ in range(6):
        logits = session.run(tiny_llama.fed(known))[smollm2.OUTPUT]
        known = np.concatenate([known, logits[:, -1:].argmax(-1)], 1)
    runtime = OnnxRuntime(str(file), 1, 0)
    assert loop(runtime, prompt[0], 5)["tokens"] == known[0, 9:].tolist()
    expected = smollm2.surprisals(lambda batch: session.run(tiny_llama.fed(batch["input_ids"])), known)
    np.testing.assert_allclose(score(runtime, known)["losses"], expected, rtol=1e-5)
