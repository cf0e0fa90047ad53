"""Operators that multiply and add over windows: matrix products, convolutions, pooling."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.dataflow.expr import Call, Const, Expr, Position, call, cast
from lrcompile.dataflow.index import Sum, constant
from lrcompile.graphs.onnx.formulas.builder import Builder, Index, Shape, broadcast, integer, integers, number, op, text
from lrcompile.graphs.onnx.formulas.moving import inside
from lrcompile.graphs.onnx.formulas.pointwise import const
from lrcompile.graphs.onnx.formulas.sparse import sparse, sparse_product

Change = Callable[[Expr, Sequence[Sum]], Expr]


def matmul(
    b: Builder,
    node: ir.Node,
    value: str | None,
    x: str,
    y: str,
    left: Change | None = None,
    right: Change | None = None,
) -> str:
    """A product under numpy's rule; ``left`` and ``right`` change elements before they are multiplied."""
    one, two = b.shape(x), b.shape(y)
    a, c = (1, *one) if len(one) == 1 else one, (*two, 1) if len(two) == 1 else two
    batch = broadcast(a[:-2], c[:-2])
    whole = (*batch, a[-2], c[-1])
    shape = whole
    if len(one) == 1:
        shape = (*shape[:-2], shape[-1])
    if len(two) == 1:
        shape = shape[:-1]

    def element(i: Index, inner: Index) -> Expr:
        rest = list(i)
        column = constant(0) if len(two) == 1 else rest.pop()
        row = constant(0) if len(one) == 1 else rest.pop()
        first = [*_own(rest, a[:-2]), row, inner[0]][len(a) - len(one) :]
        second = [*_own(rest, c[:-2]), inner[0], column][: len(two)]
        p, q = b.at(x, first), b.at(y, second)
        p = left(p, first) if left is not None else p
        q = right(q, second) if right is not None else q
        return call("mul", p, q)

    if one[-1] != c[-2]:
        raise b.refuse(node, f"shapes {one} and {two} do not fit")
    return b.reduce(value, shape, (one[-1],), element)


def _own(index: list[Sum], shape: Shape) -> list[Sum]:
    own = index[len(index) - len(shape) :]
    return [constant(0) if n == 1 else each for n, each in zip(shape, own, strict=True)]


@op("MatMul")
def _matmul(b: Builder, node: ir.Node) -> None:
    x, y = b.need(node, 0), b.need(node, 1)
    fits = len(b.shape(y)) == 2 and b.shape(x)[-1:] == b.shape(y)[:1]
    if not (fits and sparse_product(b, b.output(node), x, y)):
        matmul(b, node, b.output(node), x, y)


@op("MatMulInteger")
def _matmul_integer(b: Builder, node: ir.Node) -> None:
    zeros = (b.given(node, 2), b.given(node, 3))

    def minus(zero: str | None, row: bool) -> Change:
        def change(value: Expr, index: Sequence[Sum]) -> Expr:
            wide = cast(value, "int32")
            if zero is None:
                return wide
            at = [] if not b.shape(zero) else [constant(0) if b.shape(zero) == (1,) else index[-2 if row else -1]]
            return call("sub", wide, cast(b.at(zero, at), "int32"))

        return change

    left, right = minus(zeros[0], True), minus(zeros[1], False)
    matmul(b, node, b.output(node), b.need(node, 0), b.need(node, 1), left, right)


@op("Gemm")
def _gemm(b: Builder, node: ir.Node) -> None:
    x, y, c = b.need(node, 0), b.need(node, 1), b.given(node, 2)
    flip = integer(node, "transA"), integer(node, "transB")
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    one, two = b.shape(x)[:: -1 if flip[0] else 1], b.shape(y)[:: -1 if flip[1] else 1]

    few = None if flip[0] else sparse(b, y, bool(flip[1]))

    def element(i: Index, inner: Index) -> Expr:
        if few is not None:
            return few.term(x, i[:1], i[1:], inner)
        first, second = (i[0], inner[0]), (inner[0], i[1])
        return call("mul", b.at(x, first[:: -1 if flip[0] else 1]), b.at(y, second[:: -1 if flip[1] else 1]))

    def finish(total: Expr, i: Index) -> Expr:
        if alpha != 1:
            total = call("mul", total, const(alpha, total))
        if c is None:
            return total
        extra = b.spread(c, i)
        return call("add", total, extra if beta == 1 else call("mul", extra, const(beta, extra)))

    extent = one[1] if few is None else few.most
    b.reduce(b.output(node), (one[0], two[1]), (extent,), element, "add", finish)


