"""The market: operators of every kind, for laws that must hold for all of them.

``MARKET`` maps a name to a builder ``seed -> operator`` (deterministic: one seed, one
operator); ``operators()`` is a hypothesis strategy over random expressions. Every law of
the algebra, and every backend, is tested against both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.linop import (
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
    index_dtype,
    transpose,
)

DTYPES = (torch.float32, torch.float64, torch.float16)
Builder = Callable[[int], LinearOperator]


@dataclass(frozen=True, eq=False)
class Maker:
    """Draws leaves from one seed; all values are of order one."""

    seed: int
    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def dense(self, out: int, inner: int) -> Dense:
        return Dense(self.normal(out, inner))

    def diagonal(self, size: int) -> Diagonal:
        return Diagonal(self.normal(size))

    def select(self, out: int, size: int, dtype: torch.dtype = torch.int64) -> Select:
        return Select(self.integers(0, size, out, dtype=dtype), size)

    def semi_sparse(self, out: int, size: int, per_row: int, dtype: torch.dtype | None = None) -> SemiSparse:
        columns = self.integers(0, size, out, per_row, dtype=dtype or index_dtype(size))
        return SemiSparse(self.normal(out, per_row), columns, size)

    def block_sparse(self, grid: tuple[int, int], block: tuple[int, int], count: int) -> BlockSparse:
        down, across = self.integers(0, grid[0], count), self.integers(0, grid[1], count)
        return BlockSparse(self.normal(count, *block), down, across, grid)

    def quantized(self, out: int, size: int, group: int, bits: int = 8, zero: bool = True) -> Quantized:
        groups = (out, -(-size // group))
        scale = self.normal(*groups).abs() / 2 ** (bits - 1)
        if not zero:
            half = 2 ** (bits - 1)
            return Quantized(self.integers(-half, half, out, size, dtype=torch.int8), scale, None, group, bits)
        codes = self.integers(0, 2**bits, out, size, dtype=torch.uint8)
        return Quantized(codes, scale, self.integers(0, 2**bits, *groups, dtype=torch.uint8), group, bits)

    def low_rank(self, out: int, rank: int, inner: int) -> Product:
        return Product(self.dense(out, rank), self.dense(rank, inner))

    def scaled(self, op: LinearOperator) -> Scaled:
        return Scaled(self.normal(), op)


def _of(make: Callable[[Maker], LinearOperator], dtype: torch.dtype = torch.float32) -> Builder:
    return lambda seed: make(Maker(seed, dtype))


def _mixed(seed: int) -> LinearOperator:
    single, double, half = (Maker(seed + i, dtype) for i, dtype in enumerate(DTYPES))
    return Sum((single.dense(6, 8), Product(double.dense(6, 2), half.dense(2, 8)), half.quantized(6, 8, 4)))


def _masa(m: Maker) -> LinearOperator:
    """Two layers over the same two atoms."""
    atoms = (m.dense(8, 6), m.dense(8, 6))
    return Stack(tuple(Sum(tuple(m.scaled(atom) for atom in atoms)) for _ in range(2)))


def _shared_right(m: Maker) -> LinearOperator:
    basis = m.dense(3, 12)
    return Stack(tuple(Product(m.dense(out, 3), basis) for out in (8, 4, 4)))


def _shared_product(m: Maker) -> LinearOperator:
    inner = m.low_rank(6, 2, 8)
    return Sum((inner, Product(m.diagonal(6), inner), Product(m.dense(6, 2), inner.right)))


def _identity_gauge(m: Maker) -> LinearOperator:
    """``P [I; C] V``: pivot rows are kept as they are, the others are mixed from them."""
    order = torch.randperm(10, generator=m.generator)
    return Product(Select(order, 10), Product(Stack((Identity(4), m.dense(6, 4))), m.dense(4, 9)))


def _everything(m: Maker) -> LinearOperator:
    sparse = m.semi_sparse(8, 4, 2)
    branch = Sum((Product(sparse, m.dense(4, 8)), m.scaled(m.low_rank(8, 2, 8)), m.quantized(8, 8, 3, bits=4)))
    switch = Choose(m.integers(0, 2), (Product(m.diagonal(8), branch), m.block_sparse((2, 4), (4, 2), 3)))
    return Stack((switch, transpose(Stack((transpose(sparse), m.dense(4, 8)))), Product(m.select(5, 8), branch)))


MARKET: dict[str, Builder] = {
    "dense": _of(lambda m: m.dense(12, 8)),
    "dense-float64": _of(lambda m: m.dense(5, 7), torch.float64),
    "dense-float16": _of(lambda m: m.dense(8, 12), torch.float16),
    "dense-one": _of(lambda m: m.dense(1, 1)),
    "identity": _of(lambda m: Identity(6)),
    "diagonal": _of(lambda m: m.diagonal(9)),
    "diagonal-float64": _of(lambda m: m.diagonal(9), torch.float64),
    "select": _of(lambda m: m.select(5, 9)),
    "select-wider-uint8": _of(lambda m: m.select(12, 7, torch.uint8)),
    "semi-sparse": _of(lambda m: m.semi_sparse(10, 16, 3)),
    "semi-sparse-repeats": _of(lambda m: m.semi_sparse(10, 2, 4, torch.int64)),
    "semi-sparse-int16-float16": _of(lambda m: m.semi_sparse(6, 300, 3), torch.float16),
    "block-sparse": _of(lambda m: m.block_sparse((4, 3), (2, 4), 5)),
    "block-sparse-full": _of(lambda m: m.block_sparse((2, 2), (3, 2), 9)),
    "quantized": _of(lambda m: m.quantized(8, 16, 16)),
    "quantized-ragged-4bit": _of(lambda m: m.quantized(5, 10, 4, bits=4)),
    "quantized-symmetric": _of(lambda m: m.quantized(6, 8, 4, zero=False)),
    "quantized-symmetric-float16": _of(lambda m: m.quantized(6, 9, 4, bits=3, zero=False), torch.float16),
    "low-rank": _of(lambda m: m.low_rank(12, 3, 10)),
    "low-rank-float16": _of(lambda m: m.low_rank(12, 3, 10), torch.float16),
    "low-rank-above-break-even": _of(lambda m: m.low_rank(4, 4, 6)),
    "low-rank-left-nested": _of(lambda m: Product(m.low_rank(8, 6, 3), m.low_rank(3, 5, 7))),
    "low-rank-quantized": _of(lambda m: Product(m.quantized(8, 4, 4, bits=4), m.quantized(4, 8, 8))),
    "low-rank-plus-sparse": _of(lambda m: Sum((m.low_rank(8, 2, 10), m.semi_sparse(8, 10, 2)))),
    "quantized-plus-low-rank": _of(lambda m: Sum((m.quantized(8, 10, 5, bits=4), m.low_rank(8, 2, 10)))),
    "dense-times-sparse": _of(lambda m: Product(m.semi_sparse(12, 8, 2), m.dense(8, 10))),
    "identity-gauge": _of(_identity_gauge),
    "dense-columns": _of(lambda m: Sum((Product(m.dense(6, 3), m.select(3, 10)), m.low_rank(6, 2, 10)))),
    "lora": _of(lambda m: Sum((m.dense(8, 10), m.scaled(m.low_rank(8, 2, 10))))),
    "masa": _of(_masa),
    "stack-shared-right": _of(_shared_right),
    "shared-product": _of(_shared_product),
    "kron": _of(lambda m: Kron(m.dense(3, 2), m.low_rank(4, 2, 5))),
    "channel-form": _of(lambda m: Product(m.dense(6, 8), Kron(m.dense(2, 3), Identity(4)))),
    "tucker": _of(lambda m: Product(m.dense(6, 3), Product(m.dense(3, 8), Kron(m.dense(2, 3), Identity(4))))),
    "tied": _of(lambda m: (lambda d: Product(transpose(d), d))(m.dense(5, 8))),
    "transposed-select": _of(lambda m: transpose(m.select(5, 9))),
    "transposed-semi-sparse": _of(lambda m: transpose(m.semi_sparse(6, 9, 2))),
    "transposed-quantized": _of(lambda m: transpose(m.quantized(6, 9, 4))),
    "transposed-stack": _of(lambda m: transpose(Stack((m.low_rank(4, 2, 6), m.semi_sparse(3, 6, 2))))),
    "transposed-everything": _of(lambda m: transpose(_everything(m))),
    "choose": _of(lambda m: Choose(m.integers(0, 3), (m.dense(6, 5), m.low_rank(6, 2, 5), m.semi_sparse(6, 5, 2)))),
    "mixed-dtypes": _mixed,
    "identity-in-product": _of(lambda m: Product(Product(m.dense(6, 4), Identity(4)), m.diagonal(4))),
    "diagonals": _of(lambda m: Product(m.diagonal(6), Product(m.diagonal(6), Product(m.diagonal(6), m.dense(6, 4))))),
    "selects": _of(lambda m: Product(m.select(4, 6), Product(m.select(6, 8, torch.uint8), m.select(8, 10)))),
    "nested-sums": _of(lambda m: Sum((Sum((m.dense(6, 6), m.dense(6, 6))), Sum((Sum((Identity(6),)), m.diagonal(6)))))),
    "nested-stacks": _of(lambda m: Stack((Stack((m.dense(2, 6),)), Stack((Identity(6), m.select(3, 6)))))),
    "nested-scales": _of(lambda m: m.scaled(m.scaled(Scaled(torch.ones(()), m.scaled(m.dense(5, 4)))))),
    "everything": _of(_everything),
    "everything-float64": _of(_everything, torch.float64),
}


@st.composite
def operators(draw: st.DrawFn, max_depth: int = 3) -> LinearOperator:
    """Random expressions of at most ``max_depth`` combinators in depth, with mixed dtypes and shared parts."""
    return _Draws(draw, Maker(draw(st.integers(0, 2**16)))).operator(draw(_SIZE), draw(_SIZE), max_depth)


_SIZE = st.integers(1, 7)


@dataclass(frozen=True, eq=False)
class _Draws:
    draw: st.DrawFn
    maker: Maker
    pool: dict[tuple[int, int], list[LinearOperator]] = field(default_factory=dict)

    def operator(self, out: int, inner: int, depth: int) -> LinearOperator:
        pool = self.pool.setdefault((out, inner), [])
        if pool and self.draw(st.booleans()):
            return self.draw(st.sampled_from(pool))
        combine = depth > 0 and self.draw(st.booleans())
        made = self.combinator(out, inner, depth - 1) if combine else self.leaf(out, inner)
        pool.append(made)
        return made

    def leaf(self, out: int, inner: int) -> LinearOperator:
        m = Maker(int(self.maker.integers(0, 2**31, 1)), self.draw(st.sampled_from(DTYPES)))
        kinds: dict[str, Callable[[], LinearOperator]] = {
            "dense": lambda: m.dense(out, inner),
            "select": lambda: m.select(out, inner),
            "semi": lambda: m.semi_sparse(out, inner, self.draw(st.integers(1, 3))),
            "blocks": lambda: m.block_sparse((out, 1), (1, inner), self.draw(st.integers(1, out + 1))),
            "quantized": lambda: m.quantized(out, inner, self.draw(_SIZE), zero=self.draw(st.booleans())),
            "transposed": lambda: transpose(m.semi_sparse(inner, out, 2)),
        }
        if out == inner:
            kinds |= {"identity": lambda: Identity(out), "diagonal": lambda: m.diagonal(out)}
        return kinds[self.draw(st.sampled_from(sorted(kinds)))]()

    def combinator(self, out: int, inner: int, depth: int) -> LinearOperator:
        if out % 2 == 0 and inner % 2 == 0 and self.draw(st.booleans()):
            halves = self.operator(out // 2, inner // 2, depth), self.operator(2, 2, depth)
            return Kron(*(halves if self.draw(st.booleans()) else halves[::-1]))
        match self.draw(st.sampled_from(["product", "sum", "stack", "scaled", "choose", "transposed"])):
            case "product":
                middle = self.draw(_SIZE)
                return Product(self.operator(out, middle, depth), self.operator(middle, inner, depth))
            case "sum":
                return Sum(self.several(out, inner, depth))
            case "stack":
                cut = self.draw(st.integers(0, out - 1))
                sizes = [size for size in (cut, out - cut) if size]
                return Stack(tuple(self.operator(size, inner, depth) for size in sizes))
            case "scaled":
                one = self.draw(st.booleans())
                return Scaled(torch.ones(()) if one else self.maker.normal(), self.operator(out, inner, depth))
            case "choose":
                options = self.several(out, inner, depth)
                return Choose(self.maker.integers(0, len(options)), options)
            case _:
                return transpose(self.operator(inner, out, depth))

    def several(self, out: int, inner: int, depth: int) -> tuple[LinearOperator, ...]:
        return tuple(self.operator(out, inner, depth) for _ in range(self.draw(st.integers(1, 3))))
