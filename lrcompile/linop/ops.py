"""What can be done with operators: open functions, so that users add types and functions.

``apply`` and ``rows`` stand here; ``densify`` and ``transpose`` in
:mod:`lrcompile.linop.dense`, walking and describing in :mod:`lrcompile.linop.tree`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce, singledispatch
from operator import add

import torch
from torch import Tensor
from torch.nn import functional

from lrcompile.errors import InvalidInputError
from lrcompile.linop.dense import (
    as_index,
    cast_to,
    choose,
    densify,
    dequantize,
    device_of,
    dtype_of,
    hot,
    scatter,
    transpose,
)
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
from lrcompile.linop.tree import children, leaves, map_leaves, rebuild, same, show, structure, tensors

__all__ = [
    "apply",
    "children",
    "densify",
    "device_of",
    "dtype_of",
    "leaves",
    "map_leaves",
    "rebuild",
    "rows",
    "same",
    "show",
    "structure",
    "tensors",
    "transpose",
]

# a gather writes tokens * out * s values; from about this many tokens on a dense product is faster
FEW_TOKENS = 16


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _fits(op: LinearOperator, x: Tensor) -> None:
    # broadcasting and indexing would take many wrong sizes in silence
    if x.ndim == 0 or x.shape[-1] != op.shape[1]:
        raise InvalidInputError(f"{show(op)} takes {op.shape[1]} channels, not an input {tuple(x.shape)}")


def _like(value: Tensor, x: Tensor) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        raise InvalidInputError(f"an operator applies to floating inputs, not to {x.dtype}")
    return value.to(dtype=x.dtype, device=x.device)


@singledispatch
def apply(op: LinearOperator, x: Tensor) -> Tensor:  # x: (..., in)
    """``x @ W.T`` on the last axis, ``(..., in)`` to ``(..., out)``.

    Dtype and device of the result are those of ``x``: leaves are cast, and codes
    dequantised, to them. Follows the structure, so nothing is densified but a leaf where
    a dense product is the faster way. Gradients flow into ``x`` and the leaves.

    Raises:
        InvalidInputError: the last axis does not fit, or ``x`` holds integers.
    """
    _fits(op, x)
    return functional.linear(x, _like(densify(op), x))


@apply.register
def _(op: Identity, x: Tensor) -> Tensor:
    _fits(op, x)
    return x


@apply.register
def _(op: Diagonal, x: Tensor) -> Tensor:
    _fits(op, x)
    return x * _like(op.values, x)


@apply.register
def _(op: Select, x: Tensor) -> Tensor:
    _fits(op, x)
    return x.index_select(-1, as_index(op.indices, x.device))


@apply.register
def _(op: SemiSparse, x: Tensor) -> Tensor:
    _fits(op, x)
    values = _like(op.values, x)
    if _tokens(x) >= FEW_TOKENS:
        return functional.linear(x, scatter(values, op.indices, op.size))
    picked = x.index_select(-1, as_index(op.indices, x.device).flatten())
    return (picked.unflatten(-1, values.shape) * values).sum(-1)


@apply.register
def _(op: BlockSparse, x: Tensor) -> Tensor:
    _fits(op, x)
    blocks = _like(op.blocks, x)
    if 2 * blocks.numel() > math.prod(op.shape):  # the gathered input would outgrow a dense product
        return functional.linear(x, densify(replace(op, blocks=blocks)))
    pieces = x.unflatten(-1, (op.grid[1], blocks.shape[2])).index_select(-2, as_index(op.columns, x.device))
    products = torch.einsum("...ci,coi->...co", pieces, blocks)
    out = x.new_zeros(*x.shape[:-1], op.grid[0], blocks.shape[1])
    return out.index_add(-2, as_index(op.rows, x.device), products).flatten(-2)


@apply.register
def _(op: Quantized, x: Tensor) -> Tensor:
    _fits(op, x)
    return functional.linear(x, dequantize(op.codes, _like(op.scale, x), op.zero, op.group))


@apply.register
def _(op: Product, x: Tensor) -> Tensor:
    return apply(op.left, apply(op.right, x))


@apply.register
def _(op: Kron, x: Tensor) -> Tensor:
    _fits(op, x)
    inner = apply(op.right, x.unflatten(-1, (op.left.shape[1], op.right.shape[1])))
    return apply(op.left, inner.mT).mT.flatten(-2)


@apply.register
def _(op: Sum, x: Tensor) -> Tensor:
    return reduce(add, (apply(term, x) for term in op.terms))


@apply.register
def _(op: Stack, x: Tensor) -> Tensor:
    return torch.cat([apply(part, x) for part in op.parts], dim=-1)


@apply.register
def _(op: Scaled, x: Tensor) -> Tensor:
    return op.scale.to(x.device) * apply(op.operator, x)


@apply.register
def _(op: Choose, x: Tensor) -> Tensor:
    return choose(op, lambda one: apply(one, x))


@apply.register
def _(op: Transposed, x: Tensor) -> Tensor:
    _fits(op, x)
    return apply_transposed(op.operator, x)


@singledispatch
def apply_transposed(op: LinearOperator, x: Tensor) -> Tensor:  # x: (..., out)
    """``x @ W``, ``(..., out)`` to ``(..., in)``: what ``apply`` does for ``Transposed(op)``."""
    closed = transpose(op)
    return x @ _like(densify(op), x) if isinstance(closed, Transposed) else apply(closed, x)


@apply_transposed.register
def _(op: Select, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], op.size).index_add(-1, as_index(op.indices, x.device), x)


@apply_transposed.register
def _(op: SemiSparse, x: Tensor) -> Tensor:
    values = _like(op.values, x)
    if _tokens(x) >= FEW_TOKENS:
        return x @ scatter(values, op.indices, op.size)
    spread = (x.unsqueeze(-1) * values).flatten(-2)
    return x.new_zeros(*x.shape[:-1], op.size).index_add(-1, as_index(op.indices, x.device).flatten(), spread)


@apply_transposed.register
def _(op: Quantized, x: Tensor) -> Tensor:
    return x @ dequantize(op.codes, _like(op.scale, x), op.zero, op.group)


@apply_transposed.register
def _(op: Stack, x: Tensor) -> Tensor:
    pieces = x.split([part.shape[0] for part in op.parts], dim=-1)
    return reduce(add, (apply(transpose(part), piece) for part, piece in zip(op.parts, pieces, strict=True)))


@singledispatch
def rows(op: LinearOperator, index: Tensor) -> Tensor:  # index: (...), integers in 0..out-1
    """``densify(op)[index]``, ``(..., in)``, without the other rows: an embedding lookup.

    The dtype is :func:`dtype_of` the operator.

    Raises:
        IndexError, RuntimeError: torch's own, for an index out of range.
    """
    at = index.to(device_of(op))
    return apply(transpose(op), hot(at, op.shape[0], dtype_of(op)))


@rows.register
def _(op: Dense, index: Tensor) -> Tensor:
    return functional.embedding(as_index(index, op.weight.device), op.weight)


@rows.register
def _(op: Identity, index: Tensor) -> Tensor:
    return hot(index, op.size)


@rows.register
def _(op: Diagonal, index: Tensor) -> Tensor:
    at = as_index(index, op.values.device)
    return _pick(op.values, at).unsqueeze(-1) * hot(at, op.shape[1], op.values.dtype)


@rows.register
def _(op: Select, index: Tensor) -> Tensor:
    return hot(_pick(op.indices, index), op.size)


@rows.register
def _(op: SemiSparse, index: Tensor) -> Tensor:
    return scatter(_pick(op.values, index), _pick(op.indices, index), op.size)


@rows.register
def _(op: Quantized, index: Tensor) -> Tensor:
    zero = None if op.zero is None else _pick(op.zero, index)
    return dequantize(_pick(op.codes, index), _pick(op.scale, index), zero, op.group)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` along the first axis, refusing negative indices."""
    flat = values.index_select(0, as_index(index, values.device).flatten())
    return flat.reshape((*index.shape, *values.shape[1:]))


