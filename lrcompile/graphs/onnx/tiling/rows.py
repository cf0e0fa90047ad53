"""Which rows of its inputs an operator needs for some rows of its output: one rule for each kind of operator.

A rule answers for one axis of the output: for each input the axis along which the same rows are needed, or None where
all of it is. No answer means that rows cannot be computed one by one along that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import onnx_ir as ir

from lrcompile.graphs.onnx.constants import integers
from lrcompile.graphs.onnx.operators import ELEMENTWISE
from lrcompile.graphs.onnx.tiling.sizes import Size, Sizes, one

Axes = tuple[int | None, ...]
Rule = Callable[[ir.Node, int, Sizes], "Axes | None"]


def rows(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """For rows along ``axis`` of the node's outputs: the axis of each input, None for one that is needed as a whole."""
    rule = _RULES.get((node.domain, node.op_type))
    outputs = [sizes.of(value) for value in node.outputs if value.name]
    if rule is None or not outputs or any(shape is None or axis >= len(shape) for shape in outputs):
        return None
    if len({shape[axis] for shape in outputs if shape is not None}) != 1:
        return None
    found = rule(node, axis, sizes)
    if found is None or not any(each is not None for each in found):
        return None
    return found if all(_fits(node, at, each, outputs[0], axis, sizes) for at, each in enumerate(found)) else None


def _fits(node: ir.Node, at: int, axis: int | None, output: Sequence[Size] | None, along: int, sizes: Sizes) -> bool:
    """Whether an input has as many rows as the output: the last word on every rule."""
    shape = sizes.of(node.inputs[at])
    return axis is None or (shape is not None and output is not None and shape[axis] == output[along])


def _aligned(node: ir.Node, at: int, axis: int, rank: int, sizes: Sizes) -> tuple[int | None, bool]:
    """The axis of an input that broadcasting aligns with ``axis`` of the output, and whether anything is known."""
    shape = sizes.of(node.inputs[at])
    if shape is None:
        return None, False
    own = axis - (rank - len(shape))
    return (None if own < 0 or one(shape[own]) else own), True


def _elementwise(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.outputs[0]) or 0
    found = []
    for at, value in enumerate(node.inputs):
        own, known = (None, True) if value is None else _aligned(node, at, axis, rank, sizes)
        if not known:
            return None
        found.append(own)
    return tuple(found)


