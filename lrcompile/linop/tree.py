"""Operators as trees: walking, mapping, describing and rebuilding them.

All of it is driven by the dataclass fields of an operator, so a new operator type (a
frozen dataclass with ``eq=False``) needs no registration here. A field holds a tensor, an
operator, a non-empty tuple of operators, or a plain value (None, bool, int, float, str
and tuples of these).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from lrcompile.errors import InvalidInputError
from lrcompile.linop.expr import BlockSparse, LinearOperator, Quantized, SemiSparse

_PLAIN = (type(None), bool, int, float, str)


def slots(op: LinearOperator) -> Iterator[tuple[str, object]]:
    """The (name, value) of each field that the constructor takes."""
    return ((name, getattr(op, name)) for name in _field_names(type(op)))


@cache
def _field_names(kind: type[LinearOperator]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cast(Any, kind)) if field.init)


def _is_group(value: object) -> TypeGuard[tuple[LinearOperator, ...]]:
    return isinstance(value, tuple) and bool(value) and all(isinstance(item, LinearOperator) for item in value)


def _named_children(op: LinearOperator) -> Iterator[tuple[str, LinearOperator]]:
    for name, value in slots(op):
        if isinstance(value, LinearOperator):
            yield name, value
        elif _is_group(value):
            yield from ((f"{name}.{i}", item) for i, item in enumerate(value))


def children(op: LinearOperator) -> tuple[LinearOperator, ...]:
    """The operators directly below, in the order of the fields; empty for a leaf."""
    return tuple(child for _, child in _named_children(op))


def leaves(op: LinearOperator) -> Iterator[LinearOperator]:
    """The leaf operators from left to right; a leaf used twice comes twice."""
    below = children(op)
    if not below:
        yield op
    for child in below:
        yield from leaves(child)


def own_tensors(op: LinearOperator) -> Iterator[tuple[str, Tensor]]:
    """The (field name, tensor) stored by this very node, without its children."""
    return ((name, value) for name, value in slots(op) if isinstance(value, Tensor))


def tensors(op: LinearOperator, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor under its path, like ``left.weight`` or ``terms.0.scale``.

    A shared tensor comes once for each path that leads to it.
    """
    for name, value in own_tensors(op):
        yield prefix + name, value
    for name, child in _named_children(op):
        yield from tensors(child, f"{prefix}{name}.")


