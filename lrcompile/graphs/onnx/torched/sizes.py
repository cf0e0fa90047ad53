"""Small integer tensors as numbers of Python, which may be free sizes: what drives shapes is never data to torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.torched.table import dtype_of, filling

MOST = 64
"""Numbers that a value may hold to be kept this way."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True, eq=False)
class Sizes:
    """A tensor whose numbers are known while a program is traced.

    Attributes:
        items: ``int``, ``float`` or ``torch.SymInt`` in the shape of the tensor, of NumPy's type ``object``.
        dtype: of the tensor.
    """

    items: np.ndarray
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Sizes | None:
        """What a constant holds; None where it is large, or holds several fractions."""
        if tensor.numel() > MOST or (tensor.dtype not in _INTEGERS and tensor.numel() != 1):
            return None
        return Sizes(objects(tensor.reshape(-1).tolist(), tuple(tensor.shape)), tensor.dtype)

    @property
    def plain(self) -> bool:
        """Whether no number depends on a free size."""
        return all(isinstance(item, int | float) for item in self.items.reshape(-1))

    def tensor(self) -> Tensor:
        """The tensor; with free sizes it is made of one operation for each number."""
        flat = list(self.items.reshape(-1))
        if self.plain and len(flat) != 1:
            return torch.tensor(flat, dtype=self.dtype).reshape(self.items.shape)
        numbers = [torch.full((), item, dtype=self.dtype) for item in flat]
        return torch.stack(numbers).reshape(self.items.shape) if self.items.ndim else numbers[0]


def objects(items: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in an array of objects; NumPy must not look into them."""
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    return array.reshape(shape)


def shape_of(node: ir.Node, x: Tensor | Sizes) -> Sizes:
    """What Shape and Size give."""
    shape = list(x.items.shape if isinstance(x, Sizes) else x.shape)
    if node.op_type == "Size":
        return Sizes(objects([prod(shape)], ()), torch.int64)
    part = shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
    return Sizes(objects(part, (len(part),)), torch.int64)


def computed(node: ir.Node, operands: list[Sizes | None]) -> Sizes | None:
    """The output of a node in numbers; None where it must be computed by torch."""
    known = [each for each in operands if each is not None]
    rule = None if node.domain else _RULES.get(node.op_type)
    if rule is None or not known or any(each.dtype not in _INTEGERS for each in known):
        return None
    result = rule(node, *[None if each is None else each.items for each in operands])
    if result is None or result.size > MOST:
        return None
    return Sizes(result, _type(node, known[-1].dtype))


def _type(node: ir.Node, dtype: torch.dtype) -> torch.dtype:
    if node.op_type == "ConstantOfShape":
        return filling(node)[1]
    if node.op_type == "Cast":
        return dtype_of(node.attributes["to"].as_int())
    return torch.bool if node.op_type in ("Equal", "Less", "Greater", "Not", "And", "Or") else dtype


def _plain(*arrays: np.ndarray | None) -> bool:
    return all(isinstance(item, int) for array in arrays if array is not None for item in array.reshape(-1))


def _each(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """An operation on numbers, over arrays that are broadcast."""

    def apply(node: ir.Node, *arrays: np.ndarray) -> np.ndarray:
        spread = np.broadcast_arrays(*arrays)
        columns = zip(*(each.reshape(-1) for each in spread), strict=True)
        return objects([function(*column) for column in columns], spread[0].shape)

    return apply


def _quotient(node: ir.Node, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Division towards zero, which is division downwards for sizes."""
    if any(isinstance(item, int) and item < 0 for array in (a, b) for item in array.reshape(-1)):
        return None
    return _each(lambda x, y: x // y)(node, a, b)


def _cast(node: ir.Node, x: np.ndarray) -> np.ndarray | None:
    target = dtype_of(node.attributes["to"].as_int())
    return x if target in (torch.int64, torch.int32) else None


def _axes(node: ir.Node, axes: np.ndarray | None) -> tuple[int, ...]:
    return tuple(axes.reshape(-1)) if axes is not None else tuple(node.attributes.get_ints("axes", []))


def _unsqueeze(node: ir.Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, _axes(node, axes))


def _squeeze(node: ir.Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x, _axes(node, axes) or None)


def _gather(node: ir.Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    if not _plain(indices):
        return None
    found = np.take(x, indices.astype(np.int64), axis=node.attributes.get_int("axis", 0))
    return found if isinstance(found, np.ndarray) else objects([found], ())


def _slice(node: ir.Node, x: np.ndarray, *rest: np.ndarray | None) -> np.ndarray | None:
    if not rest or not _plain(*rest):
        return None
    given = [None if each is None else list(each.reshape(-1)) for each in (*rest, None, None)[:4]]
    starts, ends = given[0] or [], given[1] or []
    for place, start in enumerate(starts):
        axis = given[2][place] if given[2] else place
        step = given[3][place] if given[3] else 1
        where = range(x.shape[axis])[
            slice(start, ends[place] if step > 0 or ends[place] >= -x.shape[axis] else None, step)
        ]
        x = np.take(x, list(where), axis=axis)
    return x


def _concat(node: ir.Node, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=node.attributes["axis"].as_int())


def _reshape(node: ir.Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray | None:
    return x.reshape([int(size) for size in shape]) if _plain(shape) and 0 not in shape else None


def _product(node: ir.Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray | None:
    if x.ndim != 1 or (axes is None and node.attributes.get_int("noop_with_empty_axes", 0)):
        return None
    return objects([prod(x)], (1,) if node.attributes.get_int("keepdims", 1) else ())


def _filled(node: ir.Node, shape: np.ndarray) -> np.ndarray | None:
    number, dtype = filling(node)
    if not _plain(shape) or dtype not in _INTEGERS or prod(shape) > MOST:
        return None
    return objects([number] * prod(shape), tuple(shape))


_RULES: dict[str, Callable[..., np.ndarray | None]] = {
    "Identity": lambda node, x: x,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "ReduceProd": _product,
    "Div": _quotient,
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Neg": _each(lambda a: -a),
    "Min": _each(lambda *all_: _extreme(torch.sym_min, all_)),
    "Max": _each(lambda *all_: _extreme(torch.sym_max, all_)),
    "Equal": _each(lambda a, b: bool(a == b)),  # torch notes a condition where the answer depends on a free size
    "Less": _each(lambda a, b: bool(a < b)),
    "Greater": _each(lambda a, b: bool(a > b)),
    "And": _each(lambda a, b: a and b),
    "Or": _each(lambda a, b: a or b),
    "Not": _each(lambda a: not a),
    "Where": _each(lambda condition, a, b: a if condition else b),
}


def _extreme(function: Callable[[Any, Any], Any], items: tuple[Any, ...]) -> Any:
    first, *rest = items
    for each in rest:
        first = function(first, each)
    return first
