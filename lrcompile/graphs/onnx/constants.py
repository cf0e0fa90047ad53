"""Constant values as operators: what a weight is, before anything is multiplied with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import Dense, LinearOperator, Quantized, transpose

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

    _operators: dict[tuple[int, bool | str], LinearOperator | None] = field(default_factory=dict)
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

    def once(self, value: ir.Value, make: Callable[[], LinearOperator | None]) -> LinearOperator | None:
        """An operator that is made of ``value`` in another way, the same one each time."""
        key = (id(value), "made")
        if key not in self._operators:
            self._alive.append(value)
            self._operators[key] = make()
        return self._operators[key]

    def _leaf(self, tensor: Tensor) -> Dense:
        if id(tensor) not in self._leaves:
            self._alive.append(tensor)
            self._leaves[id(tensor)] = Dense(tensor)
        return self._leaves[id(tensor)]

    def _transpose(self, operator: LinearOperator) -> LinearOperator:
        """Transposes once: the same leaf always gives the same transposed leaf, and back."""
        if id(operator) not in self._twins:
            twin = turned(operator)
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
        from lrcompile.graphs.onnx.computed import RULES

        node = value.producer()
        rule = RULES.get((node.domain, node.op_type)) if node is not None else None
        return rule(node) if rule is not None and node is not None else None


def _fingerprint(tensor: Tensor) -> tuple:
    """Equal for a matrix and its transpose; reads a handful of entries only."""
    size = min(tensor.shape)
    if size == 0:
        return (tuple(sorted(tensor.shape)), str(tensor.dtype))
    spots = torch.linspace(0, size - 1, min(size, 8)).long()
    diagonal = tensor[spots, spots].double().tolist()
    return (tuple(sorted(tensor.shape)), str(tensor.dtype), *map(repr, diagonal))


def turned(operator: LinearOperator) -> LinearOperator:
    """The transpose; codes with a single scale stay codes, since rows and columns are alike there."""
    match operator:
        case Quantized(codes=codes, scale=scale, zero=zero) if scale.stride() == (0, 0):
            size = codes.shape[1]
            grids = [None if grid is None else grid[:1].expand(size, 1) for grid in (scale, zero)]
            assert grids[0] is not None
            return Quantized(codes.T, grids[0], grids[1], codes.shape[0], operator.bits)
        case _:
            return transpose(operator)
