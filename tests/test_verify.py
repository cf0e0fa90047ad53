"""The gate's measures against numpy, and everything that must not slip through it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from lrcompile.errors import GateError, UsageError
from lrcompile.verify import Drift, DriftMeter, load_metric, measure, require

RANDOM = np.random.default_rng(0)
X = {"x": np.zeros((4, 2), np.float32)}


def outputs(shape=(4, 7), dtype="float32", name: str = "y", scale: float = 1.0) -> dict[str, np.ndarray]:
    return {name: (scale * RANDOM.standard_normal(shape)).astype(dtype)}


def drift(before: dict, after: dict, inputs: dict | None = None) -> Drift:
    meter = DriftMeter()
    meter.add(X if inputs is None else inputs, before, after)
    return meter.result()


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (2, 3, 2, 5)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_measures_are_what_numpy_says(shape: tuple[int, ...], dtype: str):
    meter, before, after = DriftMeter(), [], []
    for _ in range(3):
        a = outputs(shape, dtype)
        b = {"y": (a["y"] + 0.3 * RANDOM.standard_normal(shape)).astype(dtype)}
        meter.add(X, a, b)
        before.append(a["y"].astype(np.float64))
        after.append(b["y"].astype(np.float64))
    found = meter.result(limit=0.5)
    a, b = np.concatenate(before), np.concatenate(after)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-10)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-10)
    assert found.top1 == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean(), rel=1e-12)
    kl = (softmax(a, -1) * (log_softmax(a, -1) - log_softmax(b, -1))).sum(-1)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-9)
    assert (found.samples, found.worst_output, found.limit, found.passed) == (12, "y", 0.5, True)


def test_the_norm_is_taken_over_all_batches_together():
    """A batch of small outputs must not dominate: not a mean of ratios."""
    meter = DriftMeter()
    meter.add(X, {"y": np.full((4, 2), 100.0)}, {"y": np.full((4, 2), 100.0)})
    meter.add(X, {"y": np.full((4, 2), 0.001)}, {"y": np.full((4, 2), 0.002)})
    assert meter.result().relative_l2 == pytest.approx(0.001 / math.hypot(100, 0.001), rel=1e-6)


def test_bfloat16_counts_as_a_float():
    import ml_dtypes

    a = outputs()["y"].astype(ml_dtypes.bfloat16)
    assert drift({"y": a}, {"y": a}).relative_l2 == 0.0
    assert drift({"y": a}, {"y": (a.astype(np.float32) * 1.5).astype(ml_dtypes.bfloat16)}).relative_l2 > 0.4


def test_the_worst_output_decides():
    before = outputs(name="good") | outputs(name="bad", scale=100.0)
    after = {"good": before["good"], "bad": before["bad"] * 1.2}
    found = drift(before, after)
    assert (found.worst_output, found.relative_l2) == ("bad", pytest.approx(0.2, rel=1e-5))
    after = {"good": before["good"] * 1.5, "bad": before["bad"]}
    assert drift(before, after).worst_output == "good"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["first", "second"])
def test_what_is_not_finite_fails(bad: float, place: str):
    before = outputs(name="first") | outputs(name="second")
    after = {name: value.copy() for name, value in before.items()}
    after["first"] *= 3.0
    after["second"] *= 4.0
    after[place][1, 2] = bad
    found = drift(before, after)
    assert found.worst_output == place and not math.isfinite(found.relative_l2) and not found.passed
    with pytest.raises(GateError, match="not a number"):
        require(found)
    meter = DriftMeter()
    meter.add(X, before, after)
    meter.add(X, before, before)  # a clean batch does not wash it away
    assert not meter.result(limit=1e9).passed


def test_infinities_that_were_there_before():
    """Masked logits are -inf in both models; finite entries are compared, and a lost mask is noticed."""
    before = outputs()["y"]
    before[:, 2] = -np.inf
    same = drift({"y": before}, {"y": before.copy()})
    assert (same.relative_l2, same.top1, same.kl) == (0.0, 1.0, 0.0) and same.passed
    moved = before.copy()
    moved[0, 0] += 1.0
    found = drift({"y": before}, {"y": moved})
    assert found.relative_l2 == pytest.approx(1 / np.linalg.norm(before[np.isfinite(before)]), rel=1e-5)
    assert found.kl is not None and 0 < found.kl < 1
    moved[1, 2] = 5.0
    assert not drift({"y": before}, {"y": moved}).passed


def test_a_zero_reference():
    zero = {"y": np.zeros((4, 3), np.float32)}
    same = drift(zero, {"y": np.zeros((4, 3), np.float32)})
    assert (same.relative_l2, same.cosine, same.passed) == (0.0, 1.0, True)
    other = drift(zero, {"y": np.full((4, 3), 1e-3, np.float32)})
    assert other.relative_l2 == math.inf and not other.passed


def test_integer_outputs_are_ignored():
    before = outputs() | {"ids": np.array([1, 2, 3])}
    found = drift(before, before | {"ids": np.array([7, 8, 9])})
    assert (found.relative_l2, found.worst_output) == (0.0, "y")
    with pytest.raises(GateError, match="no floating-point output"):
        drift({"ids": np.array([1])}, {"ids": np.array([1])})


@pytest.mark.parametrize("after", [{}, {"y": np.zeros((4, 6), np.float32)}, {"y": np.zeros(28, np.float32)}])
def test_a_missing_or_reshaped_output(after: dict):
    with pytest.raises(GateError, match=r"y: the rewritten model gives .* instead of shape \(4, 7\)"):
        drift(outputs(), after)


def test_top1_and_kl_only_where_an_output_looks_like_logits():
    for shape in ((4,), (4, 1), ()):
        value = outputs(shape)
        found = drift(value, value)
        assert (found.top1, found.kl) == (None, None) and found.relative_l2 == 0.0
    value = outputs((0, 5))
    assert drift(value, value).relative_l2 == 0.0
    value = outputs((4, 0))
    assert drift(value, value).relative_l2 == 0.0


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32])
def test_padding_is_left_out(dtype: type):
    mask = np.array([[1, 1, 0], [1, 0, 0]]).astype(dtype)
    inputs = {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": mask}
    tokens, pooled = outputs((2, 3, 5))["y"], outputs((2, 5))["y"]
    after = tokens.copy()
    after[mask == 0] = 1e6
    assert drift({"y": tokens}, {"y": after}, inputs).relative_l2 == 0.0
    assert drift({"y": tokens}, {"y": after}, X).relative_l2 > 1e3
    after = tokens.copy()
    after[0, 1, 0] += 1.0
    expected = 1.0 / np.linalg.norm(tokens[mask != 0])
    assert drift({"y": tokens}, {"y": after}, inputs).relative_l2 == pytest.approx(expected, rel=1e-5)
    assert drift({"y": pooled}, {"y": pooled * 2}, inputs).relative_l2 == pytest.approx(1.0)
    after[mask == 0] = np.nan
    assert drift({"y": tokens}, {"y": after}, inputs).passed


def test_measure_goes_through_all_batches():
    batches = [{"x": np.full((3, 2), i, np.float32)} for i in range(1, 4)]
    seen = []

    def candidate(inputs):
        seen.append(float(inputs["x"][0, 0]))
        return {"y": inputs["x"] * 1.1}

    found = measure(lambda inputs: {"y": inputs["x"]}, candidate, iter(batches), limit=0.2)
    assert seen == [1.0, 2.0, 3.0]
    assert found.relative_l2 == pytest.approx(0.1, rel=1e-5)
    assert (found.samples, found.limit, found.passed) == (9, 0.2, True)


@pytest.mark.parametrize(("score", "passed"), [(0.1, True), (0.5, False), (math.nan, False)])
def test_a_metric_replaces_the_limit(score: float, passed: bool):
    batches = [{"x": np.ones((2, 2), np.float32)}] * 3

    def metric(reference, candidate):
        assert len(reference) == len(candidate) == 3
        assert candidate[0]["y"][0, 0] == 5.0
        return score

    found = measure(lambda i: {"y": i["x"]}, lambda i: {"y": 5 * i["x"]}, batches, limit=0.2, metric=metric)
    assert found.relative_l2 == pytest.approx(4.0)
    assert found.passed is passed and (found.value == score or math.isnan(score))
    if not passed:
        with pytest.raises(GateError, match="metric"):
            require(found)


def test_require_names_drift_limit_and_output():
    require(Drift(0.1, 1.0, None, None, 8, "logits", limit=0.1))
    with pytest.raises(GateError, match=r"logits: relative L2 drift 0\.2 is above the limit 0\.1 on 8") as caught:
        require(Drift(0.2, 1.0, None, None, 8, "logits", limit=0.1))
    assert caught.value.code == 5 and "--max-drift" in caught.value.hint


def test_metrics_are_loaded_by_name():
    assert load_metric("math:dist") is math.dist
    for text in ("math", "math:nothing", "no_such_module:f", "math:pi", ":f", "math:"):
        with pytest.raises(UsageError, match="--metric"):
            load_metric(text)
