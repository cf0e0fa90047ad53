"""Integer arithmetic of quantised networks: the constants, and what each operation computes, to the bit.

A real tensor is ``scale * (code - zero)`` with int8 codes. Everything here is the definition that formulas, C and
tests share; all of it is integer arithmetic of at most 64 bits, rounded once at the end of an operation.

Bounds, in units of the output code, of the distance to real arithmetic on the same codes, before clamping:

* :func:`requantise` and :func:`add` (linear maps, products, sums of two): 1/2 + 1/100;
* :func:`softmax`: 1/2 + 1/500 for up to 256 codes in a row, up to 1/64 for 16,384;
* :func:`layer_norm`: 1/2 + (|z| + 1) 2^-19 |gain| / output scale + 1/1000, z the normalised value;
* a table (:func:`table`): 1/2, the rounding itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LOW, HIGH = -128, 127
MULTIPLIER_BITS = 31
SHIFT_STEPS = (8, 4)
"""Shifts are multiples of these, so that layers share kernels: where a multiplier is one number, and where channels
have their own. It costs a multiplier fewer of its bits than that."""
SOFTMAX_BITS = 30  # of a row's sum
RECIPROCAL_BITS = 31
FACTOR_BITS = 30
INVERSE_BITS = 38  # fraction of the inverse of a row's deviation, in 64 bits
NORM_BITS = 20  # fraction of a normalised value
OFFSET_BITS = 16  # fraction of what normalisation adds at its end
BIAS_BITS = (8, 4, 0)
"""Fractions of a sum's bias, the first that 32 bits have room for: rounded to whole units of the sum, biases would turn
one code in a few thousand."""


@dataclass(frozen=True)
class Code:
    """How int8 codes stand for numbers: ``scale * (code - zero)``; ``scale`` may be one number per channel."""

    scale: np.ndarray | np.floating
    zero: int = 0
    axis: int | None = None

    @property
    def step(self) -> float:
        """The scale where it is one number."""
        return float(np.asarray(self.scale).reshape(-1)[0])


def encode(values: np.ndarray, code: Code) -> np.ndarray:
    """The nearest codes, ties to even, clamped: what ONNX's QuantizeLinear does."""
    scale = _along(code.scale, values.ndim, code.axis)
    return np.clip(np.rint(values / scale) + code.zero, LOW, HIGH).astype(np.int8)


def decode(codes: np.ndarray, code: Code) -> np.ndarray:
    """The numbers that codes stand for, in double."""
    return (codes.astype(np.float64) - code.zero) * _along(code.scale, codes.ndim, code.axis)


def _along(scale: np.ndarray | np.floating, rank: int, axis: int | None) -> np.ndarray:
    scale = np.asarray(scale, np.float64)
    return (
        scale
        if axis is None or not scale.ndim
        else scale.reshape([-1 if at == axis % rank else 1 for at in range(rank)])
    )


