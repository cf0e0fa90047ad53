"""Operators on elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from lrcompile.dataflow.expr import Call, Const, Expr, call, cast
from lrcompile.graphs.onnx.formulas.builder import Builder, broadcast, integer, number, op, text

Unary = Callable[[Expr], Expr]


def const(value: float, like: Expr) -> Const:
    """A number in the type of another value."""
    if like.dtype.startswith("float"):
        return Const(float(value), like.dtype)
    return Const(bool(value) if like.dtype == "bool" else int(value), like.dtype)


def compare(name: str, a: Expr, b: Expr) -> Expr:
    return Call(name, (a, b), "bool")


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    return Call("select", (condition, a, b), a.dtype)


def sigmoid(x: Expr) -> Expr:
    one = const(1, x)
    return call("div", one, call("add", one, call("exp", call("neg", x))))


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x)), without overflow."""
    tail = call("log1p", call("exp", call("neg", call("abs", x))))
    return call("add", call("max", x, const(0, x)), tail)


def clip(x: Expr, low: float, high: float) -> Expr:
    return call("min", call("max", x, const(low, x)), const(high, x))


def sign(x: Expr) -> Expr:
    zero = const(0, x)
    if x.dtype.startswith("uint"):
        return cast(compare("gt", x, zero), x.dtype)
    up, down = cast(compare("gt", x, zero), x.dtype), cast(compare("lt", x, zero), x.dtype)
    return call("sub", up, down)


def gelu(x: Expr, approximate: str) -> Expr:
    half, one = const(0.5, x), const(1, x)
    if approximate == "tanh":
        cube = call("mul", call("mul", x, x), x)
        inner = call("mul", call("add", x, call("mul", cube, const(0.044715, x))), const(math.sqrt(2 / math.pi), x))
        return call("mul", call("mul", x, half), call("add", one, call("tanh", inner)))
    inner = call("erf", call("mul", x, const(math.sqrt(0.5), x)))
    return call("mul", call("mul", x, half), call("add", one, inner))


def _negative(x: Expr, other: Expr) -> Expr:
    """x where it is not negative, else something else."""
    return select(compare("lt", x, const(0, x)), other, x)


def _expm1(x: Expr, factor: float) -> Expr:
    return call("mul", call("sub", call("exp", x), const(1, x)), const(factor, x))


LIBM = ("Abs", "Neg", "Exp", "Log", "Sqrt", "Floor", "Ceil", "Erf", "Tanh", "Sin", "Cos", "Tan", "Asin", "Acos")
LIBM += ("Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")


def _named(name: str) -> Callable[[Expr, ir.Node], Expr]:
    """The operation of the same name."""
    return lambda x, node: call(name, x)


UNARY: dict[str, Callable[[Expr, ir.Node], Expr]] = {
    **{name: _named(name.lower()) for name in LIBM},
    "Round": lambda x, node: call("rint", x),
    "Not": lambda x, node: call("not", x),
    "BitwiseNot": lambda x, node: call("bitnot", x),
    "Reciprocal": lambda x, node: call("div", const(1, x), x),
    "Identity": lambda x, node: x,
    "Sign": lambda x, node: sign(x),
    "IsNaN": lambda x, node: Call("isnan", (x,), "bool"),
    "IsInf": lambda x, node: _is_inf(x, node),
    "Relu": lambda x, node: call("max", x, const(0, x)),
    "Sigmoid": lambda x, node: sigmoid(x),
    "Softplus": lambda x, node: softplus(x),
    "Softsign": lambda x, node: call("div", x, call("add", const(1, x), call("abs", x))),
    "Gelu": lambda x, node: gelu(x, text(node, "approximate", "none")),
    "Mish": lambda x, node: call("mul", x, call("tanh", softplus(x))),
    "HardSwish": lambda x, node: call(
        "mul", x, clip(call("add", call("mul", x, const(1 / 6, x)), const(0.5, x)), 0, 1)
    ),
    "Swish": lambda x, node: call("mul", x, sigmoid(call("mul", x, const(number(node, "alpha", 1.0), x)))),
    "HardSigmoid": lambda x, node: clip(
        call("add", call("mul", x, const(number(node, "alpha", 0.2), x)), const(number(node, "beta", 0.5), x)), 0, 1
    ),
    "LeakyRelu": lambda x, node: _negative(x, call("mul", x, const(number(node, "alpha", 0.01), x))),
    "Elu": lambda x, node: _negative(x, _expm1(x, number(node, "alpha", 1.0))),
    "Celu": lambda x, node: _celu(x, number(node, "alpha", 1.0)),
    "Selu": lambda x, node: _selu(x, number(node, "alpha", 1.6732632), number(node, "gamma", 1.0507010)),
    "ThresholdedRelu": lambda x, node: select(compare("gt", x, const(number(node, "alpha", 1.0), x)), x, const(0, x)),
    "Shrink": lambda x, node: _shrink(x, number(node, "lambd", 0.5), number(node, "bias", 0.0)),
}

BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "And": "and",
    "Or": "or",
    "Xor": "xor",
    "BitwiseAnd": "bitand",
    "BitwiseOr": "bitor",
    "BitwiseXor": "bitxor",
    "PRelu": "prelu",
}
COMPARE = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge"}
VARIADIC = {"Max": "max", "Min": "min", "Sum": "add", "Mean": "add"}


def _is_inf(x: Expr, node: ir.Node) -> Expr:
    up = compare("eq", x, const(math.inf, x)) if integer(node, "detect_positive", 1) else Const(False, "bool")
    down = compare("eq", x, const(-math.inf, x)) if integer(node, "detect_negative", 1) else Const(False, "bool")
    return Call("or", (up, down), "bool")


