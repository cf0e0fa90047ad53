"""What an operator is as a matrix: its dtype, its dense form, its transpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, singledispatch
from operator import add

import torch
from torch import Tensor

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.linop.expr import (
    BlockSparse,
    Choose,
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    Transposed,
)
from lrcompile.linop.tree import tensors


def kind_of(op: LinearOperator) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of ``densify(op)``, in one walk."""
    stored = [value for _, value in tensors(op)]
    # 0-d tensors take part in no type promotion, as in torch
    floats = [value for value in stored if value.ndim > 0 and value.is_floating_point()]
    dtype = reduce(torch.promote_types, (value.dtype for value in floats)) if floats else torch.get_default_dtype()
    return dtype, next((value.device for value in floats or stored), torch.device("cpu"))


def dtype_of(op: LinearOperator) -> torch.dtype:
    """The dtype of ``densify(op)``: promoted over its floating tensors, torch's default where there are none."""
    return kind_of(op)[0]


def device_of(op: LinearOperator) -> torch.device:
    """Where ``densify(op)`` lies: with the first floating tensor, else the first tensor, else on the CPU."""
    return kind_of(op)[1]


def as_index(index: Tensor, device: torch.device | None = None) -> Tensor:
    """An index in int64, the one dtype that all of torch's indexing takes for an index (uint8 would be a mask)."""
    return index.to(device=device, dtype=torch.int64)


@singledispatch
def densify(op: LinearOperator) -> Tensor:
    """The matrix ``(out, in)`` in :func:`dtype_of` the operator; gradients flow into the leaves.

    Raises:
        UnsupportedError: a type for which nothing is registered.
    """
    raise UnsupportedError(f"densify knows no {type(op).__name__}", hint="register it with densify.register")


def cast_to(op: LinearOperator) -> Callable[[Tensor], Tensor]:
    """Casts what is computed for a part to the dtype and device of the whole ``op``."""
    dtype, device = kind_of(op)
    return lambda value: value.to(dtype=dtype, device=device)


@densify.register
def _(op: Dense) -> Tensor:
    return op.weight


@densify.register
def _(op: Identity) -> Tensor:
    return torch.eye(op.size)


@densify.register
def _(op: Diagonal) -> Tensor:
    return torch.diag(op.values)


@densify.register
def _(op: Select) -> Tensor:
    return hot(op.indices, op.size)