def _first(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """The first input row by row, all others as a whole."""
    return (axis, *[None] * (len(node.inputs) - 1))


def _matmul(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank, left, right = (sizes.rank(value) for value in (node.outputs[0], *node.inputs[:2]))
    if rank is None or left is None or right is None or left < 2 or right < 2:
        return None
    others = (None,) * (len(node.inputs) - 2)
    if axis == rank - 1:
        return None  # columns: that would cut weights
    if axis == rank - 2:
        return (left - 2, None, *others)
    return _aligned(node, 0, axis, rank, sizes)[0], _aligned(node, 1, axis, rank, sizes)[0], *others


def _matmul_integer(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    shapes = [sizes.of(value) for value in node.inputs[2:] if value is not None]
    plain = all(shape is not None and all(one(size) for size in shape) for shape in shapes)
    return _matmul(node, axis, sizes) if plain else None


def _but_last(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    return _first(node, axis, sizes) if axis < (sizes.rank(node.outputs[0]) or 0) - 1 else None


def _cumsum(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    along = _listed(node, 1, "axis", sizes.rank(node.inputs[0]) or 1)
    return _first(node, axis, sizes) if along is not None and axis not in along else None


def _gemm(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    if axis != 0 or node.attributes.get_int("transA", 0):
        return None
    addend = _aligned(node, 2, 0, 2, sizes)[0] if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return (0, None, addend)[: len(node.inputs)]


def _along_others(default: int, *, from_axis: bool = False) -> Rule:
    """Operators that mix what lies along one axis; with ``from_axis`` along all from there on."""

    def rule(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
        rank = sizes.rank(node.inputs[0]) or 0
        mixed = (node.attributes.get_int("axis", default) or 0) % max(rank, 1)
        free = axis < mixed if from_axis else axis != mixed
        return _first(node, axis, sizes) if free else None

    return rule


def _softmax(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    version = node.graph.opset_imports.get("", 0) if node.graph is not None else 0
    flattens = version < 13
    return _along_others(1 if flattens else -1, from_axis=flattens)(node, axis, sizes)


def _batch(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """Samples one by one."""
    return _first(node, axis, sizes) if axis == 0 else None


def _convolution(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """Samples, and rows of an image where every output reads one position."""
    if axis == 0:
        return _first(node, 0, sizes)
    kernel = sizes.of(node.inputs[1])
    attributes = node.attributes
    plain = kernel is not None and all(one(size) for size in kernel[2:])
    plain = plain and all(step == 1 for step in attributes.get_ints("strides", ()) or ())
    plain = plain and not any(attributes.get_ints("pads", ()) or ()) and axis > 1
    return _first(node, axis, sizes) if plain else None


def _batch_norm(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    return _first(node, axis, sizes) if axis != 1 and not node.attributes.get_int("training_mode", 0) else None


def _transpose(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    order = node.attributes.get_ints("perm", None)
    rank = sizes.rank(node.inputs[0]) or 0
    return ((list(order) if order else list(range(rank))[::-1])[axis],)


def _reshape(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """The rows that have as much before them in both shapes."""
    before, after = sizes.of(node.inputs[0]), sizes.of(node.outputs[0])
    if before is None or after is None:
        return None
    for own, size in enumerate(before):
        if size == after[axis] and _product(before[:own], size) == _product(after[:axis], size):
            return (own, *[None] * (len(node.inputs) - 1))
    return None


def _product(shape: Sequence[Size], like: Size) -> Size:
    return tuple(prod(size[run] for size in shape) for run in range(len(like)))


def _unsqueeze(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.outputs[0]) or 0
    axes = _listed(node, 1, "axes", rank)
    if axes is None or axis in axes:
        return None
    return (axis - sum(each < axis for each in axes), *[None] * (len(node.inputs) - 1))


def _squeeze(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 0
    axes = _listed(node, 1, "axes", rank)
    if axes is None:
        return None
    kept = [each for each in range(rank) if each not in axes]
    if len(kept) != sizes.rank(node.outputs[0]):
        return None
    return (kept[axis], *[None] * (len(node.inputs) - 1))


def _reduce(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 0
    axes = _listed(node, 1, "axes", rank)
    if not axes:
        return None
    kept = list(range(rank))
    if not node.attributes.get_int("keepdims", 1):
        kept = [each for each in kept if each not in axes]
    if len(kept) != sizes.rank(node.outputs[0]):
        return None  # axes that are no axes of this value
    return (kept[axis], *[None] * (len(node.inputs) - 1)) if kept[axis] not in axes else None


def _arg(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 1
    mixed = (node.attributes.get_int("axis", 0) or 0) % rank
    kept = list(range(rank))
    if not node.attributes.get_int("keepdims", 1):
        kept.remove(mixed)
    return (kept[axis],) if kept[axis] != mixed else None


def _slice(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 0
    if len(node.inputs) < 3 or (len(node.inputs) < 4 or node.inputs[3] is None):
        return None
    axes = _listed(node, 3, "axes", rank)
    return _first(node, axis, sizes) if axes is not None and axis not in axes else None


def _pad(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 0
    pads = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or len(pads) != 2 * rank or len(node.inputs) > 3:
        return None
    return _first(node, axis, sizes) if not pads[axis] and not pads[rank + axis] else None


def _concat(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.outputs[0]) or 1
    joined = (node.attributes.get_int("axis", 0) or 0) % rank
    return (axis,) * len(node.inputs) if axis != joined else None


def _gather(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank, picked = sizes.rank(node.inputs[0]), sizes.rank(node.inputs[1])
    if rank is None or picked is None:
        return None
    along = (node.attributes.get_int("axis", 0) or 0) % max(rank, 1)
    if axis < along:
        return axis, None
    return (None, axis - along) if axis < along + picked else (axis - picked + 1, None)


def _gather_elements(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    rank = sizes.rank(node.inputs[0]) or 1
    along = (node.attributes.get_int("axis", 0) or 0) % rank
    return (axis, axis) if axis != along else None


def _einsum(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    attribute = node.attributes.get("equation")
    left, arrow, right = (attribute.as_string() if attribute else "").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or len(terms) != len(node.inputs):
        return None
    letter = right[axis]
    if any(term.count(letter) > 1 for term in terms):
        return None
    return tuple(term.index(letter) if letter in term else None for term in terms)


def _quantise(node: ir.Node, axis: int, sizes: Sizes) -> Axes | None:
    """Row by row where one scale serves all, or the scales lie along another axis."""
    scale, rank = sizes.of(node.inputs[1]), sizes.rank(node.inputs[0]) or 1
    if scale is None or node.attributes.get_int("block_size", 0):
        return None
    whole = all(one(size) for size in scale)
    along = (node.attributes.get_int("axis", 1) or 0) % rank
    return _first(node, axis, sizes) if whole or (len(scale) == 1 and axis != along) else None


def _listed(node: ir.Node, at: int, name: str, rank: int) -> list[int] | None:
    """Axes in an attribute or a constant input, counted from the front."""
    given = node.attributes.get_ints(name, None)
    if given is None:
        found = integers(node.inputs[at]) if len(node.inputs) > at else None
        given = None if found is None else found.flatten().tolist()
    return None if given is None else [int(each) % max(rank, 1) for each in given]


_REDUCE = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
_RULES: dict[tuple[str, str], Rule] = {
    **{("", name): _elementwise for name in ELEMENTWISE},
    **{("", f"Reduce{name}"): _reduce for name in _REDUCE},
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul_integer,
    ("", "Gemm"): _gemm,
    ("", "Softmax"): _softmax,
    ("", "LogSoftmax"): _softmax,
    ("", "LayerNormalization"): _along_others(-1, from_axis=True),
    ("", "RMSNormalization"): _along_others(-1, from_axis=True),
    ("", "LpNormalization"): _along_others(-1),
    ("", "CumSum"): _cumsum,
    ("", "Split"): _along_others(0),
    ("", "ArgMax"): _arg,
    ("", "ArgMin"): _arg,
    ("", "Transpose"): _transpose,
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Squeeze"): _squeeze,
    ("", "Slice"): _slice,
    ("", "Pad"): _pad,
    ("", "Concat"): _concat,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "Einsum"): _einsum,
    ("", "QuantizeLinear"): _quantise,
    ("", "DequantizeLinear"): _quantise,
    ("", "Conv"): _convolution,
    ("", "MaxPool"): _batch,
    ("", "AveragePool"): _batch,
    ("", "GlobalAveragePool"): _batch,
    ("", "GlobalMaxPool"): _batch,
    ("", "BatchNormalization"): _batch_norm,
    ("", "InstanceNormalization"): _batch,
    ("", "GroupNormalization"): _batch,
    ("com.microsoft", "MatMulNBits"): _but_last,
}
