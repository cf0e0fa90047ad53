"""Operators of quantised networks: the standard's on the border, and integer ones of a private domain inside.

The private ones are what :mod:`lrcompile.fixedpoint` defines, written as formulas. They never stand in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.dataflow.expr import Const, Datum, Expr, Load, call, cast
from lrcompile.dataflow.index import Sum, constant
from lrcompile.fixedpoint import FACTOR_BITS, HIGH, INVERSE_BITS, LOW, NORM_BITS, RECIPROCAL_BITS
from lrcompile.graphs.onnx.formulas.builder import Builder, Handler, Index, broadcast, integer, integers, op
from lrcompile.graphs.onnx.formulas.linear import Windows, matmul
from lrcompile.graphs.onnx.formulas.moving import inside
from lrcompile.graphs.onnx.formulas.pointwise import const
from lrcompile.graphs.onnx.formulas.reducing import over

DOMAIN = "lrcompile.integer"
WIDE = 256
"""Constant codes of so many elements stay bytes; fewer are decoded beforehand."""


def private(*names: str) -> Callable[[Handler], Handler]:
    """Registers operators of the private domain."""
    return op(*(f"{DOMAIN}::{name}" for name in names))


def whole(value: int, bits: int = 32) -> Const:
    return Const(int(value), f"int{bits}")


def wide(value: Expr) -> Expr:
    return cast(value, "int64")


def code(value: Expr) -> Expr:
    """An int32 clamped to int8."""
    return cast(call("min", call("max", value, whole(LOW)), whole(HIGH)), "int8")


def shifted(value: Expr, shift: int) -> Expr:
    return value if not shift else call("shr", value, Const(shift, value.dtype))


def scaled(total: Expr, multiplier: Expr, node: ir.Node) -> Expr:
    """What :func:`lrcompile.fixedpoint.requantise` computes."""
    constants = whole(integer(node, "offset"), 64), whole(integer(node, "shift"))
    return code(call("scale", total, multiplier, *constants, dtype="int32"))


def _lookup(table: str, value: Expr, dtype: str, base: int = -LOW) -> Expr:
    """``table[value + base]``."""
    position = Sum(((Datum(cast(value, "int32")), 1),), base)
    return Load(table, (position,), dtype)


def _minus(value: Expr, zero: int) -> Expr:
    value = cast(value, "int32")
    return value if not zero else call("sub", value, whole(zero))


# -- linear maps -----------------------------------------------------------------------------------


@private("Linear")
def _linear(b: Builder, node: ir.Node) -> None:
    """x (…, in) int8, weight (out, in) int8, bias (out) int32, then a multiplier (out) or a real scale (out).

    The lowest ``fraction`` bits of the bias are a fraction of the sum's unit.
    """
    x, w, bias, scale = (b.need(node, at) for at in range(4))
    outputs, width = b.shape(w)

    def element(i: Index, inner: Index) -> Expr:
        return call("mul", cast(b.at(x, [*i[:-1], inner[0]]), "int32"), cast(b.at(w, [i[-1], inner[0]]), "int32"))

    b.reduce(b.output(node), (*b.shape(x)[:-1], outputs), (width,), element, "add", _finish(b, node, bias, scale, -1))


def _finish(b: Builder, node: ir.Node, bias: str, scale: str, axis: int) -> Callable[[Expr, Index], Expr]:
    def finish(total: Expr, i: Index) -> Expr:
        channel, fraction = [i[axis]], integer(node, "fraction")
        total = call("add", call("shl", total, whole(fraction)) if fraction else total, b.at(bias, channel))
        if b.dtype(scale) == "float32":
            return call("mul", cast(total, "float32"), b.at(scale, channel))
        return scaled(total, b.at(scale, channel), node)

    return finish


@private("Convolution")
def _convolution(b: Builder, node: ir.Node) -> None:
    """As Linear, over windows; what lies outside counts as ``zero``."""
    x, w, bias, scale = (b.need(node, at) for at in range(4))
    n, _, *spatial = b.shape(x)
    outputs, per_group, *kernel = b.shape(w)
    groups = integer(node, "group", 1)
    windows = Windows(node, tuple(spatial), tuple(kernel))

    def element(i: Index, inner: Index) -> Expr:
        group = i[1] // (outputs // groups)
        index = [i[0], group * per_group + inner[0], *windows.at(i[2:], inner[1:])]
        value = inside(b, x, index, Const(integer(node, "zero"), "int8"))
        return call("mul", cast(value, "int32"), cast(b.at(w, [i[1], *inner]), "int32"))

    shape = (n, outputs, *windows.shape)
    b.reduce(b.output(node), shape, (per_group, *kernel), element, "add", _finish(b, node, bias, scale, 1))


@private("Product")
def _product(b: Builder, node: ir.Node) -> None:
    """A matrix product of two tensors of codes."""
    zeros = integers(node, "zeros") or [0, 0]
    left = lambda value, index: _minus(value, zeros[0])  # noqa: E731
    right = lambda value, index: _minus(value, zeros[1])  # noqa: E731
    total = matmul(b, node, None, b.need(node, 0), b.need(node, 1), left, right)
    multiplier = whole(integer(node, "multiplier"))
    b.define(b.output(node), b.shape(total), lambda i: scaled(b.at(total, i), multiplier, node))


# -- elements --------------------------------------------------------------------------------------


@private("Add")
def _add(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)
    left, right = whole(integer(node, "left")), whole(integer(node, "right"))
    offset, shift = whole(integer(node, "offset")), integer(node, "shift")

    def formula(i: Index) -> Expr:
        one = call("mul", cast(b.spread(x, i), "int32"), left)
        two = call("mul", cast(b.spread(y, i), "int32"), right)
        return code(shifted(call("add", call("add", one, two), offset), shift))

    b.define(b.output(node), _common(b, x, y), formula)


@private("Multiply")
def _multiply(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)
    zeros = integers(node, "zeros") or [0, 0]
    multiplier = whole(integer(node, "multiplier"))

    def formula(i: Index) -> Expr:
        product = call("mul", _minus(b.spread(x, i), zeros[0]), _minus(b.spread(y, i), zeros[1]))
        return scaled(product, multiplier, node)

    b.define(b.output(node), _common(b, x, y), formula)


def _common(b: Builder, x: str, y: str) -> tuple[int, ...]:
    return broadcast(b.shape(x), b.shape(y))


@private("Lookup")
def _table(b: Builder, node: ir.Node) -> None:
    x, table = b.need(node, 0), b.need(node, 1)
    b.define(b.output(node), b.shape(x), lambda i: _lookup(table, b.at(x, i), "int8"))


# -- along an axis ---------------------------------------------------------------------------------


@private("Mean")
def _mean(b: Builder, node: ir.Node) -> None:
    """A sum over axes of codes without their zero, scaled: a mean."""
    x, axes = b.need(node, 0), list(integers(node, "axes") or [])
    multiplier, correction = whole(integer(node, "multiplier")), whole(integer(node, "correction"))

    def finish(total: Expr) -> Expr:
        return scaled(call("add", total, correction), multiplier, node)

    keep = bool(integer(node, "keepdims", 1))
    over(b, b.output(node), x, axes, keep, "add", lambda v: cast(v, "int32"), finish)


@private("Softmax")
def _softmax(b: Builder, node: ir.Node) -> None:
    x, powers = b.need(node, 0), b.need(node, 1)
    axis = integer(node, "axis")
    name = b.output(node) or "softmax"
    reduced = _reduced([axis])
    top = over(b, None, x, [axis], True, "max", hint=f"{name}/max")

    def power(i: Index) -> Expr:
        below = call("sub", cast(b.at(top, reduced(i)), "int32"), cast(b.at(x, i), "int32"))
        return _lookup(powers, below, "int32", 0)

    raised = b.define(None, b.shape(x), power, f"{name}/power")

    def reciprocal(total: Expr) -> Expr:
        bits, factor = integer(node, "bits"), whole(integer(node, "factor"), 64)
        guess = call("div", whole(2**RECIPROCAL_BITS - 1), shifted(total, integer(node, "drop")))
        error = call("sub", whole(1 << (15 + bits), 64), call("mul", wide(total), wide(guess)))
        more = shifted(call("mul", error, wide(guess)), bits)
        found = call("add", call("shl", wide(guess), whole(15, 64)), more)
        return cast(shifted(call("mul", found, factor), FACTOR_BITS), "int32")

    scale = over(b, None, raised, [axis], True, "add", None, reciprocal, f"{name}/scale")
    b.define(b.output(node), b.shape(x), lambda i: scaled(b.at(raised, i), b.at(scale, reduced(i)), node))


def _reduced(axes: Sequence[int]) -> Callable[[Index], list[Sum]]:
    return lambda i: [constant(0) if at in axes else each for at, each in enumerate(i)]


@private("LayerNorm")
def _layer_norm(b: Builder, node: ir.Node) -> None:
    x, gain, offset = (b.need(node, at) for at in range(3))
    axis = len(b.shape(x)) - 1
    count, root_shift = integer(node, "count"), integer(node, "root_shift")
    name = b.output(node) or "layer-norm"
    reduced = _reduced([axis])

    def square(value: Expr) -> Expr:
        value = cast(value, "int32")
        return call("mul", value, value)

    total = over(b, None, x, [axis], True, "add", lambda v: cast(v, "int32"), hint=f"{name}/sum")
    squares = over(b, None, x, [axis], True, "add", square, hint=f"{name}/squares")

    def inverse(i: Index) -> Expr:
        first, second = b.at(total, i), b.at(squares, i)
        variance = call("mul", wide(second), whole(count, 64))
        variance = call("sub", variance, call("mul", wide(first), wide(first)))
        shifted = call("add", call("shl", variance, whole(2 * root_shift, 64)), whole(integer(node, "epsilon"), 64))
        root = call("isqrt", call("max", shifted, whole(1 << (2 * root_shift), 64)))
        return call("quotient", whole(1 << (INVERSE_BITS + root_shift), 64), root)

    reciprocal = b.define(None, b.shape(total), inverse, f"{name}/scale")

    def formula(i: Index) -> Expr:
        centred = call("sub", call("mul", cast(b.at(x, i), "int32"), whole(count)), b.at(total, reduced(i)))
        normal = shifted(call("mul", wide(centred), b.at(reciprocal, reduced(i))), INVERSE_BITS - NORM_BITS)
        normal = cast(normal, "int32")
        product = shifted(call("mul", wide(normal), wide(b.at(gain, [i[-1]]))), integer(node, "product_shift"))
        return code(shifted(call("add", cast(product, "int32"), b.at(offset, [i[-1]])), integer(node, "shift")))

    b.define(b.output(node), b.shape(x), formula)


# -- the standard's, on the border -----------------------------------------------------------------


def _parameter(b: Builder, tensor: str | None, node: ir.Node, rank: int, i: Index) -> Expr | None:
    """An element of a scale or zero: one number, or one per position of ``axis``."""
    if tensor is None:
        return None
    if not b.shape(tensor) or b.shape(tensor) == (1,):
        return b.at(tensor, [constant(0)] * len(b.shape(tensor)))
    if integer(node, "block_size"):
        raise b.refuse(node, "blocks of scales have no formula")
    return b.at(tensor, [i[integer(node, "axis", 1) % rank]])


@op("QuantizeLinear")
def _quantize(b: Builder, node: ir.Node) -> None:
    x, zero = b.need(node, 0), b.given(node, 2)
    dtype = b.dtype(zero) if zero else "uint8"
    if dtype not in ("int8", "uint8", "int16", "uint16"):
        raise b.refuse(node, f"no formula for codes of type {dtype}")
    low, high = ((0, 255), (-128, 127), (0, 65535), (-32768, 32767))[("uint8", "int8", "uint16", "int16").index(dtype)]
    rank = len(b.shape(x))

    def formula(i: Index) -> Expr:
        scale, offset = (_parameter(b, b.given(node, at), node, rank, i) for at in (1, 2))
        assert scale is not None
        value = b.at(x, i)
        rounded = call("rint", call("div", cast(value, scale.dtype), scale))
        shifted_by = rounded if offset is None else call("add", rounded, cast(offset, rounded.dtype))
        clamped = call("min", call("max", shifted_by, const(low, rounded)), const(high, rounded))
        return cast(cast(clamped, "int32"), dtype)

    b.define(b.output(node), b.shape(x), formula)


def stays_narrow(node: ir.Node, arrays: Sequence[np.ndarray | None]) -> bool:
    """Whether constant codes are decoded where they are used: a matrix of bytes takes a quarter of its floats."""
    codes = arrays[0]
    if codes is None or codes.ndim < 2 or codes.dtype.itemsize > 1 or "block_size" in node.attributes:
        return False
    return codes.size >= WIDE


@op("DequantizeLinear")
def _dequantize(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    rank = len(b.shape(x))

    def formula(i: Index) -> Expr:
        scale, offset = (_parameter(b, b.given(node, at), node, rank, i) for at in (1, 2))
        assert scale is not None
        value = cast(b.at(x, i), "int32")
        value = value if offset is None else call("sub", value, cast(offset, "int32"))
        return call("mul", cast(value, scale.dtype), scale)

    b.define(b.output(node), b.shape(x), formula)
