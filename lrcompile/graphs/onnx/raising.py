"""ONNX nodes to linear operators: the largest constant-linear expression around each weight.

``Raiser.sites()`` walks the nodes backwards, so that the last node of an expression is met
first; what it absorbs is not matched again. An interior value that somebody else reads, or
that is an output of the graph, ends an expression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from lrcompile.errors import InvalidInputError
from lrcompile.graphs.onnx.constants import FLOATS, Constants, constant, integers, origin
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import (
    BlockSparse,
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
    tensors,
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
            self._matches[id(value)] = self._matched(value.producer())
        return self._matches[id(value)]

    def _matched(self, node: ir.Node | None) -> Match | None:
        rule, arity = _RULES.get((node.domain, node.op_type), (None, 0)) if node is not None else (None, 0)
        if node is None or rule is None or len(node.inputs) < arity:
            return None
        try:
            return rule(self, node)
        except (InvalidInputError, TypeError, ValueError):  # attributes or shapes that the operator does not allow
            return None

    def inner(self, value: ir.Value | None) -> Match | None:
        """The linear map before ``value``, where nobody else reads the value."""
        if value is None or not _private(value):
            return None
        match = self.match(value)
        if match is None or match.bias is not None or len(match.nodes) > MAX_NODES:
            return None
        return match


def _has_weight(operator: LinearOperator) -> bool:
    return any(isinstance(leaf, BlockSparse | Dense | Quantized | SemiSparse) for leaf in leaves(operator))


def _with_adder(match: Match) -> Match:
    """Finds the bias that a following Add brings."""
    if match.bias is not None or not _private(match.root):
        return match
    ((node, _),) = match.root.uses()
    if (node.domain, node.op_type) != ("", "Add") or len(node.inputs) != 2 or match.axis == 1:
        return match
    if node.graph is not match.nodes[-1].graph:  # inside the body of an If or Loop
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
    source, weight = node.inputs[:2]
    if source is None or weight is None or constant(source) is not None:
        return None
    operator = raiser.constants.operator(weight, transposed=True)
    if operator is None:
        return None
    return _chain(raiser, source, Match(source, node.outputs[0], operator, (node,), origin(weight)[0]))


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
    match = Match(source, root, operator, (node,), origin(weight)[0], "Gemm", axis, bias=bias, beta=beta)
    return match if axis == 0 else _chain(raiser, source, match)


def _scaled(operator: LinearOperator, factor: float) -> LinearOperator:
    like = next((leaf.weight for leaf in leaves(operator) if isinstance(leaf, Dense)), torch.zeros(()))
    return Scaled(as_scale(factor, like), operator)


def _conv(raiser: Raiser, node: ir.Node) -> Match | None:
    """A convolution with a 1×1 kernel; anything wider is not a matrix on the channels."""
    source, weight = node.inputs[:2]
    shape, operator = _kernel(raiser, weight)
    if source is None or weight is None or operator is None or any(size != 1 for size in shape[2:]):
        return None
    attributes = node.attributes
    pads = attributes.get("pads")
    padded = (pads is not None and any(pads.as_ints())) or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    if attributes.get_int("group", 1) != 1 or padded:
        return None
    strides = attributes.get("strides")
    window = Window(shape[2:], tuple(strides.as_ints()) if strides is not None else (1,) * len(shape[2:]))
    if len(window.strides) != window.rank:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    match = Match(source, node.outputs[0], operator, (node,), weight, "Conv", 1, window, bias=bias)
    return _chain(raiser, source, match)


def _kernel(raiser: Raiser, weight: ir.Value | None) -> tuple[tuple[int, ...], LinearOperator | None]:
    """Shape of a kernel, and the matrix that it is where its window is a single place."""
    tensor = constant(weight)
    if tensor is not None and len(tensor.shape) >= 3 and tensor.dtype in FLOATS:
        shape = tuple(tensor.shape.numpy())
        single = all(size == 1 for size in shape[2:])
        return shape, raiser.constants.matrix(to_torch(tensor).reshape(shape[:2])) if single else None
    node = None if weight is None else weight.producer()
    if node is None or (node.domain, node.op_type) != ("", "Reshape") or node.inputs[0] is None:
        return (), None
    wanted, operator = integers(node.inputs[1]), raiser.constants.operator(node.inputs[0], transposed=False)
    if wanted is None or operator is None or tuple(wanted[:2].tolist()) != operator.shape or len(wanted) < 3:
        return (), None
    return tuple(wanted.tolist()), operator


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
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        tensor = constant(other)
        if tensor is None:
            continue
        match = raiser.inner(value)
        operator = None if match is None else _rescaled(match, to_torch(tensor))
        if match is None or operator is None:
            return None
        return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node))
    return None


def _rescaled(match: Match, scale: torch.Tensor) -> LinearOperator | None:
    """The map times a number (0-d), or times a vector along its channels."""
    if scale.ndim == 0:
        return Scaled(scale, match.operator)
    spatial = 0 if match.window is None else match.window.rank
    if tuple(scale.shape) == (match.operator.shape[0], *[1] * spatial):
        return Product(Diagonal(scale.reshape(-1)), match.operator)
    return Scaled(scale.reshape(()), match.operator) if tuple(scale.shape) == (1,) else None


def _gather(raiser: Raiser, node: ir.Node) -> Match | None:
    """Channels picked from the output of a linear map."""
    indices = integers(node.inputs[1])
    match = raiser.inner(node.inputs[0])
    if indices is None or indices.ndim != 1 or match is None or not _along_channels(node, match):
        return None
    size = match.operator.shape[0]
    if indices.numel() and (int(indices.min()) < -size or int(indices.max()) >= size):
        return None
    if (indices < 0).any():
        indices = torch.where(indices < 0, indices + size, indices)
    operator = Product(Select(indices, size), match.operator)
    return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node))


def _along_channels(node: ir.Node, match: Match) -> bool:
    """Whether the node's ``axis`` is the channel axis of what the match computes."""
    axis = node.attributes.get_int("axis", 0)
    if match.window is not None:
        return axis == 1
    shape = match.root.shape or node.outputs[0].shape  # of equal rank
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _concat(raiser: Raiser, node: ir.Node) -> Match | None:
    """Linear maps of one value, side by side."""
    parts = [raiser.inner(value) for value in node.inputs]
    matches = [part for part in parts if part is not None]
    first = matches[0] if matches else None
    if first is None or len(matches) != len(parts) or not _along_channels(node, first):
        return None
    if any(part.source is not first.source or part.axis != first.axis for part in matches):
        return None
    if any(not _same_window(part, first) for part in matches):
        return None
    nodes = tuple(inner for part in matches for inner in part.nodes)
    operator = Stack(tuple(part.operator for part in matches))
    return replace(first, root=node.outputs[0], operator=operator, nodes=(*nodes, node))


_RULES: dict[tuple[str, str], tuple[Callable[[Raiser, ir.Node], Match | None], int]] = {
    ("", "MatMul"): (_matmul, 2),  # with the number of inputs that it needs
    ("", "Gemm"): (_gemm, 2),
    ("", "Conv"): (_conv, 2),
    ("", "Add"): (_add, 2),
    ("", "Mul"): (_mul, 2),
    ("", "Gather"): (_gather, 2),
    ("", "Concat"): (_concat, 1),
}


def path_dtype(match: Match) -> torch.dtype:
    """The type of what flows through a match, which is the type of its weights."""
    stored = [tensor for _, tensor in tensors(match.operator) if tensor.is_floating_point()]
    return next((tensor.dtype for tensor in stored if tensor.ndim > 0), torch.float32)


def describe(match: Match) -> str:
    """The operator types that a site is written with, for reports."""
    kinds = dict.fromkeys(node.op_type for node in match.nodes)
    return "+".join(kinds)
