"""What a quantised graph is made of: groups of nodes between two rounded values, found on the graph itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lrcompile.graphs.onnx.constants import FLOATS, constant

MOVES = frozenset(
    [
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Flatten", "Identity", "Expand", "Tile"),
        *("Gather", "Concat"),
    ]
)
"""Operators that only move elements: codes pass through them."""
UNARY = frozenset(
    [
        *("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "Exp", "Log", "Sqrt", "Neg", "Abs", "HardSwish", "HardSigmoid"),
        *("Softplus", "Softsign", "Elu", "Selu", "LeakyRelu", "Celu", "Clip", "Reciprocal", "Floor", "Ceil", "Round"),
        *("Sin", "Cos", "Mish", "Swish", "Sign", "ThresholdedRelu", "Shrink"),
    ]
)
BINARY = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"])
PRODUCTS = frozenset(["MatMul", "Gemm", "Conv"])


def kind(node: ir.Node | None) -> str:
    """The operator's name where it is one of the standard, else nothing."""
    return "" if node is None or node.domain not in ("", "ai.onnx") else node.op_type


def array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """A constant that is one number."""
    tensor = constant(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def is_float(value: ir.Value) -> bool:
    """Whether a value holds floating-point numbers, as far as the graph says."""
    return value.dtype in FLOATS


def single(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, where it is the only one."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs that are there."""
    return [value for value in node.inputs if value is not None]


def source_of(node: ir.Node) -> ir.Value | None:
    """The one computed input of an elementwise node whose other inputs are single numbers, else None."""
    if kind(node) not in UNARY | BINARY:
        return None
    computed = [value for value in inputs(node) if scalar(value) is None]
    distinct = list(dict.fromkeys(computed))
    if len(distinct) != 1 or constant(distinct[0]) is not None:
        return None
    return distinct[0]


class Functions:
    """Which values are functions of one other value, element by element: GELU written out, a ReLU, a power."""

    def __init__(self, graph: ir.Graph) -> None:
        self.root: dict[ir.Value, ir.Value] = {}
        for node in graph:
            root = self._root(node)
            if root is not None:
                self.root[node.outputs[0]] = root

    def _root(self, node: ir.Node) -> ir.Value | None:
        if kind(node) not in UNARY | BINARY or in_chain(node):
            return None
        computed = [value for value in inputs(node) if scalar(value) is None]
        roots = {self.root.get(value, value) for value in computed}
        if len(roots) != 1 or any(constant(value) is not None for value in computed):
            return None
        return roots.pop()

    def inside(self, value: ir.Value) -> bool:
        """Whether a value is an intermediate of such a function, read by nothing else."""
        root = self.root.get(value)
        if root is None or value.is_graph_output() or not list(value.uses()):
            return False
        return all(self.root.get(use.node.outputs[0]) is root for use in value.uses())


def in_chain(node: ir.Node) -> bool:
    """Whether a node only scales a product, or adds a bias to one."""
    if kind(node) in ("Mul", "Div"):
        source = source_of(node)
        divides = kind(node) == "Div" and node.inputs[0] is not source
        return source is not None and not divides and single(source) is node and _is_chain(source.producer())
    if kind(node) == "Add":
        terms = [value for value in inputs(node) if constant(value) is None]
        bias = [value for value in inputs(node) if constant(value) is not None]
        if len(terms) != 1 or len(bias) != 1 or single(terms[0]) is not node:
            return False
        return _is_bias(array(bias[0])) and kind(terms[0].producer()) in ("MatMul",) and _has_weight(terms[0])
    return False


def _is_chain(node: ir.Node | None) -> bool:
    return kind(node) in PRODUCTS or (node is not None and kind(node) in ("Add", "Mul", "Div") and in_chain(node))


def _is_bias(values: np.ndarray | None) -> bool:
    return values is not None and values.size == values.shape[-1] if values is not None and values.ndim else False


def _has_weight(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and len(node.inputs) > 1 and behind(node.inputs[1]) is not None


def behind(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is, or that it is the decoded form of."""
    if constant(value) is not None:
        return value
    node = value.producer() if value is not None else None
    if kind(node) == "DequantizeLinear" and node is not None and constant(node.inputs[0]) is not None:
        return node.inputs[0]
    return None


@dataclass(frozen=True, eq=False)
class Chain:
    """A product with what scales and shifts it.

    Args:
        node: the MatMul, Gemm or Conv.
        bias: per output channel, already multiplied; None without one.
        factor: what the product is multiplied by.
    """

    node: ir.Node
    bias: np.ndarray | None
    factor: float


def chain(value: ir.Value) -> Chain | None:
    """The product that a value ends, or None."""
    factor, bias = 1.0, None
    node = value.producer()
    while node is not None and kind(node) not in PRODUCTS:
        if not in_chain(node):
            return None
        if kind(node) == "Add":
            vector = next(array(each) for each in node.inputs if constant(each) is not None)
            assert vector is not None
            bias = vector.reshape(-1).astype(np.float64) * factor
            source = next(each for each in inputs(node) if constant(each) is None)
        else:
            source = source_of(node)
            number = next(found for found in map(scalar, node.inputs) if found is not None)
            factor *= number if kind(node) == "Mul" else 1 / number
        assert source is not None
        node = source.producer()
    if node is None:
        return None
    if kind(node) != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
        own = array(behind(node.inputs[2]))
        if own is None or constant(node.inputs[2]) is None:
            return None
        bias = own.reshape(-1).astype(np.float64) * factor + (0.0 if bias is None else bias)
    return Chain(node, bias, factor)
