"""Constant values as operators: what a weight is, before anything is multiplied with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import BlockSparse, Dense, LinearOperator, Quantized, Select, SemiSparse, transpose

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for anything computed.

    An initializer that is also a graph input is a default that the caller may override.
    """
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def settle(model: ir.Model) -> None:
    """Makes the weights of a model from before IR version 4 constants, in place.

    There every initializer had to be listed as an input; runtimes take none of them for one.
    """
    if model.ir_version >= 4:
        return
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:
            model.graph.inputs.remove(value)
    model.ir_version = 4


def integers(value: ir.Value | None) -> Tensor | None:
    """A constant integer tensor in the type that it is stored in; a Cast between integers is looked through."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == ("", "Cast"):
        value = node.inputs[0]
    tensor = constant(value)
    return None if tensor is None or not tensor.dtype.is_integer() else to_torch(tensor)


def origin(value: ir.Value) -> tuple[ir.Value, bool]:
    """What stands behind Identity and matrix Transpose nodes, and whether it is turned on the way."""
    turned = False
    for _ in range(64):
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Identity", "Transpose") or node.inputs[0] is None:
            break
        if node.op_type == "Transpose":
            permutation = node.attributes.get("perm")
            if permutation is not None and list(permutation.as_ints()) != [1, 0]:
                break
            turned = not turned
        value = node.inputs[0]
    return value, turned


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
        value, turned = origin(value)
        key = (id(value), transposed != turned)
        if key not in self._operators:
            self._alive.append(value)
            stored = self._stored(value)
            self._operators[key] = stored if stored is None or transposed == turned else self._transpose(stored)
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


def _dequantize_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """Codes (out, in) with a scale per row, or per row and block of columns."""
    values = [tensor for tensor in map(constant, node.inputs) if tensor is not None]
    if len(values) < 2 or len(values) != len(node.inputs):
        return None
    codes, scale = to_torch(values[0]), to_torch(values[1])
    zero = to_torch(values[2]) if len(values) > 2 else None
    if codes.ndim != 2 or codes.dtype not in (torch.int8, torch.uint8):
        return None
    axis = node.attributes.get_int("axis", 1) % 2
    block = node.attributes.get_int("block_size", 0)
    bits = 4 if values[0].dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8
    if block and axis == 1 and scale.ndim == 2:
        return Quantized(codes, scale, zero, block, bits)
    if not block and axis == 0 and scale.ndim == 1:
        return Quantized(codes, scale[:, None], None if zero is None else zero[:, None], codes.shape[1], bits)
    return None


def _filled(value: ir.Value | None) -> tuple[tuple[int, ...], float] | None:
    """Shape and number of a tensor that holds one number everywhere."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == ("", "ConstantOfShape"):
        shape, fill = integers(node.inputs[0]), node.attributes.get("value")
        if shape is None:
            return None
        return tuple(shape.tolist()), 0.0 if fill is None else float(to_torch(fill.as_tensor()).reshape(()))
    tensor = constant(value)
    if tensor is None or tensor.dtype not in FLOATS or tensor.size == 0:
        return None
    first = to_torch(tensor).reshape(-1)
    return (tuple(tensor.shape.numpy()), float(first[0])) if bool((first == first[0]).all()) else None


def _within(index: Tensor, size: int) -> bool:
    return index.numel() == 0 or (int(index.min()) >= 0 and int(index.max()) < size)


def _scatter_elements_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """A fixed number of entries in each row, scattered into zeros; a single one in each row picks."""
    zeros, index, ones = _filled(node.inputs[0]), integers(node.inputs[1]), _filled(node.inputs[2])
    if zeros is None or zeros[1] != 0 or len(zeros[0]) != 2 or node.attributes.get_int("axis", 0) not in (1, -1):
        return None
    (rows, columns), _ = zeros
    if index is None or index.ndim != 2 or index.shape[0] != rows or not _within(index, columns):
        return None
    stored = constant(node.inputs[2])
    if stored is None and ones is not None and ones == ((rows, 1), 1.0):
        return Select(index[:, 0], columns)
    if stored is None or stored.dtype not in FLOATS or tuple(stored.shape) != tuple(index.shape):
        return None
    return SemiSparse(to_torch(stored), index, columns)


def _blocks_rule(constants: Constants, node: ir.Node) -> LinearOperator | None:
    """``Reshape(Transpose(ScatterND(zeros, places, blocks)))``: blocks on a grid."""
    swap = node.inputs[0].producer() if node.inputs[0] is not None else None
    if swap is None or swap.op_type != "Transpose" or list(swap.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    scatter = swap.inputs[0].producer() if swap.inputs[0] is not None else None
    if scatter is None or scatter.op_type != "ScatterND":
        return None
    zeros, places, stored = _filled(scatter.inputs[0]), integers(scatter.inputs[1]), constant(scatter.inputs[2])
    if zeros is None or zeros[1] != 0 or len(zeros[0]) != 4 or places is None or stored is None:
        return None
    down, across, height, width = zeros[0]
    if tuple(stored.shape) != (len(places), height, width) or tuple(places.shape) != (len(places), 2):
        return None
    rows, columns = places[:, 0].contiguous(), places[:, 1].contiguous()
    if not (_within(rows, down) and _within(columns, across)):
        return None
    return BlockSparse(to_torch(stored), rows, columns, (down, across))


_RULES: dict[tuple[str, str], Callable[[Constants, ir.Node], LinearOperator | None]] = {
    ("", "DequantizeLinear"): _dequantize_rule,
    ("", "ScatterElements"): _scatter_elements_rule,
    ("", "Reshape"): _blocks_rule,
}
