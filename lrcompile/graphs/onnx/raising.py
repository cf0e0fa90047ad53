"""ONNX nodes to linear operators: the largest constant-linear expression around each weight.

``Raiser.sites()`` walks the nodes backwards, so that the last node of an expression is met
first; what it absorbs is not matched again. An interior value that somebody else reads, or
that is an output of the graph, ends an expression. Constants that are added on the way through
become an offset at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.errors import InvalidInputError
from lrcompile.graphs.onnx import after
from lrcompile.graphs.onnx.computed import packed_blocks, quantized_kernel
from lrcompile.graphs.onnx.constants import FLOATS, Constants, constant, integers, origin
from lrcompile.graphs.onnx.match import MAX_NODES, Match, bodies, describe, has_weight, path_dtype, private, together
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import (
    BlockSparse,
    Dense,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Scaled,
    apply,
    as_scale,
    leaves,
    simplify,
)
from lrcompile.sites import Window

__all__ = ["Match", "Raiser", "all_matches", "describe", "path_dtype"]


def all_matches(graph: ir.Graph) -> list[Match]:
    """The linear maps of a graph, then those of the bodies in it; one stored matrix is one leaf everywhere."""
    constants = Constants()
    found: list[Match] = []
    waiting: list[tuple[ir.Graph, ir.Node | None]] = [(graph, None)]
    while waiting:
        body, owner = waiting.pop()
        found += [replace(match, owner=owner) for match in Raiser(body, constants).sites()]
        waiting += [(inner, node) for node in body for inner in bodies(node)]
    return found


class Raiser:
    """Matches over one graph, its bodies left out; equal weights give identical leaves."""

    def __init__(self, graph: ir.Graph, constants: Constants | None = None) -> None:
        self.graph = graph
        self.constants = constants or Constants()
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
            if match is not None and has_weight(match.operator):
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
        """The linear map before ``value``, where nobody else reads the value and no constant is added."""
        match = self._before(value)
        return None if match is None or match.bias is not None or match.offset is not None else match

    def affine(self, value: ir.Value | None) -> Match | None:
        """The linear map before ``value``; what it adds is an offset then, and no bias any more."""
        match = self._before(value)
        if match is None and value is not None and private(value):
            match = self._before_adder(value)
        if match is None or match.bias is None:
            return match
        added = _vector(match.bias, match.operator.shape[0])
        if added is None:
            return None
        offset = together(match.offset, added.double() * match.beta)
        return replace(match, bias=None, beta=1.0, adder=None, offset=offset)

    def _before(self, value: ir.Value | None) -> Match | None:
        if value is None or not private(value):
            return None
        match = self.match(value)
        return None if match is None or match.refused or len(match.nodes) > MAX_NODES else match

    def _before_adder(self, value: ir.Value) -> Match | None:
        """A map that a following Add gives its bias, with that Add among its nodes."""
        node = value.producer()
        if node is None or (node.domain, node.op_type) != ("", "Add"):
            return None
        for inner in node.inputs[:2]:
            match = self._before(inner)
            match = None if match is None else _with_adder(match)
            if match is not None and match.adder is node:
                return replace(match, root=value, nodes=(*match.nodes, node))
        return None


def _with_adder(match: Match) -> Match:
    """Finds the bias that a following Add brings."""
    if match.bias is not None or not private(match.root):
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


def _vector(value: ir.Value, size: int) -> Tensor | None:
    """A constant that is added to every channel vector, (size,)."""
    tensor = constant(value)
    if tensor is None or (tensor.size != 1 and (tensor.size != size or tensor.shape[-1] != size)):
        return None
    return to_torch(tensor).reshape(-1).expand(size)


def _chain(raiser: Raiser, source: ir.Value, match: Match) -> Match:
    """Puts what comes before ``source`` into the match, where it is linear too."""
    before = raiser.affine(source)
    if before is None or before.axis != match.axis:
        return match
    joined = _joined(match, before)
    if joined is None:
        return match
    operator, window = joined
    offset = match.offset
    if before.offset is not None:
        wide = before.offset.double().repeat_interleave(match.window.places if match.window else 1)
        offset = together(offset, apply(match.operator, wide))
    return replace(
        match,
        source=before.source,
        operator=operator,
        nodes=(*before.nodes, *match.nodes),
        weight=match.weight or before.weight,
        window=window,
        offset=offset,
    )


def _joined(match: Match, before: Match) -> tuple[LinearOperator, Window | None] | None:
    """The product of a map and the one before it, and its window, where the two are one map."""
    if match.window is None or before.window is None:
        return (Product(match.operator, before.operator), None) if match.window is before.window else None
    if match.window.pointwise and not match.window.strided:
        return Product(match.operator, before.operator), before.window
    if before.offset is not None and any(match.window.pads):
        return None  # nothing is added to the zeros around the image
    window = _one_after_the_other(before.window, match.window)
    if window is None:
        return None
    kept = Kron(before.operator, Identity(match.window.places))
    return Product(match.operator, simplify(kept) if match.window.places == 1 else kept), window


def _one_after_the_other(first: Window, second: Window) -> Window | None:
    """The window that two make together, where each has axes of its own and ``first`` the leading ones."""
    axes = zip(first.kernel, second.kernel, strict=True)
    rank = first.rank
    whole = Window(
        tuple(a * b for a, b in axes),
        tuple(a * b for a, b in zip(first.strides, second.strides, strict=True)),
        tuple(a + b for a, b in zip(first.pads, second.pads, strict=True)),
        tuple(max(a, b) for a, b in zip(first.dilations, second.dilations, strict=True)),
    )
    return whole if rank == second.rank and whole.split(second.places) == (first, second) else None


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
    """A convolution is a matrix on the patches that its window reads."""
    source, weight = node.inputs[:2]
    groups = node.attributes.get_int("group", 1)
    shape, operator = _kernel(raiser, weight, groups)
    if source is None or weight is None or operator is None or constant(source) is not None:
        return None
    window, refused = _window(node, shape[2:])
    if window is None:
        return None
    if groups != 1:
        refused = f"a convolution in {groups} groups"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    match = Match(source, node.outputs[0], operator, (node,), weight, "Conv", 1, window, bias=bias, refused=refused)
    return match if refused else _chain(raiser, source, match)


def _window(node: ir.Node, kernel: tuple[int, ...]) -> tuple[Window | None, str]:
    """The geometry of a Conv node, and why it cannot be rewritten where that is so."""
    rank = len(kernel)

    def numbers(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        attribute = node.attributes.get(name)
        return tuple(attribute.as_ints()) if attribute is not None else default

    strides, dilations = numbers("strides", (1,) * rank), numbers("dilations", (1,) * rank)
    pads = numbers("pads", (0, 0) * rank)
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    refused = ""
    if automatic.startswith("SAME"):
        if any(step != 1 for step in strides):
            refused = f"its padding depends on the size of the image (auto_pad {automatic}, steps above 1)"
        total = [(size - 1) * spread for size, spread in zip(kernel, dilations, strict=True)]
        less, more = [size // 2 for size in total], [size - size // 2 for size in total]
        pads = (*less, *more) if automatic == "SAME_UPPER" else (*more, *less)
    if len(strides) != rank or len(pads) != 2 * rank or len(dilations) != rank or min(pads, default=0) < 0:
        return None, ""
    return Window(kernel, strides, pads if any(pads) else (), dilations), refused


def _kernel(raiser: Raiser, weight: ir.Value | None, groups: int) -> tuple[tuple[int, ...], LinearOperator | None]:
    """Shape of a kernel, and the matrix (out, in * places) that it is; groups stand on its diagonal."""
    tensor = constant(weight)
    if tensor is not None and len(tensor.shape) >= 3 and tensor.dtype in FLOATS:
        shape = tuple(tensor.shape.numpy())
        if groups == 1:
            return shape, raiser.constants.matrix(to_torch(tensor).reshape(shape[0], -1))
        if groups < 1 or shape[0] % groups:
            return (), None
        diagonal = torch.arange(groups)
        return shape, BlockSparse(
            to_torch(tensor).reshape(groups, shape[0] // groups, -1), diagonal, diagonal, (groups, groups)
        )
    node = None if weight is None or groups != 1 else weight.producer()
    if node is None or node.domain or node.op_type not in ("Reshape", "DequantizeLinear") or node.inputs[0] is None:
        return (), None
    if node.op_type == "DequantizeLinear":
        shape, codes = quantized_kernel(node)
        return shape, raiser.constants.once(weight, lambda: codes) if weight is not None else None
    wanted, operator = integers(node.inputs[1]), raiser.constants.operator(node.inputs[0], transposed=False)
    if wanted is None or operator is None or len(wanted) < 3 or int(wanted[0]) != operator.shape[0]:
        return (), None
    return (tuple(wanted.tolist()), operator) if int(wanted[1:].prod()) == operator.shape[1] else ((), None)


def _matmul_nbits(raiser: Raiser, node: ir.Node) -> Match | None:
    """ONNX Runtime's product with packed codes in blocks."""
    source, weight = node.inputs[:2]
    if source is None or weight is None or constant(source) is not None:
        return None
    operator = raiser.constants.once(weight, lambda: packed_blocks(node))
    if operator is None:
        return None
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    return _chain(raiser, source, Match(source, node.outputs[0], operator, (node,), weight, "MatMulNBits", bias=bias))


Rule = Callable[[Raiser, ir.Node], Match | None]

_RULES: dict[tuple[str, str], tuple[Rule, int]] = {
    ("", "MatMul"): (_matmul, 2),  # with the number of inputs that it needs
    ("", "Gemm"): (_gemm, 2),
    ("", "Conv"): (_conv, 2),
    ("com.microsoft", "MatMulNBits"): (_matmul_nbits, 3),
    **after.RULES,
}