@op("Einsum")
def _einsum(b: Builder, node: ir.Node) -> None:
    equation = text(node, "equation").replace(" ", "")
    tensors = [b.need(node, at) for at in range(len(node.inputs))]
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    letters = iter(sorted(set(string.ascii_letters) - set(equation)))
    ranks = [len(b.shape(t)) - len(term.replace("...", "")) for term, t in zip(terms, tensors, strict=True)]
    dots = "".join(next(letters) for _ in range(max(ranks) if "..." in equation else 0))
    terms = [t.replace("...", dots[len(dots) - r :] if r else "") for t, r in zip(terms, ranks, strict=True)]
    if "->" in equation:
        output = output.replace("...", dots)
    else:
        joined = "".join(terms)
        output = dots + "".join(sorted(c for c in set(joined) - set(dots) if joined.count(c) == 1))
    extents: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, n in zip(term, b.shape(tensor), strict=True):
            extents[letter] = max(extents.get(letter, 1), n)
    inner_letters = [letter for letter in extents if letter not in output]

    def element(i: Index, inner: Index) -> Expr:
        where = dict(zip(output, i, strict=True)) | dict(zip(inner_letters, inner, strict=True))
        value: Expr | None = None
        for term, tensor in zip(terms, tensors, strict=True):
            index = [constant(0) if n == 1 else where[letter] for letter, n in zip(term, b.shape(tensor), strict=True)]
            factor = b.at(tensor, index)
            value = factor if value is None else call("mul", value, factor)
        assert value is not None
        return value

    shape = tuple(extents[letter] for letter in output)
    if not inner_letters:
        b.define(b.output(node), shape, lambda i: element(i, ()))
    else:
        b.reduce(b.output(node), shape, tuple(extents[letter] for letter in inner_letters), element)


# -- windows ---------------------------------------------------------------------------------------


