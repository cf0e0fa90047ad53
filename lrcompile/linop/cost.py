"""What expressions cost: stored values, bytes and multiplications.

Costs belong to a *set* of operators, because operators share: a tensor counts once
however many leaves hold it, and a product counts once where the same operator object
meets the same input again.

Everywhere below ``ops`` is one operator, or an iterable of operators (each on an input of
its own) and of pairs ``(input key, operator)``; equal keys mean one and the same input.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import singledispatch
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

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
from lrcompile.linop.ops import children, transpose
from lrcompile.linop.tree import own_tensors

Operators: TypeAlias = LinearOperator | Iterable[LinearOperator | tuple[Hashable, LinearOperator]]


@dataclass(frozen=True)
class Cost:
    """Stored values (in units of *keep*), stored bytes, and multiply-accumulates per token.

    ``+`` adds as if nothing were shared; where sharing matters, take :func:`cost` of all
    operators together.
    """

    parameters: float = 0.0
    nbytes: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.nbytes + other.nbytes, self.macs + other.macs)


def cost(ops: Operators) -> Cost:
    """All three costs of a set of operators."""
    pairs = list(_pairs(ops))
    return Cost(parameters(pairs), nbytes(pairs), macs(pairs))


def parameters(ops: Operators) -> float:
    """Stored values in units of *keep*.

    A float value counts 1 whatever its dtype; an index, code, quantisation scale or zero
    counts its bits / 16. An index is taken in :func:`index_dtype`, whatever the tensor's dtype.
    """
    return sum(charge.tensor.numel() * charge.value for charge in _distinct(ops))


def nbytes(ops: Operators) -> int:
    """Stored bytes: of each tensor as it is held, codes packed at ``bits`` each.

    An index held in int64 therefore costs 8 bytes; hold it in :func:`index_dtype`.
    """
    return sum(-(-charge.tensor.numel() * charge.bits // 8) for charge in _distinct(ops))


def macs(ops: Operators) -> int:
    """Multiply-accumulates per token.

    Additions, gathers and concatenations are free; a ``Scaled`` multiplies its output; of
    a ``Choose`` the dearest operator counts. Within one input a shared operator object
    counts once, also as the right end of several products.
    """
    return _work(_pairs(ops), set())


def index_dtype(size: int) -> torch.dtype:
    """The smallest of uint8, int16, int32 and int64 that holds ``0..size-1``."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if size - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def _pairs(ops: Operators) -> Iterator[tuple[Hashable, LinearOperator]]:
    if isinstance(ops, LinearOperator):
        ops = [ops]
    for item in ops:
        yield (object(), item) if isinstance(item, LinearOperator) else item


class Charge(NamedTuple):
    """What one element of a stored tensor costs: ``value`` in units of *keep*, ``bits`` in storage."""

    tensor: Tensor
    value: float
    bits: int


def _held(tensor: Tensor, value: float = 1.0) -> Charge:
    return Charge(tensor, value, tensor.element_size() * 8)


def _index(indices: Tensor, size: int) -> Charge:
    return _held(indices, torch.iinfo(index_dtype(size)).bits / 16)


@singledispatch
def charges(op: LinearOperator) -> list[Charge]:
    """What this very node stores; children are counted apart.

    By default floats count 1 and the rest its bits / 16: register operators that differ.
    """
    stored = [tensor for _, tensor in own_tensors(op)]
    return [_held(t, 1.0 if t.is_floating_point() else t.element_size() / 2) for t in stored]


@charges.register
def _(op: Dense) -> list[Charge]:
    return [_held(op.weight)]


@charges.register
def _(op: Select) -> list[Charge]:
    return [_index(op.indices, op.size)]


@charges.register
def _(op: SemiSparse) -> list[Charge]:
    return [_held(op.values), _index(op.indices, op.size)]


@charges.register
def _(op: BlockSparse) -> list[Charge]:
    return [_held(op.blocks), _index(op.rows, op.grid[0]), _index(op.columns, op.grid[1])]