@rows.register
def _(op: Product, index: Tensor) -> Tensor:
    return apply(transpose(op.right), cast_to(op)(rows(op.left, index)))


@rows.register
def _(op: Sum, index: Tensor) -> Tensor:
    cast = cast_to(op)
    return reduce(add, (cast(rows(term, index)) for term in op.terms))


@rows.register
def _(op: Scaled, index: Tensor) -> Tensor:
    found = rows(op.operator, index)
    return op.scale.to(found.device) * found


@rows.register
def _(op: Choose, index: Tensor) -> Tensor:
    cast = cast_to(op)
    return choose(op, lambda one: cast(rows(one, index)))


@rows.register
def _(op: Stack, index: Tensor) -> Tensor:
    cast = cast_to(op)
    parts = [part for part in op.parts if part.shape[0] > 0] or list(op.parts[:1])
    local = as_index(index, device_of(op))
    result = cast(rows(parts[0], local if len(parts) == 1 else local.clamp(max=parts[0].shape[0] - 1)))
    for i, part in enumerate(parts[1:], start=1):
        local = local - parts[i - 1].shape[0]
        # only inner borders are clamped, so that an index out of range still fails
        inside = local.clamp(0, None if i == len(parts) - 1 else part.shape[0] - 1)
        result = torch.where((local >= 0).unsqueeze(-1), cast(rows(part, inside)), result)
    return result