class Windows:
    """Geometry of a convolution or pooling: where a window stands for each output position."""

    def __init__(self, node: ir.Node, spatial: Shape, kernel: Shape) -> None:
        rank = len(spatial)
        self.kernel = kernel
        self.strides = integers(node, "strides") or [1] * rank
        self.dilations = integers(node, "dilations") or [1] * rank
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, kernel, strict=True)]
        self.before, self.after = self._pads(node, spatial, reach)
        self.shape = self._shape(node, spatial, reach)

    def _pads(self, node: ir.Node, spatial: Shape, reach: list[int]) -> tuple[list[int], list[int]]:
        rank = len(spatial)
        mode = text(node, "auto_pad", "NOTSET")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(spatial, self.strides, reach, strict=True)
            ]
            small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
            return (small, large) if mode == "SAME_UPPER" else (large, small)
        pads = integers(node, "pads") if mode == "NOTSET" else None
        pads = pads or [0] * (2 * rank)
        return pads[:rank], pads[rank:]

    def _shape(self, node: ir.Node, spatial: Shape, reach: list[int]) -> Shape:
        result = []
        for at, n in enumerate(spatial):
            room = n + self.before[at] + self.after[at] - reach[at]
            steps = room // self.strides[at]
            if integer(node, "ceil_mode"):
                steps = -(-room // self.strides[at])
                if steps * self.strides[at] >= n + self.before[at]:  # a window must begin inside
                    steps -= 1
            result.append(steps + 1)
        return tuple(result)

    def at(self, position: Index, inner: Index) -> list[Sum]:
        """The index in the input for an output position and an offset in the window."""
        return [
            p * s + k * d - lo
            for p, s, k, d, lo in zip(position, self.strides, inner, self.dilations, self.before, strict=True)
        ]


@op("Conv", "ConvInteger")
def _conv(b: Builder, node: ir.Node) -> None:
    x, w = b.need(node, 0), b.need(node, 1)
    whole = node.op_type == "ConvInteger"
    bias = None if whole else b.given(node, 2)
    zeros = (b.given(node, 2), b.given(node, 3)) if whole else (None, None)
    n, channels, *spatial = b.shape(x)
    outputs, per_group, *kernel = b.shape(w)
    groups = integer(node, "group", 1)
    windows = Windows(node, tuple(spatial), tuple(kernel))
    if per_group * groups != channels:
        raise b.refuse(node, f"{channels} channels do not fit a kernel of {per_group} in {groups} groups")

    def element(i: Index, inner: Index) -> Expr:
        group = i[1] // (outputs // groups)
        index = [i[0], group * per_group + inner[0], *windows.at(i[2:], inner[1:])]
        fill: Expr = const(0, b.at(x, index))
        if whole and zeros[0]:
            fill = b.at(zeros[0], ())
        value, weight = inside(b, x, index, fill), b.at(w, [i[1], *inner])
        if whole:
            value, weight = (
                _minus(b, value, zeros[0], []),
                _minus(b, weight, zeros[1], [] if not zeros[1] or not b.shape(zeros[1]) else [i[1]]),
            )
        return call("mul", value, weight)

    def finish(total: Expr, i: Index) -> Expr:
        return total if bias is None else call("add", total, b.at(bias, [i[1]]))

    b.reduce(b.output(node), (n, outputs, *windows.shape), (per_group, *kernel), element, "add", finish)


def _minus(b: Builder, value: Expr, zero: str | None, index: list[Sum]) -> Expr:
    wide = cast(value, "int32")
    return wide if zero is None else call("sub", wide, cast(b.at(zero, index), "int32"))


@op("ConvTranspose")
def _conv_transpose(b: Builder, node: ir.Node) -> None:
    x, w, bias = b.need(node, 0), b.need(node, 1), b.given(node, 2)
    n, channels, *spatial = b.shape(x)
    _, per_group, *kernel = b.shape(w)
    groups, rank = integer(node, "group", 1), len(spatial)
    strides, dilations = integers(node, "strides") or [1] * rank, integers(node, "dilations") or [1] * rank
    extra = integers(node, "output_padding") or [0] * rank
    full = [
        s * (m - 1) + e + d * (k - 1) + 1
        for s, m, e, d, k in zip(strides, spatial, extra, dilations, kernel, strict=True)
    ]
    wanted = integers(node, "output_shape")
    mode = text(node, "auto_pad", "NOTSET")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [m * s for m, s in zip(spatial, strides, strict=True)]
    if wanted is not None:
        totals = [f - t for f, t in zip(full, wanted[-rank:], strict=True)]
        before = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals]
        shape = tuple(wanted[-rank:])
    else:
        pads = integers(node, "pads") or [0] * (2 * rank)
        before = pads[:rank]
        shape = tuple(f - lo - hi for f, lo, hi in zip(full, before, pads[rank:], strict=True))
    inputs = channels // groups

    def element(i: Index, inner: Index) -> Expr:
        group = i[1] // per_group
        condition: Expr | None = None
        index = [i[0], group * inputs + inner[0]]
        for at in range(rank):
            moved = i[2 + at] + before[at] - inner[1 + at] * dilations[at]
            index.append(moved // strides[at])
            if strides[at] > 1:
                hit = Call("eq", (Position(moved % strides[at]), Const(0, "int32")), "bool")
                condition = hit if condition is None else Call("and", (condition, hit), "bool")
        value = inside(b, x, index, const(0, b.at(x, index)))
        if condition is not None:
            value = Call("guard", (condition, value, const(0, value)), value.dtype)
        return call("mul", value, b.at(w, [group * inputs + inner[0], i[1] % per_group, *inner[1:]]))

    def finish(total: Expr, i: Index) -> Expr:
        return total if bias is None else call("add", total, b.at(bias, [i[1]]))

    b.reduce(b.output(node), (n, per_group * groups, *shape), (inputs, *kernel), element, "add", finish)


@op("MaxPool", "AveragePool", "LpPool")
def _pool(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    n, channels, *spatial = b.shape(x)
    kernel = tuple(integers(node, "kernel_shape") or ())
    windows = Windows(node, tuple(spatial), kernel)
    if b.output(node, 1) is not None:
        raise b.refuse(node, "the output Indices has no formula")
    kind = node.op_type
    like = Const(0, b.dtype(x))
    fill: Expr = const(0, like)
    if kind == "MaxPool":
        floating = b.dtype(x).startswith("float")
        fill = Const(-np.inf if floating else int(np.iinfo(b.dtype(x)).min), b.dtype(x))
    power = integer(node, "p", 2)

    def element(i: Index, inner: Index) -> Expr:
        value = inside(b, x, [i[0], i[1], *windows.at(i[2:], inner)], fill)
        if kind != "LpPool":
            return value
        return call("mul", value, value) if power == 2 else call("pow", call("abs", value), const(power, value))

    def finish(total: Expr, i: Index) -> Expr:
        if kind == "LpPool":
            return call("sqrt", total) if power == 2 else call("pow", total, const(1 / power, total))
        return (
            call("div", total, _count(b, node, windows, i, tuple(spatial), total)) if kind == "AveragePool" else total
        )

    shape = (n, channels, *windows.shape)
    b.reduce(b.output(node), shape, kernel, element, "max" if kind == "MaxPool" else "add", finish)


def _count(b: Builder, node: ir.Node, windows: Windows, i: Index, spatial: Shape, like: Expr) -> Expr:
    """How many elements an average is over: those inside, or the whole window up to the padded border."""
    include = integer(node, "count_include_pad")
    total: Expr | None = None
    for at, extent in enumerate(spatial):
        first = i[2 + at] * windows.strides[at] - windows.before[at]
        low, high = (-windows.before[at], extent + windows.after[at]) if include else (0, extent)
        size = _overlap(first, windows.kernel[at], windows.dilations[at], low, high)
        total = size if total is None else call("mul", total, size)
    assert total is not None
    if isinstance(total, Const):
        return const(float(total.value), like)
    return cast(total, like.dtype)


def _overlap(first: Sum, kernel: int, dilation: int, low: int, high: int) -> Expr:
    """How many of ``first + dilation k`` lie in [low, high)."""
    from lrcompile.dataflow.index import bounds

    ends = bounds(first) or (0, 0)
    if ends[0] >= low and ends[1] + dilation * (kernel - 1) < high:
        return Const(kernel, "int32")
    total: Expr = Const(0, "int32")
    for k in range(kernel):
        at = Position(first + k * dilation)
        hit = Call("and", (_bool("ge", at, low), _bool("lt", at, high)), "bool")
        total = call("add", total, cast(hit, "int32"))
    return total


def _bool(name: str, at: Expr, limit: int) -> Expr:
    return Call(name, (at, Const(limit, "int32")), "bool")