# -- scaling a sum to codes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """``(value * multiplier + offset) >> shift``: multiplication by a real number, plus the zero, rounded half up.

    Args:
        multiplier: int32, one or one per channel; the largest has at least 24 bits, or 28.
        offset: int64, half of the last place and the zero of the output.
    """

    multiplier: np.ndarray
    shift: int
    offset: int

    @classmethod
    def of(cls, ratio: float | np.ndarray, zero: int = 0) -> Scaling:
        """For ``value * ratio + zero``; ``ratio`` is positive, below 2^30 and not all zero."""
        ratio = np.asarray(ratio, np.float64)
        shift = MULTIPLIER_BITS - math.frexp(float(ratio.max()))[1]
        shift = _even(min(shift, 54), SHIFT_STEPS[ratio.size > 1])  # the zero, at most 128, is shifted as far
        multiplier = np.minimum(np.rint(np.ldexp(ratio, shift)), 2**MULTIPLIER_BITS - 1).astype(np.int32)
        return cls(multiplier, shift, (zero << shift) + (1 << (shift - 1) if shift else 0))


def _even(shift: int, step: int) -> int:
    """A shift rounded down to a multiple, where it is not too short for that."""
    return shift - shift % step if shift >= 2 * step else shift


def requantise(total: np.ndarray, scaling: Scaling) -> np.ndarray:
    """An int32 sum, times a real number, as a code."""
    wide = total.astype(np.int64) * scaling.multiplier.astype(np.int64) + scaling.offset
    return np.clip(wide >> scaling.shift, LOW, HIGH).astype(np.int8)


# -- sums of two tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Addition:
    """``(a * left + b * right + offset) >> shift`` in 32 bits: a weighted sum of two codes."""

    left: int
    right: int
    offset: int
    shift: int

    @classmethod
    def of(cls, a: Code, b: Code, out: Code, sign: int = 1) -> Addition:
        """For ``a + sign * b``."""
        ratios = a.step / out.step, sign * b.step / out.step
        bound = sum(abs(r) for r in ratios) * 128 + sum(abs(r * c.zero) for r, c in zip(ratios, (a, b), strict=True))
        shift = max(30 - math.frexp(bound + abs(out.zero) + 1)[1], 0)
        shift = min(shift, 22)
        left, right = (int(np.rint(math.ldexp(r, shift))) for r in ratios)
        half = 1 << (shift - 1) if shift else 0
        exact = math.ldexp(out.zero - a.zero * ratios[0] - b.zero * ratios[1], shift)
        return cls(left, right, int(np.rint(exact)) + half, shift)


def add(a: np.ndarray, b: np.ndarray, how: Addition) -> np.ndarray:
    """The codes of a weighted sum."""
    total = a.astype(np.int32) * np.int32(how.left) + b.astype(np.int32) * np.int32(how.right) + np.int32(how.offset)
    return np.clip(total >> how.shift, LOW, HIGH).astype(np.int8)


# -- functions of one code -------------------------------------------------------------------------


def table(function: Callable[[np.ndarray], np.ndarray], code: Code, out: Code) -> np.ndarray:
    """A function of one number as 256 codes, indexed by code + 128. Exact: it holds the rounded results themselves."""
    values = function(decode(np.arange(LOW, HIGH + 1, dtype=np.int16), code))
    return encode(np.nan_to_num(values, posinf=3e38, neginf=-3e38), out)


# -- softmax ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax:
    """Softmax over ``count`` codes.

    Args:
        powers: exp(-scale * i) for i in 0..255, times 2^bits, so that a row's sum fits 31 bits.
        bits: 30 less those of count.
        drop: bits of the sum that are dropped for the first guess of its reciprocal, so that 16 or more remain.
        factor: the output scale's mantissa, which the row's reciprocal is multiplied by.
        shift, offset: of the last step.
    """

    powers: np.ndarray
    bits: int
    drop: int
    factor: int
    shift: int
    offset: int

    @classmethod
    def of(cls, code: Code, out: Code, count: int) -> Softmax:
        """For rows of ``count`` codes."""
        bits = SOFTMAX_BITS - max(count - 1, 1).bit_length()
        powers = np.rint(np.ldexp(np.exp(-code.step * np.arange(256)), bits)).astype(np.int32)
        # 1 / sum = reciprocal * 2^-(30 + bits); output = power * reciprocal * 2^-(30 + bits) / out.step + zero
        mantissa, exponent = math.frexp(1.0 / out.step)
        shift = 30 + bits - exponent
        offset = (out.zero << shift) + (1 << (shift - 1))
        return cls(powers, bits, bits - 16, round(math.ldexp(mantissa, FACTOR_BITS)), shift, offset)


def softmax(codes: np.ndarray, how: Softmax) -> np.ndarray:
    """Softmax over the last axis.

    The row's reciprocal is guessed to 15 bits by a division of 32 bits, and made exact to 29 by one of Newton's steps.
    """
    below = codes.max(-1, keepdims=True).astype(np.int32) - codes
    powers = how.powers[below].astype(np.int64)
    total = powers.sum(-1, keepdims=True)
    guess = (2**RECIPROCAL_BITS - 1) // (total >> how.drop)
    error = (1 << (15 + how.bits)) - total * guess
    reciprocal = (guess << 15) + ((error * guess) >> how.bits)
    scaled = (reciprocal * how.factor) >> FACTOR_BITS
    return np.clip((powers * scaled + how.offset) >> how.shift, LOW, HIGH).astype(np.int8)


# -- layer normalisation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNorm:
    """Normalisation over ``count`` codes, then a gain and a shift per channel.

    Args:
        epsilon: in units of the variance times count^2, shifted likewise.
        root_shift: the variance is shifted left by twice this before its root is taken.
        gain: int32 per channel; a product with it is shifted by ``product_shift``.
        offset: int32 per channel, with the zero and the rounding; ``shift`` bits of it are a fraction.
    """

    count: int
    epsilon: int
    root_shift: int
    gain: np.ndarray
    offset: np.ndarray
    product_shift: int
    shift: int

    @classmethod
    def of(cls, code: Code, out: Code, gain: np.ndarray, bias: np.ndarray, epsilon: float) -> LayerNorm:
        """For channels with these gains and biases."""
        count = len(gain)
        most = count * 128 + math.sqrt(epsilon) * count / code.step
        root_shift = max(30 - math.frexp(most)[1], 0)
        ratio = gain.astype(np.float64) / out.step
        largest = max(float(np.abs(ratio).max()), 2.0**-20)
        fraction = _even(30 - max(math.frexp(largest)[1], 0), SHIFT_STEPS[0])
        shift = OFFSET_BITS
        shifted = bias.astype(np.float64) / out.step + out.zero
        offset = np.clip(np.rint(np.ldexp(shifted, shift)) + 2 ** (shift - 1), -(2**30), 2**30).astype(np.int32)
        fixed = np.rint(np.ldexp(ratio, fraction)).astype(np.int32)
        small = round(math.ldexp(epsilon * (count / code.step) ** 2, 2 * root_shift))
        return cls(count, small, root_shift, fixed, offset, fraction + NORM_BITS - shift, shift)

    @property
    def reciprocal_bits(self) -> int:
        return INVERSE_BITS + self.root_shift


def isqrt(value: np.ndarray) -> np.ndarray:
    """The floor of the square root of a non-negative int64."""
    root = np.floor(np.sqrt(value.astype(np.float64))).astype(np.int64)
    root -= root * root > value
    return root + ((root + 1) * (root + 1) <= value)


def layer_norm(codes: np.ndarray, how: LayerNorm) -> np.ndarray:
    """Normalises over the last axis."""
    wide = codes.astype(np.int32)
    total = wide.sum(-1, keepdims=True, dtype=np.int32)
    squares = (wide * wide).sum(-1, keepdims=True, dtype=np.int32).astype(np.int64)
    variance = squares * how.count - total.astype(np.int64) ** 2
    root = isqrt(np.maximum((variance << (2 * how.root_shift)) + how.epsilon, 1 << (2 * how.root_shift)))
    reciprocal = (np.int64(1) << how.reciprocal_bits) // root
    centred = wide * np.int32(how.count) - total
    normal = (centred.astype(np.int64) * reciprocal) >> (INVERSE_BITS - NORM_BITS)
    scaled = ((normal * how.gain) >> how.product_shift) + how.offset
    return np.clip(scaled >> how.shift, LOW, HIGH).astype(np.int8)
