"""Constant values as operators: what a weight is, before anything is multiplied with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import BlockSparse, Dense, LinearOperator, Quantized, SemiSparse, transpose

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for anything computed.

    An initializer that is also a graph input is a default that the caller may override.
    """
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def scalar(value: ir.Value | None) -> float | None:
    """The single number of a constant value."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or tensor.dtype not in FLOATS:
        return None
    return float(to_torch(tensor).reshape(()))


def integers(value: ir.Value | None) -> Tensor | None:
    """A constant 1-D integer tensor."""
    tensor = constant(value)
    if tensor is None or len(tensor.shape) != 1 or not tensor.dtype.is_integer():
        return None
    return to_torch(tensor).long()


@dataclass(eq=False)
class Constants:
    """Turns constant values into operators; one stored matrix is one leaf, however it is reached.

    A weight that is stored twice, as it is or transposed, becomes a single leaf as well.
    """

    _operators: dict[tuple[int, bool], LinearOperator | None] = field(default_factory=dict)
    _matrices: dict[tuple, list[Tensor]] = field(default_factory=dict)
    _leaves: dict[int, Dense] = field(default_factory=dict)
    _twins: dict[int, LinearOperator] = field(default_factory=dict)
    _alive: list[object] = field(default_factory=list)  # keeps the ids above from being reused

    def operator(self, value: ir.Value, *, transposed: bool) -> LinearOperator | None:
        """The matrix that ``value`` holds (or its transpose) as an operator, or None."""
        key = (id(value), transposed)
        if key not in self._operators:
            self._alive.append(value)
            stored = self._stored(value)
            self._operators[key] = stored if stored is None or not transposed else self._transpose(stored)
        return self._operators[key]

    def vector(self, value: ir.Value, size: int) -> Tensor | None:
        """A constant that scales the last axis: its ``size`` numbers."""
        tensor = constant(value)
        if tensor is None or tensor.dtype not in FLOATS or tensor.size != size or len(tensor.shape) != 1:
            return None
        return to_torch(tensor)

    def matrix(self, tensor: Tensor) -> LinearOperator:
        """The leaf of a matrix; a matrix with equal content (or transposed so) gives the same leaf."""
        bucket = self._matrices.setdefault(_fingerprint(tensor), [])
        for known in bucket:
            if known.shape == tensor.shape and torch.equal(known, tensor):
                return self._leaf(known)
            if known.shape == tensor.T.shape and torch.equal(known, tensor.T):
                return self._transpose(self._leaf(known))
        bucket.append(tensor)
        return self._leaf(tensor)

    def _leaf(self, tensor: Tensor) -> Dense:
        if id(tensor) not in self._leaves:
            self._alive.append(tensor)
            self._leaves[id(tensor)] = Dense(tensor)
        return self._leaves[id(tensor)]

    def _transpose(self, operator: LinearOperator) -> LinearOperator:
        """Transposes once: the same leaf always gives the same transposed leaf, and back."""
        if id(operator) not in self._twins:
            twin = transpose(operator)
            self._twins[id(operator)] = twin
            self._twins[id(twin)] = operator
            self._alive.extend((operator, twin))
        return self._twins[id(operator)]

    def _stored(self, value: ir.Value) -> LinearOperator | None:
        tensor = constant(value)
        if tensor is not None:
            if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
                return None
            return self.matrix(to_torch(tensor))
        node = value.producer()
        rule = _RULES.get((node.domain, node.op_type)) if node is not None else None
        return rule(self, node) if rule is not None and node is not None else None


def _fingerprint(tensor: Tensor) -> tuple:
    """Equal for a matrix and its transpose; reads a handful of entries only."""
    size = min(tensor.shape)
    if size == 0:
        return (tuple(sorted(tensor.shape)), str(tensor.dtype))
    spots = torch.linspace(0, size - 1, min(size, 8)).long()
    diagonal = tensor[spots, spots].double().tolist()
    return (tuple(sorted(tensor.shape)), str(tensor.dtype), *map(repr, diagonal))


def _transpose_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    permutation = node.attributes.get("perm")
    if permutation is not None and list(permutation.as_ints()) != [1, 0]:
        return None
    source = node.inputs[0]
    return constants.operator(source, transposed=True) if source is not None else None


def _identity_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    source = node.inputs[0]
    return constants.operator(source, transposed=False) if source is not None else None


def _tensors(node: ir.Node) -> Iterator[Tensor | None]:
    for value in node.inputs:
        tensor = constant(value)
        yield None if tensor is None else to_torch(tensor)


def _dequantize_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """Codes (out, in) with a scale per row, or per row and block of columns."""
    codes, scale, zero = (*_tensors(node), None)[:3]
    if codes is None or scale is None or codes.ndim != 2 or (len(node.inputs) > 2 and zero is None):
        return None
    axis = node.attributes.get_int("axis", 1) % 2
    block = node.attributes.get_int("block_size", 0)
    columns = codes.shape[1]
    if block and axis == 1 and scale.ndim == 2:
        return Quantized(codes, scale, zero, block)
    if not block and axis == 0 and scale.ndim == 1:
        return Quantized(codes, scale[:, None], None if zero is None else zero[:, None], columns)
    return None


def _is_zeros(value: ir.Value | None) -> bool:
    tensor = constant(value)
    if tensor is not None:
        return not to_torch(tensor).any()
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "ConstantOfShape":
        return False
    fill = node.attributes.get("value")
    return fill is None or not to_torch(fill.as_tensor()).any()


def _scatter_elements_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """A fixed number of entries in each row, scattered into zeros."""
    data, indices, updates = node.inputs[:3]
    if node.attributes.get_int("axis", 0) not in (1, -1) or not _is_zeros(data):
        return None
    _, index, values = (*_tensors(node),)[:3]
    shape = data.shape if data is not None else None
    if index is None or values is None or shape is None or not isinstance(shape[1], int):
        return None
    if values.shape[0] != shape[0] or values.ndim != 2:
        return None
    return SemiSparse(values, index.long(), shape[1])


def _blocks_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """``Reshape(Transpose(ScatterND(zeros, places, blocks)))``: blocks on a grid."""
    swap = node.inputs[0].producer() if node.inputs[0] is not None else None
    if swap is None or swap.op_type != "Transpose" or list(swap.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    scatter = swap.inputs[0].producer() if swap.inputs[0] is not None else None
    if scatter is None or scatter.op_type != "ScatterND" or not _is_zeros(scatter.inputs[0]):
        return None
    _, places, blocks = (*_tensors(scatter),)[:3]
    shape = scatter.inputs[0].shape if scatter.inputs[0] is not None else None
    if places is None or blocks is None or shape is None:
        return None
    grid = shape.numpy()[:2]
    return BlockSparse(blocks, places[:, 0].contiguous(), places[:, 1].contiguous(), (grid[0], grid[1]))


_RULES: dict[tuple[str, str], Callable[[Constants, ir.Node], LinearOperator | None]] = {
    ("", "Transpose"): _transpose_rule,
    ("", "Identity"): _identity_rule,
    ("", "DequantizeLinear"): _dequantize_rule,
    ("", "ScatterElements"): _scatter_elements_rule,
    ("", "Reshape"): _blocks_rule,
}