def _celu(x: Expr, alpha: float) -> Expr:
    low = _expm1(call("min", call("div", x, const(alpha, x)), const(0, x)), alpha)
    return call("add", call("max", x, const(0, x)), low)


def _selu(x: Expr, alpha: float, gamma: float) -> Expr:
    return call("mul", _negative(x, _expm1(x, alpha)), const(gamma, x))


def _shrink(x: Expr, limit: float, bias: float) -> Expr:
    low = select(compare("lt", x, const(-limit, x)), call("add", x, const(bias, x)), const(0, x))
    return select(compare("gt", x, const(limit, x)), call("sub", x, const(bias, x)), low)


@op(*UNARY)
def _unary(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    if node.op_type == "Round" and not b.dtype(x).startswith("float"):
        raise b.refuse(node, f"no formula for {b.dtype(x)}")
    b.define(b.output(node), b.shape(x), lambda i: UNARY[node.op_type](b.at(x, i), node))


@op(*BINARY, *COMPARE)
def _binary(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)
    shape = broadcast(b.shape(x), b.shape(y))

    def formula(i: tuple) -> Expr:
        left, right = b.spread(x, i), b.spread(y, i)
        if node.op_type == "PRelu":
            return _negative(left, call("mul", left, right))
        if node.op_type in COMPARE:
            return compare(COMPARE[node.op_type], left, right)
        if node.op_type == "Div" and isinstance(right, Const) and right.dtype == "float32" and _power_of_two(right):
            return call("mul", left, const(1 / right.value, right))
        return call(BINARY[node.op_type], left, right)

    b.define(b.output(node), shape, formula)


def _power_of_two(value: Const) -> bool:
    """Whether a division by the number is exactly a multiplication."""
    return value.value != 0 and math.isfinite(value.value) and abs(math.frexp(float(value.value))[0]) == 0.5


@op(*VARIADIC)
def _variadic(b: Builder, node: ir.Node) -> None:
    inputs = [b.need(node, at) for at in range(len(node.inputs))]
    shape = broadcast(*map(b.shape, inputs))

    def formula(i: tuple) -> Expr:
        value = b.spread(inputs[0], i)
        for each in inputs[1:]:
            value = call(VARIADIC[node.op_type], value, b.spread(each, i))
        return call("div", value, const(len(inputs), value)) if node.op_type == "Mean" else value

    b.define(b.output(node), shape, formula)


@op("Pow")
def _power(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)

    def formula(i: tuple) -> Expr:
        base, exponent = b.spread(x, i), b.spread(y, i)
        if isinstance(exponent, Const) and exponent.value in (1, 2, 3):
            value = base
            for _ in range(int(exponent.value) - 1):
                value = call("mul", value, base)
            return value
        if isinstance(exponent, Const) and exponent.value == 0.5 and base.dtype.startswith("float"):
            return call("sqrt", base)
        wide = base.dtype if base.dtype.startswith("float") else "float64"
        return cast(call("pow", cast(base, wide), cast(exponent, wide)), base.dtype)

    b.define(b.output(node), broadcast(b.shape(x), b.shape(y)), formula)


@op("Mod")
def _mod(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)

    def formula(i: tuple) -> Expr:
        left, right = b.spread(x, i), b.spread(y, i)
        rest = call("fmod" if left.dtype.startswith("float") else "rem", left, right)
        if integer(node, "fmod") or left.dtype.startswith("uint"):
            return rest
        wrong = Call("and", (compare("ne", rest, const(0, rest)), _differ(rest, right)), "bool")
        return select(wrong, call("add", rest, right), rest)

    b.define(b.output(node), broadcast(b.shape(x), b.shape(y)), formula)


def _differ(a: Expr, b: Expr) -> Expr:
    """Whether two numbers have different signs."""
    return Call("xor", (compare("lt", a, const(0, a)), compare("lt", b, const(0, b))), "bool")


@op("BitShift")
def _shift(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)
    if not b.dtype(x).startswith("uint"):
        raise b.refuse(node, f"a shift of {b.dtype(x)} has no meaning in C99 for every distance")
    name = "shl" if text(node, "direction") == "LEFT" else "shr"
    shape = broadcast(b.shape(x), b.shape(y))
    b.define(b.output(node), shape, lambda i: Call(name, (b.spread(x, i), b.spread(y, i)), b.dtype(x)))


@op("Where")
def _where(b: Builder, node: ir.Node) -> None:
    c, x, y = (b.need(node, at) for at in range(3))
    shape = broadcast(b.shape(c), b.shape(x), b.shape(y))
    b.define(b.output(node), shape, lambda i: select(b.spread(c, i), b.spread(x, i), b.spread(y, i)))


@op("Clip")
def _clip(b: Builder, node: ir.Node) -> None:
    x, low, high = b.need(node, 0), b.given(node, 1), b.given(node, 2)

    def formula(i: tuple) -> Expr:
        value = b.at(x, i)
        lower = b.spread(low, i) if low else const(number(node, "min"), value) if "min" in node.attributes else None
        upper = b.spread(high, i) if high else const(number(node, "max"), value) if "max" in node.attributes else None
        value = value if lower is None else call("max", value, lower)
        return value if upper is None else call("min", value, upper)

    b.define(b.output(node), b.shape(x), formula)


@op("Cast", "CastLike")
def _cast(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    target = b.dtype(b.need(node, 1)) if node.op_type == "CastLike" else _numpy(b, node, integer(node, "to"))
    b.define(b.output(node), b.shape(x), lambda i: cast(b.at(x, i), target))


def _numpy(b: Builder, node: ir.Node, code: int) -> str:
    kind = ir.DataType(code)
    try:
        return kind.numpy().name
    except TypeError:
        raise b.refuse(node, f"no formula for the type {kind.name}") from None
