"""What may follow a linear map and belongs to it: scales, sums, selections, norms with fixed statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.constants import FLOATS, constant, integers
from lrcompile.graphs.onnx.match import Match, path_dtype, together
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import Diagonal, LinearOperator, Product, Scaled, Select, Stack, Sum

if TYPE_CHECKING:
    from lrcompile.graphs.onnx.raising import Raiser

_EPSILON = 1e-5  # BatchNormalization's own default


def _add(raiser: Raiser, node: ir.Node) -> Match | None:
    """Two linear maps of one value: an un-merged adapter, or a sum that was lowered."""
    left, right = raiser.affine(node.inputs[0]), raiser.affine(node.inputs[1])
    if left is None or right is None or left.source is not right.source or left.axis != right.axis:
        return None
    if left.operator.shape != right.operator.shape or left.window != right.window:
        return None
    terms = _terms(left.operator) + _terms(right.operator)
    nodes = (*left.nodes, *right.nodes, node)
    offset = together(left.offset, right.offset)
    return replace(left, root=node.outputs[0], operator=Sum(terms), nodes=nodes, offset=offset)


def _terms(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _mul(raiser: Raiser, node: ir.Node) -> Match | None:
    """A constant scale after a linear map: one number, or one per channel."""
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        tensor = constant(other)
        if tensor is not None and tensor.dtype in FLOATS:
            return _rescaled(raiser.affine(value), node, to_torch(tensor))
    return None


def _div(raiser: Raiser, node: ir.Node) -> Match | None:
    """A linear map over a constant."""
    tensor = constant(node.inputs[1])
    if tensor is None or tensor.dtype not in FLOATS:
        return None
    scale = to_torch(tensor)
    inverse = (1.0 / scale.double()).to(scale.dtype)
    return _rescaled(raiser.affine(node.inputs[0]), node, inverse) if bool(inverse.isfinite().all()) else None


def _rescaled(match: Match | None, node: ir.Node, scale: Tensor) -> Match | None:
    """The map times a number (0-d), or times a vector along its channels."""
    if match is None:
        return None
    spatial = 0 if match.window is None else match.window.rank
    channels = match.operator.shape[0]
    operator: LinearOperator
    if scale.ndim == 0 or tuple(scale.shape) == (1,):
        operator = Scaled(scale.reshape(()), match.operator)
    elif channels > 1 and tuple(scale.shape) == (channels, *[1] * spatial):
        operator = Product(Diagonal(scale.reshape(-1)), match.operator)
    else:
        return None
    offset = None if match.offset is None else match.offset.double() * scale.reshape(-1).double()
    return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node), offset=offset)


def _batch_norm(raiser: Raiser, node: ir.Node) -> Match | None:
    """A norm with fixed statistics after a convolution, or after a map of a matrix."""
    match = raiser.affine(node.inputs[0]) if len(node.outputs) == 1 else None
    if match is None or node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1):
        return None
    shape = match.root.shape or node.outputs[0].shape  # of equal rank
    if match.axis != 1 and (shape is None or len(shape) != 2):
        return None
    constants = [constant(value) for value in node.inputs[1:5]]
    vectors = [to_torch(tensor).double() for tensor in constants if tensor is not None and tensor.dtype in FLOATS]
    if len(vectors) != 4 or any(tuple(vector.shape) != match.operator.shape[:1] for vector in vectors):
        return None
    gain, bias, mean, variance = vectors
    scale = gain / (variance + node.attributes.get_float("epsilon", _EPSILON)).sqrt()
    if not bool(scale.isfinite().all()):
        return None
    offset = bias - mean * scale if match.offset is None else (match.offset.double() - mean) * scale + bias
    operator = Product(Diagonal(scale.to(path_dtype(match))), match.operator)
    return replace(match, root=node.outputs[0], operator=operator, nodes=(*match.nodes, node), offset=offset)


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
    if any(part.window != first.window for part in matches):
        return None
    nodes = tuple(inner for part in matches for inner in part.nodes)
    operator = Stack(tuple(part.operator for part in matches))
    return replace(first, root=node.outputs[0], operator=operator, nodes=(*nodes, node))


RULES: dict[tuple[str, str], tuple[Callable[[Raiser, ir.Node], Match | None], int]] = {
    ("", "Add"): (_add, 2),  # with the number of inputs that it needs
    ("", "Mul"): (_mul, 2),
    ("", "Div"): (_div, 2),
    ("", "BatchNormalization"): (_batch_norm, 5),
    ("", "Gather"): (_gather, 2),
    ("", "Concat"): (_concat, 1),
}