def hot(index: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """One-hot rows ``(*index.shape, size)``."""
    zeros = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return zeros.scatter(-1, as_index(index).unsqueeze(-1), 1.0)


@densify.register
def _(op: SemiSparse) -> Tensor:
    return scatter(op.values, op.indices, op.size)


def scatter(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Rows ``(..., size)`` with ``values`` ``(..., s)`` added at the columns ``indices`` ``(..., s)``."""
    zeros = values.new_zeros(*values.shape[:-1], size)
    return zeros.scatter_add(-1, as_index(indices, values.device), values)


@densify.register
def _(op: BlockSparse) -> Tensor:
    down, across = op.grid
    _, height, width = op.blocks.shape
    place = as_index(op.rows, op.blocks.device) * across + as_index(op.columns, op.blocks.device)
    cells = op.blocks.new_zeros(down * across, height, width).index_add(0, place, op.blocks)
    return cells.reshape(down, across, height, width).transpose(1, 2).reshape(op.shape)


@densify.register
def _(op: Quantized) -> Tensor:
    return dequantize(op.codes, op.scale, op.zero, op.group)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """Real values of codes ``(..., in)`` with ``scale`` and ``zero`` ``(..., ceil(in / group))``, in scale's dtype."""

    def spread(value: Tensor) -> Tensor:
        return value.repeat_interleave(group, dim=-1)[..., : codes.shape[-1]]

    # unsigned codes must become real before the zero is taken off
    real = codes.to(dtype=scale.dtype, device=scale.device)
    centred = real if zero is None else real - spread(zero.to(dtype=scale.dtype, device=scale.device))
    return centred * spread(scale)


@densify.register
def _(op: Transposed) -> Tensor:
    return densify(op.operator).mT


@densify.register
def _(op: Product) -> Tensor:
    right = cast_to(op)(densify(op.right))
    match op.left:
        case Identity():
            return right
        case Diagonal(values=values):
            return values.to(right).unsqueeze(-1) * right
        case Select(indices=indices):
            return right.index_select(0, as_index(indices, right.device))
        case left:
            return _matmul(densify(left).to(right), right)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; float16 on a CPU by way of float32, since torch takes hundreds of times as long."""
    if right.dtype == torch.float16 and right.device.type == "cpu":
        return (left.float() @ right.float()).to(right.dtype)
    return left @ right


@densify.register
def _(op: Kron) -> Tensor:
    cast = cast_to(op)
    left, right = cast(densify(op.left)), cast(densify(op.right))  # torch.kron cannot take every stride
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(op.shape)


@densify.register
def _(op: Sum) -> Tensor:
    cast = cast_to(op)
    return reduce(add, (cast(densify(term)) for term in op.terms))


@densify.register
def _(op: Stack) -> Tensor:
    cast = cast_to(op)
    return torch.cat([cast(densify(part)) for part in op.parts])


@densify.register
def _(op: Scaled) -> Tensor:
    matrix = densify(op.operator)
    return op.scale.to(matrix.device) * matrix


@densify.register
def _(op: Choose) -> Tensor:
    cast = cast_to(op)
    return choose(op, lambda one: cast(densify(one)))


def choose(op: Choose, compute: Callable[[LinearOperator], Tensor]) -> Tensor:
    """``compute`` of the operator that the index picks.

    Reading the index would break a graph that is being compiled: there all operators are
    computed and one result is taken.

    Raises:
        InvalidInputError: the index is out of range.
    """
    if torch.compiler.is_compiling():
        results = torch.stack([compute(one) for one in op.operators])
        return results.index_select(0, as_index(op.index, results.device).reshape(1)).squeeze(0)
    picked = int(op.index)
    if not 0 <= picked < len(op.operators):
        raise InvalidInputError(f"index {picked} of Choose is not in 0..{len(op.operators) - 1}")
    return compute(op.operators[picked])


@singledispatch
def transpose(op: LinearOperator) -> LinearOperator:
    """The transpose ``(in, out)``, in closed form where there is one, else :class:`Transposed`.

    An involution: ``same(transpose(transpose(op)), op)``, as long as nobody wraps what
    has a closed form into ``Transposed`` by hand (``simplify`` mends that). Tensors are
    shared with ``op`` as views.
    """
    return Transposed(op)


@transpose.register
def _(op: Transposed) -> LinearOperator:
    return op.operator


@transpose.register(Identity)
@transpose.register(Diagonal)
def _(op: LinearOperator) -> LinearOperator:
    return op


@transpose.register
def _(op: Dense) -> LinearOperator:
    return Dense(op.weight.mT)


@transpose.register
def _(op: BlockSparse) -> LinearOperator:
    return BlockSparse(op.blocks.mT, op.columns, op.rows, (op.grid[1], op.grid[0]))


@transpose.register
def _(op: Product) -> LinearOperator:
    return Product(transpose(op.right), transpose(op.left))


@transpose.register
def _(op: Kron) -> LinearOperator:
    return Kron(transpose(op.left), transpose(op.right))


@transpose.register
def _(op: Sum) -> LinearOperator:
    return Sum(tuple(transpose(term) for term in op.terms))


@transpose.register
def _(op: Scaled) -> LinearOperator:
    return Scaled(op.scale, transpose(op.operator))


@transpose.register
def _(op: Choose) -> LinearOperator:
    return Choose(op.index, tuple(transpose(one) for one in op.operators))
