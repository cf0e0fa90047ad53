"""Operators that combine elements along axes: reductions, softmax, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import onnx_ir as ir

from lrcompile.dataflow.expr import Call, Const, Expr, Position, call, cast
from lrcompile.dataflow.index import constant
from lrcompile.graphs.onnx.formulas.builder import Builder, Index, axis_of, integer, integers, number, op
from lrcompile.graphs.onnx.formulas.pointwise import compare, const, select

Body = Callable[[Expr], Expr]
Finish = Callable[[Expr], Expr]


def over(
    b: Builder,
    value: str | None,
    x: str,
    axes: list[int],
    keep: bool,
    combine: str = "add",
    body: Body | None = None,
    finish: Finish | None = None,
    hint: str = "",
) -> str:
    """Combines a tensor along axes."""
    old = b.shape(x)
    shape = tuple(1 if at in axes else n for at, n in enumerate(old))
    shape = shape if keep else tuple(n for at, n in enumerate(old) if at not in axes)

    def element(i: Index, inner: Index) -> Expr:
        rest, combined = iter(i), iter(inner)
        index = []
        for at in range(len(old)):
            if at in axes:
                index.append(next(combined))
                if keep:
                    next(rest)
            else:
                index.append(next(rest))
        found = b.at(x, index)
        return found if body is None else body(found)

    ending = None if finish is None else (lambda result, i: finish(result))
    if not axes:
        return b.define(value, shape, lambda i: (finish or _same)(element(i, ())), hint)
    return b.reduce(value, shape, tuple(old[at] for at in axes), element, combine, ending, hint)


def _same(value: Expr) -> Expr:
    return value


def _square(x: Expr) -> Expr:
    return call("mul", x, x)


REDUCTIONS: dict[str, tuple[str, Body | None, Finish | None]] = {
    "ReduceSum": ("add", None, None),
    "ReduceMax": ("max", None, None),
    "ReduceMin": ("min", None, None),
    "ReduceProd": ("mul", None, None),
    "ReduceL1": ("add", lambda x: call("abs", x), None),
    "ReduceL2": ("add", _square, lambda x: call("sqrt", x)),
    "ReduceSumSquare": ("add", _square, None),
    "ReduceLogSum": ("add", None, lambda x: call("log", x)),
    "ReduceLogSumExp": ("add", lambda x: call("exp", x), lambda x: call("log", x)),
    "ReduceMean": ("add", None, None),
}


@op(*REDUCTIONS)
def _reduction(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    rank = len(b.shape(x))
    axes = integers(node, "axes")
    if axes is None:
        found = b.known(node, 1, "axes")
        axes = None if found is None else [int(each) for each in found.reshape(-1)]
    if not axes:
        axes = [] if integer(node, "noop_with_empty_axes") else list(range(rank))
    axes = sorted(each % max(rank, 1) for each in axes)
    combine, body, finish = REDUCTIONS[node.op_type]
    if node.op_type == "ReduceMean" and axes:
        count = prod(b.shape(x)[at] for at in axes)
        finish = lambda s: _mean(s, count)  # noqa: E731
    over(b, b.output(node), x, axes, bool(integer(node, "keepdims", 1)), combine, body, finish)


def _mean(total: Expr, count: int) -> Expr:
    return call("div", total, const(count, total))


@op("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    axes = list(range(2, len(b.shape(x))))
    count = prod(b.shape(x)[2:])
    if node.op_type == "GlobalMaxPool":
        over(b, b.output(node), x, axes, True, "max")
    else:
        over(b, b.output(node), x, axes, True, finish=lambda s: _mean(s, count))


@op("ArgMax", "ArgMin")
def _arg(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    axis = axis_of(node, len(old), 0)
    best = over(b, None, x, [axis], True, "max" if node.op_type == "ArgMax" else "min", hint=f"{node.name}/best")
    last, keep = integer(node, "select_last_index"), integer(node, "keepdims", 1)
    shape = tuple(1 if at == axis else n for at, n in enumerate(old) if keep or at != axis)

    def element(i: Index, inner: Index) -> Expr:
        rest = [*i[:axis], *i[axis + 1 :]] if keep else list(i)
        rest.insert(axis, inner[0])
        found = compare("eq", b.at(x, rest), b.at(best, [*rest[:axis], constant(0), *rest[axis + 1 :]]))
        return select(found, Position(inner[0]), Const(-1 if last else old[axis], "int32"))

    combine = "max" if last else "min"
    b.reduce(b.output(node), shape, (old[axis],), element, combine, lambda r, i: cast(r, "int64"))


@op("Softmax", "LogSoftmax")
def _softmax(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    axes = [axis_of(node, len(old), -1)] if b.opset >= 13 else list(range(axis_of(node, len(old), 1), len(old)))
    name = b.output(node) or "softmax"
    log = node.op_type == "LogSoftmax"
    top = over(b, None, x, axes, True, "max", hint=f"{name}/max")
    reduced = lambda i: [constant(0) if at in axes else each for at, each in enumerate(i)]  # noqa: E731

    def shifted(i: Index) -> Expr:
        return call("sub", b.at(x, i), b.at(top, reduced(i)))

    if log:
        moved = b.define(None, old, shifted, f"{name}/shifted")
        total = over(
            b,
            None,
            moved,
            axes,
            True,
            body=lambda v: call("exp", v),
            finish=lambda s: call("log", s),
            hint=f"{name}/log-sum",
        )
        b.define(b.output(node), old, lambda i: call("sub", b.at(moved, i), b.at(total, reduced(i))))
        return
    raised = b.define(None, old, lambda i: call("exp", shifted(i)), f"{name}/exp")
    total = over(b, None, raised, axes, True, finish=lambda s: call("div", const(1, s), s), hint=f"{name}/scale")
    b.define(b.output(node), old, lambda i: call("mul", b.at(raised, i), b.at(total, reduced(i))))


@op("Hardmax")
def _hardmax(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    axis = axis_of(node, len(old), -1 if b.opset >= 13 else 1)
    best = over(b, None, x, [axis], True, "max", hint=f"{b.output(node)}/best")

    def first(i: Index, inner: Index) -> Expr:
        index = [inner[0] if at == axis else each for at, each in enumerate(i)]
        return select(compare("eq", b.at(x, index), b.at(best, i)), Position(inner[0]), Const(old[axis], "int32"))

    shape = tuple(1 if at == axis else n for at, n in enumerate(old))
    where = b.reduce(None, shape, (old[axis],), first, "min", hint=f"{b.output(node)}/where")

    def formula(i: Index) -> Expr:
        hot = compare(
            "eq", Position(i[axis]), b.at(where, [constant(0) if at == axis else e for at, e in enumerate(i)])
        )
        return cast(hot, b.dtype(x))

    b.define(b.output(node), old, formula)


@op("CumSum")
def _cumsum(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    found = b.array(b.given(node, 1))
    old = b.shape(x)
    if found is None and len(old) > 1:
        raise b.refuse(node, "the axis must be constant")
    axis = 0 if found is None else int(found.reshape(-1)[0]) % len(old)
    name = "le" if not integer(node, "exclusive") else "lt"
    back = bool(integer(node, "reverse"))

    def element(i: Index, inner: Index) -> Expr:
        value = b.at(x, [inner[0] if at == axis else each for at, each in enumerate(i)])
        ends = (Position(i[axis]), Position(inner[0])) if back else (Position(inner[0]), Position(i[axis]))
        return select(compare(name, *ends), value, const(0, value))

    b.reduce(b.output(node), old, (old[axis],), element)


# -- normalisation ---------------------------------------------------------------------------------


def _normalise(
    b: Builder, node: ir.Node, x: str, axes: list[int], epsilon: float, scale: Callable[[Expr, Index], Expr]
) -> tuple[str, str]:
    """(x - mean) / sqrt(variance + epsilon) along axes, then ``scale``; returns mean and inverse deviation."""
    old, count = b.shape(x), prod(b.shape(x)[at] for at in axes)
    name = b.output(node) or node.op_type
    mean = over(b, None, x, axes, True, finish=lambda s: _mean(s, count), hint=f"{name}/mean")
    reduced = lambda i: [constant(0) if at in axes else each for at, each in enumerate(i)]  # noqa: E731

    def centred(i: Index) -> Expr:
        return call("sub", b.at(x, i), b.at(mean, reduced(i)))

    middle = b.define(None, old, centred, f"{name}/centred")

    def inverse(total: Expr) -> Expr:
        root = call("sqrt", call("add", _mean(total, count), const(epsilon, total)))
        return call("div", const(1, total), root)

    deviation = over(b, None, middle, axes, True, "add", _square, inverse, hint=f"{name}/scale")

    def formula(i: Index) -> Expr:
        return scale(call("mul", b.at(middle, i), b.at(deviation, reduced(i))), i)

    b.define(b.output(node), old, formula)
    return mean, deviation


@op("LayerNormalization")
def _layer_norm(b: Builder, node: ir.Node) -> None:
    x, gain, shift = b.need(node, 0), b.need(node, 1), b.given(node, 2)
    rank = len(b.shape(x))
    axes = list(range(axis_of(node, rank, -1), rank))

    def scale(value: Expr, i: Index) -> Expr:
        value = call("mul", value, b.spread(gain, i))
        return value if shift is None else call("add", value, b.spread(shift, i))

    mean, deviation = _normalise(b, node, x, axes, number(node, "epsilon", 1e-5), scale)
    b.alias(b.output(node, 1), mean)
    b.alias(b.output(node, 2), deviation)


@op("RMSNormalization")
def _rms_norm(b: Builder, node: ir.Node) -> None:
    x, gain = b.need(node, 0), b.need(node, 1)
    old = b.shape(x)
    axes = list(range(axis_of(node, len(old), -1), len(old)))
    count, epsilon = prod(old[at] for at in axes), number(node, "epsilon", 1e-5)

    def inverse(total: Expr) -> Expr:
        return call("div", const(1, total), call("sqrt", call("add", _mean(total, count), const(epsilon, total))))

    scale = over(b, None, x, axes, True, "add", _square, inverse, hint=f"{b.output(node)}/scale")
    reduced = lambda i: [constant(0) if at in axes else each for at, each in enumerate(i)]  # noqa: E731
    b.define(
        b.output(node),
        old,
        lambda i: call("mul", call("mul", b.at(x, i), b.at(scale, reduced(i))), b.spread(gain, i)),
    )


@op("InstanceNormalization")
def _instance_norm(b: Builder, node: ir.Node) -> None:
    x, gain, shift = (b.need(node, at) for at in range(3))

    def scale(value: Expr, i: Index) -> Expr:
        return call("add", call("mul", value, b.at(gain, [i[1]])), b.at(shift, [i[1]]))

    _normalise(b, node, x, list(range(2, len(b.shape(x)))), number(node, "epsilon", 1e-5), scale)


@op("BatchNormalization")
def _batch_norm(b: Builder, node: ir.Node) -> None:
    x, gain, shift, mean, variance = (b.need(node, at) for at in range(5))
    if integer(node, "training_mode") or len([each for each in node.outputs if each.name]) > 1:
        raise b.refuse(node, "only inference is supported")
    epsilon = number(node, "epsilon", 1e-5)
    channels = b.shape(gain)

    def factor(i: Index) -> Expr:
        root = call("sqrt", call("add", b.at(variance, i), const(epsilon, b.at(variance, i))))
        return call("div", b.at(gain, i), root)

    scale = b.define(None, channels, factor, f"{b.output(node)}/scale")
    offset = b.define(
        None,
        channels,
        lambda i: call("sub", b.at(shift, i), call("mul", b.at(mean, i), b.at(scale, i))),
        f"{b.output(node)}/offset",
    )
    for each in (scale, offset):
        b.fold(each)
    axis = 1 if len(b.shape(x)) > 1 else 0
    b.define(
        b.output(node),
        b.shape(x),
        lambda i: call("add", call("mul", b.at(x, i), b.at(scale, [i[axis]])), b.at(offset, [i[axis]])),
    )


@op("LpNormalization")
def _lp_norm(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    axis, power = axis_of(node, len(old), -1), integer(node, "p", 2)
    body, finish = ((lambda v: call("abs", v)), None) if power == 1 else (_square, lambda s: call("sqrt", s))
    total = over(b, None, x, [axis], True, "add", body, finish, hint=f"{b.output(node)}/norm")

    def formula(i: Index) -> Expr:
        norm = b.at(total, [constant(0) if at == axis else each for at, each in enumerate(i)])
        return Call(
            "select", (compare("eq", norm, const(0, norm)), const(0, norm), call("div", b.at(x, i), norm)), norm.dtype
        )

    b.define(b.output(node), old, formula)


@op("LRN")
def _lrn(b: Builder, node: ir.Node) -> None:
    from lrcompile.graphs.onnx.formulas.moving import inside

    x = b.need(node, 0)
    size, alpha, beta = integer(node, "size"), number(node, "alpha", 1e-4), number(node, "beta", 0.75)
    bias, before = number(node, "bias", 1.0), (integer(node, "size") - 1) // 2

    def element(i: Index, inner: Index) -> Expr:
        index = [i[0], i[1] + inner[0] - before, *i[2:]]
        value = inside(b, x, index, Const(0.0, b.dtype(x)))
        return _square(value)

    def finish(total: Expr, i: Index) -> Expr:
        base = call("add", const(bias, total), call("mul", total, const(alpha / size, total)))
        return call("div", b.at(x, i), call("pow", base, const(beta, total)))

    b.reduce(b.output(node), b.shape(x), (size,), element, "add", finish)
