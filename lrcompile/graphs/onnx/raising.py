"""ONNX nodes to linear operators: the largest constant-linear expression around each weight.

``Raiser.sites()`` walks the nodes backwards, so that the last node of an expression is met
first; what it absorbs is not matched again. An interior value that somebody else reads, or
that is an output of the graph, ends an expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from lrcompile.graphs.onnx.constants import Constants, constant, integers, scalar
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import (
    Dense,
    Diagonal,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    as_scale,
    leaves,
)
from lrcompile.sites import Window

MAX_NODES = 64
"""An expression stops growing here, so that a long chain of scales stays linear in cost."""


@dataclass(frozen=True, eq=False)
class Match:
    """A linear map that a few nodes compute.

    ``root = operator(source) (+ bias)``; ``axis`` is the channel axis of ``source``: -1, 1 for
    a convolution, 0 where a Gemm reads its input by columns.
    """

    source: ir.Value
    root: ir.Value
    operator: LinearOperator
    nodes: tuple[ir.Node, ...]
    weight: ir.Value | None = None
    kind: str = "MatMul"
    axis: int = -1
    window: Window | None = None
    bias: ir.Value | None = None  # inside the last node (Gemm's C, Conv's B)
    beta: float = 1.0
    adder: ir.Node | None = None  # a following Add of a constant vector


def _private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


class Raiser:
    """Matches over one graph; equal weights give identical leaves."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.constants = Constants()
        self._matches: dict[int, Match | None] = {}

    def sites(self) -> list[Match]:
        """All linear maps in order of execution, none inside another."""
        for node in self.graph:  # in order, so that a match finds the ones before it in the table
            if len(node.outputs) == 1:
                self.match(node.outputs[0])
        absorbed: set[int] = set()
        found: list[Match] = []
        for node in reversed(self.graph):
            if id(node) in absorbed or len(node.outputs) != 1:
                continue
            match = self.match(node.outputs[0])
            if match is not None and _has_weight(match.operator):
                absorbed.update(map(id, match.nodes))
                found.append(_with_adder(match))
        return found[::-1]

    def match(self, value: ir.Value) -> Match | None:
        """The linear map that ends in ``value``, or None."""
        if id(value) not in self._matches:
            node = value.producer()
            rule = _RULES.get((node.domain, node.op_type)) if node is not None else None
            self._matches[id(value)] = rule(self, node) if rule is not None and node is not None else None
        return self._matches[id(value)]

    def inner(self, value: ir.Value | None) -> Match | None:
        """The linear map before ``value``, where nobody else reads the value."""
        if value is None or not _private(value):
            return None
        match = self.match(value)
        if match is None or match.bias is not None or len(match.nodes) > MAX_NODES:
            return None
        return match


def _has_weight(operator: LinearOperator) -> bool:
    return any(isinstance(leaf, Dense | Quantized | SemiSparse) for leaf in leaves(operator))


def _with_adder(match: Match) -> Match:
    """Finds the bias that a following Add brings."""
    if match.bias is not None or not _private(match.root):
        return match
    ((node, _),) = match.root.uses()
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or match.axis == 1:
        return match
    other = node.inputs[1] if node.inputs[0] is match.root else node.inputs[0]
    tensor = constant(other)
    if tensor is None or len(tensor.shape) != 1 or tensor.size != match.operator.shape[0]:
        return match
    return replace(match, adder=node, bias=other)


def _chain(raiser: Raiser, source: ir.Value, match: Match) -> Match:
    """Puts what comes before ``source`` into the match, where it is linear too."""
    before = raiser.inner(source)
    if before is None or before.axis != match.axis:
        return match
    if match.window is not None and any(stride != 1 for stride in match.window.strides):
        return match
    return replace(
        match,
        source=before.source,
        operator=Product(match.operator, before.operator),
        nodes=(*before.nodes, *match.nodes),
        weight=match.weight or before.weight,
        window=before.window,
    )


def _matmul(raiser: Raiser, node: ir.Node) -> Match | None:
    source, weight = node.inputs
    if source is None or weight is None or constant(source) is not None:
        return None
    operator = raiser.constants.operator(weight, transposed=True)
    if operator is None:
        return None
    return _chain(raiser, source, Match(source, node.outputs[0], operator, (node,), _origin(weight)))


def _origin(weight: ir.Value) -> ir.Value:
    """The stored value behind Transpose and Identity nodes, which has the better name."""
    node = weight.producer()
    while node is not None and node.op_type in ("Transpose", "Identity") and node.inputs[0] is not None:
        weight = node.inputs[0]
        node = weight.producer()
    return weight


