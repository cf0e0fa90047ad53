"""The algebra: a compressed weight is an expression over a few leaves and combinators.

Every operator is a matrix of shape ``(out, in)`` that acts on the last axis,
``y = x @ W.T``. Classes are final and frozen; equality is identity, because sharing
a leaf *is* using the same object twice. What can be done with operators lives in
:mod:`lrcompile.linop.ops` as open functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lrcompile.errors import InvalidInputError


class LinearOperator:
    """A constant linear map ``(out, in)``; abstract.

    No ``ABC``: for abstract base classes ``singledispatch`` asks for a cache token, which
    torch.compile cannot trace, so that every ``apply`` would break the graph.
    """

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError(f"{type(self).__name__} has no shape")

    def __repr__(self) -> str:
        from lrcompile.linop.ops import show

        return show(self)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInputError(message)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearOperator):
    """A stored matrix."""

    weight: Tensor  # (out, in)

    def __post_init__(self) -> None:
        _require(self.weight.ndim == 2, f"Dense takes a matrix, not shape {tuple(self.weight.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Identity(LinearOperator):
    """The identity on ``size`` channels; stores nothing."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size


@final
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearOperator):
    """Multiplies channel ``i`` by ``values[i]``."""

    values: Tensor  # (n,)

    def __post_init__(self) -> None:
        _require(self.values.ndim == 1, f"Diagonal takes a vector, not shape {tuple(self.values.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[0]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Select(LinearOperator):
    """Picks channels: ``y[i] = x[indices[i]]``."""

    indices: Tensor  # (out,) integer, columns
    size: int  # in

    def __post_init__(self) -> None:
        _require(self.indices.ndim == 1, f"Select takes a vector of indices, not shape {tuple(self.indices.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.indices.shape[0], self.size


@final
@dataclass(frozen=True, eq=False, repr=False)
class SemiSparse(LinearOperator):
    """A fixed number ``s`` of entries in each row (ELL layout).

    Repeated columns within a row add up.
    """

    values: Tensor  # (out, s)
    indices: Tensor  # (out, s) integer, columns
    size: int  # in

    def __post_init__(self) -> None:
        _require(self.values.shape == self.indices.shape, "SemiSparse: values and indices differ in shape")
        _require(self.values.ndim == 2, f"SemiSparse takes matrices, not shape {tuple(self.values.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.size


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(LinearOperator):
    """Dense blocks of equal size on a grid; ``rows`` and ``columns`` count in blocks.

    Blocks at the same place add up.
    """

    blocks: Tensor  # (count, block_out, block_in)
    rows: Tensor  # (count,) integer
    columns: Tensor  # (count,) integer
    grid: tuple[int, int]  # blocks along (out, in)

    def __post_init__(self) -> None:
        _require(self.blocks.ndim == 3, f"BlockSparse takes (count, out, in), not shape {tuple(self.blocks.shape)}")
        places = (tuple(self.rows.shape), tuple(self.columns.shape))
        _require(places == ((self.blocks.shape[0],),) * 2, "BlockSparse needs one row and one column for each block")

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid[0] * self.blocks.shape[1], self.grid[1] * self.blocks.shape[2]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Quantized(LinearOperator):
    """Integer codes with a scale per row and group of ``group`` columns.

    ``W[i, j] = scale[i, j // group] * (codes[i, j] - zero[i, j // group])``;
    ``zero`` is None for symmetric codes. ``bits`` is what a code costs in storage.
    """

    codes: Tensor  # (out, in) int8 or uint8
    scale: Tensor  # (out, ceil(in / group)) floating
    zero: Tensor | None  # as scale, dtype of codes
    group: int
    bits: int = 8

    def __post_init__(self) -> None:
        _require(self.codes.ndim == 2, f"Quantized takes a matrix of codes, not shape {tuple(self.codes.shape)}")
        _require(self.group > 0 and self.bits > 0, "Quantized needs a positive group and positive bits")
        groups = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        zero = self.scale if self.zero is None else self.zero
        fits = tuple(self.scale.shape) == groups == tuple(zero.shape)
        _require(fits, f"Quantized: scale and zero must have the shape {groups}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Transposed(LinearOperator):
    """The transpose of an operator that has no closed form of its own."""

    operator: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.operator.shape
        return columns, rows


@final
@dataclass(frozen=True, eq=False, repr=False)
class Product(LinearOperator):
    """``left @ right``: ``right`` meets the input first."""

    left: LinearOperator
    right: LinearOperator

    def __post_init__(self) -> None:
        _require(
            self.left.shape[1] == self.right.shape[0],
            f"Product: {self.left.shape} @ {self.right.shape} do not fit",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Kron(LinearOperator):
    """The Kronecker product ``left ⊗ right``: ``right`` along the fast axis, ``left`` along the slow one.

    ``Kron(op, Identity(n))`` applies ``op`` to the channels of each of ``n`` places.
    """

    left: LinearOperator
    right: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        (out, into), (height, width) = self.left.shape, self.right.shape
        return out * height, into * width


@final
@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """The sum of operators of one shape."""

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        _require(len(self.terms) > 0, "Sum needs at least one term")
        _require(len({term.shape for term in self.terms}) == 1, "Sum: terms differ in shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape


@final
@dataclass(frozen=True, eq=False, repr=False)
class Stack(LinearOperator):
    """Operators on one input whose outputs are concatenated."""

    parts: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        _require(len(self.parts) > 0, "Stack needs at least one part")
        _require(len({part.shape[1] for part in self.parts}) == 1, "Stack: parts differ in input size")

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """``scale * operator``; the scale is a 0-d tensor, so that it can be shared or trained."""

    scale: Tensor  # ()
    operator: LinearOperator

    def __post_init__(self) -> None:
        _require(self.scale.ndim == 0, f"Scaled takes a 0-d scale, not shape {tuple(self.scale.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape


@final
@dataclass(frozen=True, eq=False, repr=False)
class Choose(LinearOperator):
    """One of several operators of one shape, picked by a 0-d integer tensor at run time."""

    index: Tensor  # () int64
    operators: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        _require(self.index.ndim == 0, f"Choose takes a 0-d index, not shape {tuple(self.index.shape)}")
        _require(len(self.operators) > 0, "Choose needs at least one operator")
        _require(len({op.shape for op in self.operators}) == 1, "Choose: operators differ in shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.operators[0].shape


def low_rank(left: Tensor, right: Tensor) -> Product:
    """``left @ right`` as an expression; ``left`` is ``(out, rank)``, ``right`` ``(rank, in)``."""
    return Product(Dense(left), Dense(right))


def as_scale(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor with the dtype and device of ``like``."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
