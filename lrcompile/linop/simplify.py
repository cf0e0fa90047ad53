"""The few laws that make an expression smaller without changing what it computes.

Values are taken as constants: a law that would fold a trainable tensor away is left out
while gradients are recorded, and applied under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.linop.dense import as_index
from lrcompile.linop.expr import (
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Scaled,
    Select,
    Stack,
    Sum,
    Transposed,
)
from lrcompile.linop.ops import transpose
from lrcompile.linop.tree import map_children

Merge: TypeAlias = Callable[[LinearOperator, LinearOperator], LinearOperator | None]


Memo: TypeAlias = dict[LinearOperator, LinearOperator]


def simplify(op: LinearOperator, memo: Memo | None = None) -> LinearOperator:
    """An expression with the same matrix, to rounding, in a normal form.

    rewrite:
      - ``Product(I, x)``, ``Product(x, I)`` -> ``x``;  ``(a b) c`` -> ``a (b c)``
      - ``Diagonal Diagonal`` -> ``Diagonal``;  ``Select Select`` -> ``Select``
      - nested ``Sum``, nested ``Stack`` -> flat;  of a single one -> that one
      - ``1 * x`` -> ``x``;  ``a * (b * x)`` -> ``(a b) * x``
      - ``x ⊗ I`` and ``I ⊗ x`` with an identity of one channel -> ``x``;  ``I ⊗ I`` -> ``I``
      - ``Transposed(x)`` -> the closed form, where there is one

    Idempotent; returns ``op`` itself where no law applies. What is shared inside ``op``
    stays shared; pass one ``memo`` to several calls to keep what expressions share.
    """
    return _rewrite(op, _merge, memo)


def collapse(op: LinearOperator, memo: Memo | None = None) -> LinearOperator:
    """:func:`simplify`, and multiplies out dense neighbours that store no less than their product would.

    rewrite:  ``Product(Dense U, Dense V)`` -> ``Dense(U @ V)``, if ``m r + r n >= m n``

    The product is taken in float64 and kept in the factors' promoted dtype, so rounding
    changes. Factors that other expressions share are not spared: there it may cost storage.
    Calls of :func:`simplify` need a memo of their own.
    """
    return _rewrite(op, _merge_or_multiply, memo)


def _rewrite(op: LinearOperator, merge: Merge, memo: Memo | None = None) -> LinearOperator:
    known = {} if memo is None else memo

    def visit(node: LinearOperator) -> LinearOperator:
        if node not in known:
            known[node] = _step(map_children(node, visit), merge)
        return known[node]

    return visit(op)


def _step(op: LinearOperator, merge: Merge) -> LinearOperator:
    """One node, whose children are in normal form."""
    match op:
        case Product():
            return _chain(op, merge)
        case Kron():
            return _kron(op)
        case Sum():
            return _flat(op, Sum, op.terms)
        case Stack():
            return _flat(op, Stack, op.parts)
        case Scaled():
            return _scaled(op)
        case Transposed():
            closed = transpose(op.operator)
            is_normal = isinstance(closed, Transposed) and closed.operator is op.operator
            return op if is_normal else _rewrite(closed, merge)
        case _:
            return op


def _chain(op: Product, merge: Merge) -> LinearOperator:
    done = _compose(op.left, op.right, merge)
    # keep the object, and so what is shared, where nothing was merged
    unchanged = isinstance(done, Product) and done.left is op.left and done.right is op.right
    return op if unchanged else done


def _compose(left: LinearOperator, right: LinearOperator, merge: Merge) -> LinearOperator:
    """``left @ right`` of two normal forms, as a right-nested chain."""
    if isinstance(left, Product):
        return _compose(left.left, _compose(left.right, right, merge), merge)
    head, rest = (right.left, right.right) if isinstance(right, Product) else (right, None)
    merged = merge(left, head)
    if merged is None:
        return Product(left, right)
    return merged if rest is None else _compose(merged, rest, merge)


def _merge(left: LinearOperator, right: LinearOperator) -> LinearOperator | None:
    match left, right:
        case Identity(), _:
            return right
        case _, Identity():
            return left
        case Diagonal(values=a), Diagonal(values=b) if _constant(a, b) and a.device == b.device:
            return Diagonal(a * b)
        case Select(indices=picked), Select(indices=source, size=size):
            return Select(source.index_select(0, as_index(picked, source.device)), size)
        case _:
            return None


def _multiply(left: LinearOperator, right: LinearOperator) -> LinearOperator | None:
    match left, right:
        case Dense(weight=a), Dense(weight=b) if a.numel() + b.numel() >= a.shape[0] * b.shape[1]:
            product = a.to(torch.float64) @ b.to(device=a.device, dtype=torch.float64)
            return Dense(product.to(torch.promote_types(a.dtype, b.dtype)))
        case _:
            return None


def _merge_or_multiply(left: LinearOperator, right: LinearOperator) -> LinearOperator | None:
    merged = _merge(left, right)
    return _multiply(left, right) if merged is None else merged


def _kron(op: Kron) -> LinearOperator:
    match op.left, op.right:
        case left, Identity(size=1):
            return left
        case Identity(size=1), right:
            return right
        case Identity(size=a), Identity(size=b):
            return Identity(a * b)
        case _:
            return op


def _flat(op: LinearOperator, kind: type[Sum] | type[Stack], parts: tuple[LinearOperator, ...]) -> LinearOperator:
    if len(parts) == 1:
        return parts[0]
    if not any(isinstance(part, kind) for part in parts):
        return op
    flat: list[LinearOperator] = []
    for part in parts:
        match part:
            case Sum(terms=below) | Stack(parts=below) if isinstance(part, kind):
                flat.extend(below)
            case _:
                flat.append(part)
    return kind(tuple(flat))


def _scaled(op: Scaled) -> LinearOperator:
    if _is_one(op.scale):
        return op.operator
    inner = op.operator
    if isinstance(inner, Scaled) and _constant(op.scale, inner.scale):
        # at least float32, since the product of two small halves may vanish
        dtype = torch.promote_types(torch.promote_types(op.scale.dtype, inner.scale.dtype), torch.float32)
        product = op.scale.to(dtype) * inner.scale.to(device=op.scale.device, dtype=dtype)
        return _scaled(Scaled(product, inner.operator))
    return op


def _constant(*values: Tensor) -> bool:
    return not (torch.is_grad_enabled() and any(value.requires_grad for value in values))


def _is_one(scale: Tensor) -> bool:
    # a tensor without data (meta, or fake while a graph is compiled) has no value to look at
    readable = not (scale.is_meta or isinstance(scale, FakeTensor))
    return readable and _constant(scale) and scale.item() == 1
