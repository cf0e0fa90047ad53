"""Operators that only move elements."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from lrcompile.dataflow.expr import Call, Const, Expr, Load, Position, as_index, call, cast
from lrcompile.dataflow.index import Sum, constant, flatten, unflatten
from lrcompile.graphs.onnx.formulas.builder import (
    Builder,
    Index,
    Shape,
    axis_of,
    broadcast,
    integer,
    integers,
    op,
    text,
)
from lrcompile.graphs.onnx.formulas.pointwise import compare, const, select


def reshape(b: Builder, node: ir.Node, x: str, shape: Shape) -> None:
    """The same elements in C order under another shape; of a constant, another constant."""
    array = b.array(x)
    if array is not None:
        b.constant(b.output(node), array.reshape(shape))
        return
    old = b.shape(x)
    b.define(b.output(node), shape, lambda i: b.at(x, unflatten(flatten(i, shape), old)))


def declared(b: Builder, node: ir.Node) -> Shape | None:
    """The static shape that the file states for the output of a node."""
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(each, int) for each in shape):
        return None
    return tuple(int(each) for each in shape)  # type: ignore[arg-type]


@op("Reshape")
def _reshape(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    target = b.array(b.given(node, 1))
    if "shape" in node.attributes:
        target = np.array(integers(node, "shape"))
    if target is None:
        shape = declared(b, node)
        if shape is None:
            raise b.refuse(node, "the shape must be constant")
    else:
        zero = integer(node, "allowzero")
        old = b.shape(x)
        wanted = [old[at] if n == 0 and not zero else int(n) for at, n in enumerate(target.tolist())]
        known = prod(n for n in wanted if n != -1)
        shape = tuple(prod(old) // max(known, 1) if n == -1 else n for n in wanted)
    reshape(b, node, x, shape)


@op("Flatten")
def _flatten(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    shape = b.shape(x)
    axis = integer(node, "axis", 1)
    axis += len(shape) if axis < 0 else 0
    reshape(b, node, x, (prod(shape[:axis]), prod(shape[axis:])))


@op("Squeeze", "Unsqueeze")
def _squeeze(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    axes = integers(node, "axes")
    if axes is None and b.given(node, 1) is not None:
        found = b.array(b.given(node, 1))
        if found is None:
            shape = declared(b, node)
            if shape is None:
                raise b.refuse(node, "the axes must be constant")
            return reshape(b, node, x, shape)
        axes = [int(each) for each in found.reshape(-1)]
    old = b.shape(x)
    if node.op_type == "Squeeze":
        gone = {at for at, n in enumerate(old) if n == 1} if axes is None else {each % len(old) for each in axes}
        shape = tuple(n for at, n in enumerate(old) if at not in gone)
    else:
        rank = len(old) + len(axes or ())
        new = {each % rank for each in axes or ()}
        rest = iter(old)
        shape = tuple(1 if at in new else next(rest) for at in range(rank))
    return reshape(b, node, x, shape)


@op("Transpose")
def _transpose(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    order = integers(node, "perm") or list(range(len(old)))[::-1]
    array = b.array(x)
    if array is not None:
        b.constant(b.output(node), np.ascontiguousarray(array.transpose(order)))
        return
    back = np.argsort(order)
    b.define(b.output(node), tuple(old[each] for each in order), lambda i: b.at(x, [i[at] for at in back]))


@op("Expand")
def _expand(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    target = b.array(b.given(node, 1))
    shape = declared(b, node) if target is None else broadcast(b.shape(x), tuple(int(n) for n in target))
    if shape is None:
        raise b.refuse(node, "the shape must be constant")
    b.define(b.output(node), shape, lambda i: b.spread(x, i))


@op("Tile")
def _tile(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    repeats = b.array(b.given(node, 1))
    shape = declared(b, node) if repeats is None else tuple(n * int(r) for n, r in zip(old, repeats, strict=True))
    if shape is None:
        raise b.refuse(node, "the repeats must be constant")
    b.define(b.output(node), shape, lambda i: b.at(x, [each % n for each, n in zip(i, old, strict=True)]))


@op("Concat")
def _concat(b: Builder, node: ir.Node) -> None:
    pieces = [b.need(node, at) for at in range(len(node.inputs))]
    first = list(b.shape(pieces[0]))
    axis = integer(node, "axis") % len(first)
    first[axis] = sum(b.shape(each)[axis] for each in pieces)
    b.join(b.output(node), tuple(first), axis, pieces)


@op("Slice")
def _slice(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    if "starts" in node.attributes:
        starts, ends, axes, steps = integers(node, "starts"), integers(node, "ends"), integers(node, "axes"), None
    else:
        found = [b.known(node, at, "starts, ends, axes and steps") for at in range(1, 5)]
        starts, ends, axes, steps = (None if each is None else each.reshape(-1).tolist() for each in found)
    assert starts is not None and ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    picked = [range(n) for n in old]
    for at, axis in enumerate(axes):
        picked[axis] = range(old[axis])[starts[at] : ends[at] : steps[at] if steps else 1]
    _pick(b, node, b.output(node), x, picked)


def _pick(b: Builder, node: ir.Node, value: str | None, x: str, picked: list[range]) -> None:
    array = b.array(x)
    if array is not None and value is not None:
        b.constant(value, np.ascontiguousarray(array[np.ix_(*[list(each) for each in picked])]))
        return
    shape = tuple(map(len, picked))
    b.define(value, shape, lambda i: b.at(x, [at * r.step + r.start for at, r in zip(i, picked, strict=True)]))


@op("Split")
def _split(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    axis = axis_of(node, len(old), 0)
    sizes = integers(node, "split")
    if sizes is None:
        found = b.known(node, 1, "split")
        sizes = None if found is None else [int(each) for each in found]
    if sizes is None:
        count = integer(node, "num_outputs", len(node.outputs))
        size = -(-old[axis] // count)
        sizes = [min(size, old[axis] - at * size) for at in range(count)]
    first = 0
    for at, size in enumerate(sizes):
        picked = [range(first, first + size) if each == axis else range(n) for each, n in enumerate(old)]
        _pick(b, node, b.output(node, at), x, picked)
        first += size


def wrapped(index: Expr, extent: int) -> Expr:
    """An index of which negative values count from the end."""
    if isinstance(index, Const):
        return Const(int(index.value) % extent, index.dtype)
    return select(compare("lt", index, const(0, index)), call("add", index, const(extent, index)), index)


@op("Gather")
def _gather(b: Builder, node: ir.Node) -> None:
    x, where = b.need(node, 0), b.need(node, 1)
    old, inner = b.shape(x), b.shape(where)
    axis = axis_of(node, len(old), 0)
    shape = old[:axis] + inner + old[axis + 1 :]
    array = b.array(where)
    steps = None if array is None else _regular(array.reshape(-1) % old[axis])

    def formula(i: Index) -> Expr:
        own = i[axis : axis + len(inner)]
        if steps is not None:
            at = flatten(own, inner) * steps[1] + steps[0]
        else:
            at = as_index(_nonnegative(b, where, own, old[axis]))
        return b.at(x, [*i[:axis], at, *i[axis + len(inner) :]])

    b.define(b.output(node), shape, formula)


def _nonnegative(b: Builder, where: str, index: Index, extent: int) -> Expr:
    """An element of a tensor of indices; a constant one is cleaned at once."""
    array = b.array(where)
    if array is not None and (array < 0).any():
        where = b.constant(None, array % extent)
        array = b.array(where)
    found = b.at(where, index)
    if array is not None or found.dtype.startswith("uint"):
        return found
    return found if b.trusted_indices else wrapped(found, extent)


def _regular(indices: np.ndarray) -> tuple[int, int] | None:
    """(start, step) of evenly spaced indices."""
    if indices.size == 0:
        return None
    if indices.size == 1:
        return int(indices[0]), 0
    steps = np.unique(np.diff(indices))
    return (int(indices[0]), int(steps[0])) if steps.size == 1 else None


@op("GatherElements")
def _gather_elements(b: Builder, node: ir.Node) -> None:
    x, where = b.need(node, 0), b.need(node, 1)
    axis = axis_of(node, len(b.shape(x)), 0)

    def formula(i: Index) -> Expr:
        at = as_index(_nonnegative(b, where, i, b.shape(x)[axis]))
        return b.at(x, [*i[:axis], at, *i[axis + 1 :]])

    b.define(b.output(node), b.shape(where), formula)


@op("GatherND")
def _gather_nd(b: Builder, node: ir.Node) -> None:
    x, where = b.need(node, 0), b.need(node, 1)
    old, inner = b.shape(x), b.shape(where)
    batch, depth = integer(node, "batch_dims"), inner[-1]
    shape = inner[:-1] + old[batch + depth :]

    def formula(i: Index) -> Expr:
        head, tail = i[: len(inner) - 1], i[len(inner) - 1 :]
        at = [as_index(_nonnegative(b, where, (*head, constant(k)), old[batch + k])) for k in range(depth)]
        return b.at(x, [*head[:batch], *at, *tail])

    b.define(b.output(node), shape, formula)


@op("ReverseSequence")
def _reverse_sequence(b: Builder, node: ir.Node) -> None:
    x, lengths = b.need(node, 0), b.need(node, 1)
    batch, time = integer(node, "batch_axis", 1), integer(node, "time_axis", 0)

    def formula(i: Index) -> Expr:
        length, at = b.at(lengths, [i[batch]]), Position(i[time], b.dtype(lengths))
        back = call("sub", call("sub", length, const(1, length)), at)
        where = as_index(select(compare("lt", at, length), back, at))
        return b.at(x, [where if k == time else each for k, each in enumerate(i)])

    b.define(b.output(node), b.shape(x), formula)


@op("Pad")
def _pad(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    old = b.shape(x)
    pads = integers(node, "pads")
    if pads is None:
        found = b.known(node, 1, "pads")
        pads = [] if found is None else [int(each) for each in found]
    axes = b.known(node, 3, "axes")
    chosen = [int(a) % len(old) for a in axes] if axes is not None else list(range(len(old)))
    before, after = [0] * len(old), [0] * len(old)
    for at, axis in enumerate(chosen):
        before[axis], after[axis] = pads[at], pads[at + len(chosen)]
    shape = tuple(n + lo + hi for n, lo, hi in zip(old, before, after, strict=True))
    value, mode = b.given(node, 2), text(node, "mode", "constant")

    def formula(i: Index) -> Expr:
        moved = [each - lo for each, lo in zip(i, before, strict=True)]
        if mode == "wrap":
            return b.at(x, [each % n for each, n in zip(moved, old, strict=True)])
        if mode in ("edge", "reflect"):
            return b.at(x, [_folded(each, n, mode) for each, n in zip(moved, old, strict=True)])
        number = Const(node.attributes["value"].as_float() if "value" in node.attributes else 0, b.dtype(x))
        fill = number if value is None else b.at(value, () if not b.shape(value) else (constant(0),))
        return inside(b, x, moved, fill)

    b.define(b.output(node), shape, formula)


def _folded(index: Sum, extent: int, mode: str) -> Sum:
    at: Expr = Position(index)
    last = const(extent - 1, at)
    if mode == "edge":
        return as_index(call("min", call("max", at, const(0, at)), last))
    at = call("abs", at)
    return as_index(call("sub", last, call("abs", call("sub", at, last)))) if extent > 1 else constant(0)


def inside(b: Builder, x: str, index: list[Sum], fill: Expr) -> Expr:
    """An element, or ``fill`` where the index is out of range."""
    from lrcompile.dataflow.index import bounds

    value: Expr = Load(x, tuple(index), b.dtype(x))
    condition: Expr | None = None
    for each, extent in zip(index, b.shape(x), strict=True):
        low, high = bounds(each) or (0, extent - 1)
        at = Position(each)
        tests = [compare("ge", at, const(0, at))] if low < 0 else []
        tests += [compare("lt", at, const(extent, at))] if high >= extent else []
        for test in tests:
            condition = test if condition is None else Call("and", (condition, test), "bool")
    return value if condition is None else Call("guard", (condition, value, fill), value.dtype)


@op("DepthToSpace", "SpaceToDepth")
def _depth(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    n, c, h, w = b.shape(x)
    k = integer(node, "blocksize")
    if node.op_type == "SpaceToDepth" and text(node, "mode", "DCR") != "DCR":
        raise b.refuse(node, "the mode CRD has no formula")
    if node.op_type == "SpaceToDepth":
        split, order, shape = (n, c, h // k, k, w // k, k), (0, 3, 5, 1, 2, 4), (n, c * k * k, h // k, w // k)
    elif text(node, "mode", "DCR") == "DCR":
        split, order, shape = (n, k, k, c // k**2, h, w), (0, 3, 4, 1, 5, 2), (n, c // k**2, h * k, w * k)
    else:
        split, order, shape = (n, c // k**2, k, k, h, w), (0, 1, 4, 2, 5, 3), (n, c // k**2, h * k, w * k)
    between = tuple(split[each] for each in order)
    back = np.argsort(order)

    def formula(i: Index) -> Expr:
        moved = unflatten(flatten(i, shape), between)
        return b.at(x, unflatten(flatten(tuple(moved[each] for each in back), split), b.shape(x)))

    b.define(b.output(node), shape, formula)


@op("Trilu")
def _trilu(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    found = b.known(node, 1, "k")
    k = 0 if found is None else int(found)
    name = "ge" if integer(node, "upper", 1) else "le"

    def formula(i: Index) -> Expr:
        value = b.at(x, i)
        return select(compare(name, Position(i[-1] - i[-2]), Const(k, "int32")), value, const(0, value))

    b.define(b.output(node), b.shape(x), formula)


@op("OneHot")
def _one_hot(b: Builder, node: ir.Node) -> None:
    where, values = b.need(node, 0), b.need(node, 2)
    depth_of = b.array(b.given(node, 1))
    inner = b.shape(where)
    axis = integer(node, "axis", -1)
    axis += len(inner) + 1 if axis < 0 else 0
    if depth_of is None:
        shape = declared(b, node)
        if shape is None:
            raise b.refuse(node, "the depth must be constant")
        depth = shape[axis]
    else:
        depth = int(depth_of.reshape(-1)[0])

    def formula(i: Index) -> Expr:
        at = cast(b.at(where, [*i[:axis], *i[axis + 1 :]]), "int32")
        hot = compare("eq", wrapped(at, depth), Position(i[axis]))
        return select(hot, b.at(values, [constant(1)]), b.at(values, [constant(0)]))

    b.define(b.output(node), (*inner[:axis], depth, *inner[axis:]), formula)


@op("EyeLike")
def _eye(b: Builder, node: ir.Node) -> None:
    x = b.need(node, 0)
    from lrcompile.graphs.onnx.formulas.pointwise import _numpy

    dtype = _numpy(b, node, integer(node, "dtype")) if "dtype" in node.attributes else b.dtype(x)
    rows, columns = b.shape(x)
    b.constant(b.output(node), np.eye(rows, columns, integer(node, "k"), dtype=dtype))
