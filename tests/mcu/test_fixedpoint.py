"""Integer arithmetic against real arithmetic on the same codes, within the stated bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from lrcompile import fixedpoint as fp
from lrcompile.fixedpoint import Code

scales = st.floats(1e-4, 2.0)
zeros = st.integers(-128, 127)


def code(scale: float, zero: int = 0) -> Code:
    return Code(np.float64(scale), zero)


def distance(got: np.ndarray, real: np.ndarray, out: Code) -> float:
    """Largest distance in units of the output code, where the real value is in range."""
    wanted = np.clip(real / out.step + out.zero, fp.LOW, fp.HIGH)
    return float(np.abs(got - wanted).max())


@given(st.floats(2.0**-30, 2.0**10), zeros, st.integers(0, 2**32))
def test_requantise(ratio: float, zero: int, seed: int):
    rng = np.random.default_rng(seed)
    total = rng.integers(-(2**23), 2**23, 200).astype(np.int32)
    got = fp.requantise(total, fp.Scaling.of(ratio, zero))
    wanted = np.clip(total * ratio + zero, fp.LOW, fp.HIGH)
    assert np.abs(got - wanted).max() <= 0.502


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6))
def test_requantise_per_channel(ratios: list[float]):
    ratio = np.array(ratios)
    total = np.random.default_rng(0).integers(-(2**20), 2**20, (50, len(ratios))).astype(np.int32)
    got = fp.requantise(total, fp.Scaling.of(ratio, 3))
    assert np.abs(got - np.clip(total * ratio + 3, fp.LOW, fp.HIGH)).max() <= 0.502


@given(scales, scales, st.floats(1e-3, 2.0), zeros, zeros, zeros, st.sampled_from([1, -1]))
def test_add(a: float, b: float, out: float, za: int, zb: int, zo: int, sign: int):
    first, second, target = code(a, za), code(b, zb), code(out, zo)
    x, y = np.meshgrid(np.arange(-128, 128, 5), np.arange(-128, 128, 5))
    x, y = x.astype(np.int8), y.astype(np.int8)
    got = fp.add(x, y, fp.Addition.of(first, second, target, sign))
    assert distance(got, fp.decode(x, first) + sign * fp.decode(y, second), target) <= 0.51


@given(scales, zeros, scales, zeros)
def test_a_table_is_the_rounded_function(scale: float, zero: int, step: float, out_zero: int):
    source, out = code(scale, zero), code(step, out_zero)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + special.erf(x / np.sqrt(2)))

    codes = np.arange(-128, 128).astype(np.int8)
    found = fp.table(gelu, source, out)[codes.astype(int) + 128]
    np.testing.assert_array_equal(found, fp.encode(gelu(fp.decode(codes, source)), out))


@settings(max_examples=60)
@given(st.floats(1e-3, 0.5), st.integers(1, 600), st.integers(0, 2**32), st.sampled_from([1 / 256, 1 / 255, 0.0021]))
def test_softmax(scale: float, count: int, seed: int, step: float):
    rng = np.random.default_rng(seed)
    codes = np.clip(rng.normal(0, rng.uniform(1, 60), (20, count)), -128, 127).astype(np.int8)
    source, out = code(scale, 5), code(step, -128)
    got = fp.softmax(codes, fp.Softmax.of(source, out, count))
    assert distance(got, special.softmax(fp.decode(codes, source), -1), out) <= 0.5 + 1 / 500 * max(count, 256) / 256


@settings(max_examples=60)
@given(st.floats(1e-3, 0.5), st.sampled_from([12, 48, 64, 192, 768]), st.integers(0, 2**32), st.floats(0.005, 0.1))
def test_layer_norm(scale: float, count: int, seed: int, step: float):
    rng = np.random.default_rng(seed)
    codes = np.clip(rng.normal(rng.uniform(-60, 60), rng.uniform(0.5, 60), (20, count)), -128, 127).astype(np.int8)
    gain, bias = rng.normal(1, 0.5, count), rng.normal(0, 0.5, count)
    source, out = code(scale, -7), code(step, 11)
    got = fp.layer_norm(codes, fp.LayerNorm.of(source, out, gain, bias, 1e-5))
    real = fp.decode(codes, source)
    normal = (real - real.mean(-1, keepdims=True)) / np.sqrt(real.var(-1, keepdims=True) + 1e-5)
    bound = 0.5 + ((np.abs(normal) + 1) * 2.0**-19 * np.abs(gain) / step).max() + 1e-3
    assert distance(got, normal * gain + bias, out) <= bound


def test_layer_norm_of_a_constant_row():
    how = fp.LayerNorm.of(code(0.1), code(0.02, 3), np.ones(8), np.full(8, 0.5), 1e-5)
    np.testing.assert_array_equal(fp.layer_norm(np.full((1, 8), 9, np.int8), how), [[28] * 8])


@given(st.integers(0, 2**62 - 1))
def test_isqrt(value: int):
    root = int(fp.isqrt(np.array([value], np.int64))[0])
    assert root * root <= value < (root + 1) ** 2


@pytest.mark.parametrize("zero", [-128, 0, 17])
def test_encode_and_decode(zero: int):
    source = code(0.03, zero)
    codes = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(fp.encode(fp.decode(codes, source), source), codes)