def map_children(op: LinearOperator, f: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
    """The operator with ``f`` of its children; ``op`` itself where nothing changes."""
    changed: dict[str, object] = {}
    for name, value in slots(op):
        if isinstance(value, LinearOperator):
            new: object = f(value)
        elif _is_group(value):
            mapped = tuple(f(item) for item in value)
            new = value if all(a is b for a, b in zip(mapped, value, strict=True)) else mapped
        else:
            continue
        if new is not value:
            changed[name] = new
    return dataclasses.replace(cast(Any, op), **changed) if changed else op


def map_leaves(
    op: LinearOperator,
    f: Callable[[LinearOperator], LinearOperator],
    memo: dict[LinearOperator, LinearOperator] | None = None,
) -> LinearOperator:
    """Rebuilds an expression with ``f`` of its leaves.

    ``f`` is called once for each leaf object, so sharing survives, of inner nodes too. Pass
    one ``memo`` to several calls to keep what different expressions share.
    """
    known = {} if memo is None else memo

    def visit(node: LinearOperator) -> LinearOperator:
        if node not in known:
            known[node] = map_children(node, visit) if children(node) else f(node)
        return known[node]

    return visit(op)


def same(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether two expressions have one structure and equal tensors (bit for bit, NaN is unequal)."""
    if a is b:
        return True
    if structure(a) != structure(b):
        return False
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x is y or torch.equal(x, y.to(x.device)) for (_, x), (_, y) in pairs)


def structure(op: LinearOperator) -> tuple[Any, ...]:
    """What an expression is, without its values: a hashable tuple of types, shapes and dtypes.

    Only tuples, strings, numbers and None occur, so that it survives JSON (as nested
    lists) and comes back through :func:`rebuild`.

    Raises:
        InvalidInputError: a field holds something that cannot be described.
    """
    return (type(op).__name__, tuple(_describe(op, name, value) for name, value in slots(op)))


def _describe(op: LinearOperator, name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return name, "tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if isinstance(value, LinearOperator):
        return name, "operator", structure(value)
    if _is_group(value):
        return name, "operators", tuple(structure(item) for item in value)
    if _is_plain(value):
        return name, "value", value
    where = f"{type(op).__name__}.{name}"
    raise InvalidInputError(f"a field of type {type(value).__name__} has no structure", where=where)


def _is_plain(value: object) -> bool:
    return all(_is_plain(item) for item in value) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def rebuild(
    structure: Sequence[Any],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    memo: dict[Any, LinearOperator] | None = None,
) -> LinearOperator:
    """The operator with this structure and these tensors: the inverse of :func:`structure` and :func:`tensors`.

    Where equal parts get the very same tensor objects, they become one shared operator;
    pass one ``memo`` to several calls to share between expressions. Indices are not
    checked against their range.

    Raises:
        InvalidInputError: the structure is malformed, names an unknown operator, or a
            tensor is missing or differs in shape or dtype.
    """
    try:
        return _Builder(tensors, {} if memo is None else memo).build(_tupled(structure), prefix)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise InvalidInputError(f"malformed operator structure: {error}", where=prefix.rstrip(".")) from error


def _tupled(value: object) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def _known_types() -> dict[str, type[LinearOperator]]:
    found: dict[str, type[LinearOperator]] = {}
    queue = list(LinearOperator.__subclasses__())
    for kind in queue:
        found.setdefault(kind.__name__, kind)
        queue.extend(kind.__subclasses__())
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Builder:
    tensors: Mapping[str, Tensor]
    memo: dict[Any, LinearOperator]
    types: dict[str, type[LinearOperator]] = dataclasses.field(default_factory=_known_types)

    def build(self, spec: tuple[Any, ...], prefix: str) -> LinearOperator:
        kind, described = spec
        if kind not in self.types:
            raise InvalidInputError(f"unknown operator {kind!r}", where=prefix.rstrip("."))
        values = {name: self.value(f"{prefix}{name}", how, rest) for name, how, *rest in described}
        # identity is sharing: equal parts over the same objects are one operator
        key = (kind, tuple((name, _identity(value)) for name, value in values.items()))
        if key not in self.memo:
            self.memo[key] = self.types[kind](**values)
        return self.memo[key]

    def value(self, path: str, how: str, rest: list[Any]) -> Any:
        match how, rest:
            case "tensor", [dtype, shape]:
                return self.tensor(path, dtype, shape)
            case "operator", [spec]:
                return self.build(spec, f"{path}.")
            case "operators", [specs]:
                return tuple(self.build(spec, f"{path}.{i}.") for i, spec in enumerate(specs))
            case "value", [value] if _is_plain(value):
                return value
            case _:
                raise InvalidInputError(f"malformed operator structure: {how!r}", where=path)

    def tensor(self, path: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        if path not in self.tensors:
            raise InvalidInputError("the tensor is missing", where=path)
        found = self.tensors[path]
        if tuple(found.shape) != shape or str(found.dtype) != f"torch.{dtype}":
            have = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
            raise InvalidInputError(f"expected {dtype} {shape}, found {have}", where=path)
        return found


def _identity(value: Any) -> Any:
    """A key that keeps its object alive, so that an ``id`` in a memo cannot be taken over."""
    if isinstance(value, tuple):
        return tuple(_identity(item) for item in value)
    return (value,) if isinstance(value, LinearOperator) else _Kept(value) if isinstance(value, Tensor) else repr(value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def show(op: LinearOperator) -> str:
    """Short text, like ``Product(Dense 384x96, Dense 96x384)``; equal neighbours are counted."""
    texts = [show(child) for child in children(op)]
    if not texts:
        return f"{type(op).__name__} {op.shape[0]}x{op.shape[1]}{_detail(op)}"
    runs = [(text, sum(1 for _ in group)) for text, group in groupby(texts)]
    return f"{type(op).__name__}({', '.join(text if n == 1 else f'{n} * {text}' for text, n in runs)})"


def _detail(op: LinearOperator) -> str:
    match op:
        case SemiSparse():
            return f" {op.values.shape[1]}/row"
        case BlockSparse():
            return f" {op.blocks.shape[0]} blocks {op.blocks.shape[1]}x{op.blocks.shape[2]}"
        case Quantized():
            return f" {op.bits}-bit/{op.group}"
        case _:
            return ""