def _gemm(raiser: Raiser, node: ir.Node) -> Match | None:
    source, weight = node.inputs[:2]
    if source is None or weight is None or constant(source) is not None:
        return None
    attributes = node.attributes
    operator = raiser.constants.operator(weight, transposed=not attributes.get_int("transB", 0))
    if operator is None:
        return None
    alpha = attributes.get_float("alpha", 1.0)
    if alpha != 1.0:
        operator = _scaled(operator, alpha)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    beta = attributes.get_float("beta", 1.0)
    axis = 0 if attributes.get_int("transA", 0) else -1
    root = node.outputs[0]
    match = Match(source, root, operator, (node,), _origin(weight), "Gemm", axis, bias=bias, beta=beta)
    return match if axis == 0 else _chain(raiser, source, match)


def _scaled(operator: LinearOperator, factor: float) -> LinearOperator:
    like = next((leaf.weight for leaf in leaves(operator) if isinstance(leaf, Dense)), torch.zeros(()))
    return Scaled(as_scale(factor, like), operator)


def _conv(raiser: Raiser, node: ir.Node) -> Match | None:
    """A convolution with a 1×1 kernel; anything wider is not a matrix on the channels."""
    source, weight = node.inputs[:2]
    tensor = constant(weight)
    if source is None or weight is None or tensor is None or len(tensor.shape) < 3:
        return None
    shape = [int(size) for size in tensor.shape]
    attributes = node.attributes
    pads = attributes.get("pads")
    padded = (pads is not None and any(pads.as_ints())) or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    if any(size != 1 for size in shape[2:]) or attributes.get_int("group", 1) != 1 or padded:
        return None
    strides = attributes.get("strides")
    window = Window(tuple(shape[2:]), tuple(strides.as_ints()) if strides is not None else (1,) * len(shape[2:]))
    operator = raiser.constants.matrix(to_torch(tensor).reshape(shape[0], shape[1]))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    match = Match(source, node.outputs[0], operator, (node,), weight, "Conv", 1, window, bias=bias)
    return _chain(raiser, source, match)


def _add(raiser: Raiser, node: ir.Node) -> Match | None:
    """Two linear maps of one value: an un-merged adapter, or a sum that was lowered."""
    left, right = raiser.inner(node.inputs[0]), raiser.inner(node.inputs[1])
    if left is None or right is None or left.source is not right.source or left.axis != right.axis:
        return None
    if left.operator.shape != right.operator.shape or not _same_window(left, right):
        return None
    terms = _terms(left.operator) + _terms(right.operator)
    nodes = (*left.nodes, *right.nodes, node)
    return replace(left, root=node.outputs[0], operator=Sum(terms), nodes=nodes)


def _same_window(left: Match, right: Match) -> bool:
    if left.window is None or right.window is None:
        return left.window is right.window
    return left.window.strides == right.window.strides


def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _mul(raiser: Raiser, node: ir.Node) -> Match | None:
    """A constant scale after a linear map: one number, or one per channel."""
    for value, other in (node.inputs, node.inputs[::-1]):
        if other is None or constant(other) is None:
            continue
        match = raiser.inner(value)
        if match is None or match.axis != -1:
            return None
        number, tensor = scalar(other), constant(other)
        if number is not None and tensor is not None and len(tensor.shape) == 0:
            operator: LinearOperator = Scaled(to_torch(tensor), match.operator)
        else:
            vector = raiser.constants.vector(other, match.operator.shape[0])
            if vector is None:
                return None
            operator = Product(Diagonal(vector), match.operator)
        return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node))
    return None


def _gather(raiser: Raiser, node: ir.Node) -> Match | None:
    """Channels picked from the output of a linear map."""
    indices = integers(node.inputs[1])
    match = raiser.inner(node.inputs[0])
    if indices is None or match is None or node.attributes.get_int("axis", 0) != match.axis or match.axis == 0:
        return None
    size = match.operator.shape[0]
    indices = torch.where(indices < 0, indices + size, indices)
    operator = Product(Select(indices, size), match.operator)
    return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node))


def _concat(raiser: Raiser, node: ir.Node) -> Match | None:
    """Linear maps of one value, side by side."""
    parts = [raiser.inner(value) for value in node.inputs]
    matches = [part for part in parts if part is not None]
    first = matches[0] if matches else None
    if first is None or len(matches) != len(parts) or node.attributes.get_int("axis", 0) != first.axis:
        return None
    if first.axis == 0 or any(part.source is not first.source or not _same_window(part, first) for part in matches):
        return None
    nodes = tuple(inner for part in matches for inner in part.nodes)
    operator = Stack(tuple(part.operator for part in matches))
    return replace(first, root=node.outputs[0], operator=operator, nodes=(*nodes, node))


_RULES: dict[tuple[str, str], Callable[[Raiser, ir.Node], Match | None]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Add"): _add,
    ("", "Mul"): _mul,
    ("", "Gather"): _gather,
    ("", "Concat"): _concat,
}


def describe(match: Match) -> str:
    """The operator types that a site is written with, for reports."""
    kinds = dict.fromkeys(node.op_type for node in match.nodes)
    return "+".join(kinds)


def dense_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes inside subgraphs that hold a matrix weight; they pass through unchanged."""
    for node in graph.all_nodes():
        if node.graph is not graph and node.op_type in ("MatMul", "Gemm"):
            yield node