@charges.register
def _(op: Quantized) -> list[Charge]:
    grids = [op.scale] if op.zero is None else [op.scale, op.zero]
    return [Charge(op.codes, op.bits / 16, op.bits), *(_held(t, t.element_size() / 2) for t in grids)]


@charges.register
def _(op: Choose) -> list[Charge]:
    return [_index(op.index, len(op.operators))]


def _distinct(ops: Operators) -> list[Charge]:
    """The charges of a set, each stored tensor once, at its dearest use."""
    found: dict[Hashable, Charge] = {}
    seen: set[LinearOperator] = set()
    queue = [op for _, op in _pairs(ops)]
    for op in queue:
        if op in seen:
            continue
        seen.add(op)
        queue.extend(children(op))
        for charge in charges(op):
            key = _place(charge.tensor)
            found[key] = max(found.get(key, charge), charge, key=lambda c: (c.value, c.bits))
    return list(found.values())


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor's elements lie: equal for one tensor, its transpose and its detached alias.

    Other views (a slice, a reshape) count as different tensors.
    """
    storage = tensor.untyped_storage()._cdata  # data_ptr() is 0 for every meta tensor
    layout = sorted((size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    return storage, tensor.storage_offset(), tuple(layout), tensor.dtype


@singledispatch
def own_macs(op: LinearOperator) -> int:
    """Multiplications of this very node per token, its children apart; a dense product by default."""
    return 0 if children(op) else op.shape[0] * op.shape[1]


@own_macs.register(Identity)
@own_macs.register(Select)
@own_macs.register(Sum)
@own_macs.register(Stack)
def _(op: LinearOperator) -> int:
    return 0


@own_macs.register(Diagonal)
@own_macs.register(Scaled)
def _(op: LinearOperator) -> int:
    return op.shape[0]


@own_macs.register
def _(op: SemiSparse) -> int:
    return op.values.numel()


@own_macs.register
def _(op: BlockSparse) -> int:
    return op.blocks.numel()


def _work(pairs: Iterable[tuple[Hashable, LinearOperator]], done: set[Hashable]) -> int:
    flow = _Flow(done)
    certain = sum(flow.through(op, key)[1] for key, op in pairs)
    # last, when all that is computed in any case is known; of one choice only one branch
    # runs, so that what a branch computes is there for nobody else
    return certain + sum(
        max(_work([(key, one)], set(done)) for one in choice.operators) for choice, key in flow.choices
    )


@dataclass(frozen=True, eq=False)
class _Flow:
    """Follows values through operators; a value is its operator and what that was applied to."""

    done: set[Hashable]
    choices: list[tuple[Choose, Hashable]] = field(default_factory=list)

    def through(self, op: LinearOperator, key: Hashable) -> tuple[Hashable, int]:
        """The value that ``op`` makes of the value ``key``, and the multiplications not done before."""
        match op:
            case Identity():
                return key, 0
            case Product():
                middle, first = self.through(op.right, key)
                end, second = self.through(op.left, middle)
                return end, first + second
            case _:
                end = (op, key)
                if end in self.done:
                    return end, 0
                self.done.add(end)
                return end, self.fresh(op, key)

    def fresh(self, op: LinearOperator, key: Hashable) -> int:
        match op:
            case Choose():
                self.choices.append((op, key))
                return 0
            case Kron(left=left, right=right):  # each at every place of the other
                return left.shape[1] * macs(right) + right.shape[0] * macs(left)
            case Transposed(operator=Stack(parts=parts)):
                return sum(self.through(transpose(part), (op, i, key))[1] for i, part in enumerate(parts))
            case Transposed(operator=inner):
                closed = transpose(inner)
                return own_macs(inner) if isinstance(closed, Transposed) else self.through(closed, key)[1]
            case _:
                return own_macs(op) + sum(self.through(child, key)[1] for child in children(op))
