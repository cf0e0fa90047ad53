"""The laws of the algebra, for every operator of the market."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from lrcompile.linop import (
    BlockSparse,
    Choose,
    Diagonal,
    Identity,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    Transposed,
    apply,
    children,
    collapse,
    densify,
    leaves,
    map_leaves,
    rebuild,
    rows,
    same,
    simplify,
    structure,
    tensors,
    transpose,
)
from lrcompile.linop.ops import dtype_of
from lrcompile.linop.tree import map_children
from tests.laws.market import MARKET, operators

Law = Callable[[LinearOperator], None]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
LEADING = [(), (0,), (1,), (2, 3), (2, 20)]


def law(check: Law) -> Callable[[], None]:
    """A test of one law over random expressions; ``MARKET`` goes through the same checks."""
    quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)

    @functools.wraps(check)
    def in_float64_by_default(op: LinearOperator) -> None:
        # what stores no floats (Identity, Select) has torch's default dtype
        torch.set_default_dtype(torch.float64)
        try:
            check(op)
        finally:
            torch.set_default_dtype(torch.float32)

    LAWS.append(in_float64_by_default)
    return quick(given(operators())(in_float64_by_default))


LAWS: list[Law] = []


def in_double(op: LinearOperator) -> LinearOperator:
    """The same numbers, held in float64."""
    op = map_children(op, in_double)
    wide = {name: t.double() for name, t in fields(op).items() if isinstance(t, Tensor) and t.is_floating_point()}
    return dataclasses.replace(cast(Any, op), **wide)


def fields(op: LinearOperator) -> dict[str, Any]:
    return {f.name: getattr(op, f.name) for f in dataclasses.fields(cast(Any, op))}


def magnitude(op: LinearOperator) -> Tensor:
    """A bound on the size of what is added up in each entry: what rounding errors are relative to."""
    match op:
        case Product():
            return magnitude(op.left) @ magnitude(op.right)
        case Sum():
            return torch.stack([magnitude(term) for term in op.terms]).sum(0)
        case Stack():
            return torch.cat([magnitude(part) for part in op.parts])
        case Scaled():
            return op.scale.double().abs() * magnitude(op.operator)
        case Choose():
            return magnitude(op.operators[int(op.index)])
        case Transposed():
            return magnitude(op.operator).mT
        case Quantized():
            wide = dataclasses.replace(op, codes=op.codes.double().abs(), zero=None, scale=op.scale.double().abs())
            return densify(wide) + (0 if op.zero is None else densify(wide).max() + 256 * op.scale.double().abs().max())
        case SemiSparse():
            return densify(dataclasses.replace(op, values=op.values.double().abs()))
        case _:
            return densify(in_double(op)).abs().double() + 1e-3


def assert_close(found: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Equal to the rounding of ``dtype`` (or of a leaf in float16), entry by entry."""
    error = (found.double() - exact).abs()
    bound = 64 * torch.finfo(dtype).eps * size + torch.finfo(dtype).smallest_normal
    assert found.shape == exact.shape
    assert bool((error <= bound).all()), f"{(error / bound).max()} times the bound"


def coarsest(op: LinearOperator) -> torch.dtype:
    """The dtype whose rounding a result in ``dtype_of(op)`` carries: inner parts are computed in their own."""
    found = {t.dtype for _, t in tensors(op) if t.is_floating_point() and t.ndim} | {dtype_of(op)}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def draw_input(op: LinearOperator, leading: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(leading))
    return torch.randn(*leading, op.shape[1], generator=generator, dtype=torch.float64).to(dtype)


def by_definition(op: LinearOperator) -> list[list[float]] | None:
    """The entries of a leaf, one by one, as its docstring defines them."""
    entries = [[0.0] * op.shape[1] for _ in range(op.shape[0])]
    match op:
        case Identity() | Diagonal():
            for i in range(op.shape[0]):
                entries[i][i] = 1.0 if isinstance(op, Identity) else op.values[i].item()
        case Select():
            for i, column in enumerate(op.indices.tolist()):
                entries[i][column] = 1.0
        case SemiSparse():
            for i, (values, columns) in enumerate(zip(op.values.tolist(), op.indices.tolist(), strict=True)):
                for value, column in zip(values, columns, strict=True):
                    entries[i][column] += value
        case BlockSparse():
            for block, down, across in zip(op.blocks.tolist(), op.rows.tolist(), op.columns.tolist(), strict=True):
                for i, line in enumerate(block, start=down * len(block)):
                    for j, value in enumerate(line, start=across * len(line)):
                        entries[i][j] += value
        case Quantized():
            for i, j in itertools.product(range(op.shape[0]), range(op.shape[1])):
                zero = 0 if op.zero is None else op.zero[i, j // op.group].item()
                entries[i][j] = op.scale[i, j // op.group].item() * (op.codes[i, j].item() - zero)
        case _:
            return None
    return entries


@law
def test_leaves_are_the_matrices_that_they_define(op: LinearOperator) -> None:
    for leaf in set(leaves(op)):
        expected = by_definition(leaf)
        if expected is not None:
            exact = torch.tensor(expected)
            assert_close(densify(in_double(leaf)), exact, exact.abs() + 1, torch.float64)


@law
def test_apply_is_the_dense_product(op: LinearOperator) -> None:
    dense, size = densify(in_double(op)), magnitude(op)
    assert dense.shape == op.shape
    for leading in LEADING:
        x = draw_input(op, leading)
        assert_close(apply(op, x), x @ dense.T, x.abs() @ size.T, torch.float64)


@law
def test_apply_follows_the_input_dtype(op: LinearOperator) -> None:
    dense, size = densify(in_double(op)), magnitude(op)
    for dtype in (torch.float32, torch.float64):
        x = draw_input(op, (3,), dtype)
        y = apply(op, x)
        assert y.dtype == dtype
        assert_close(y, x.double() @ dense.T, x.double().abs() @ size.T, dtype)


@law
def test_densify_rounds_no_worse_than_its_dtypes(op: LinearOperator) -> None:
    found = densify(op)
    assert found.dtype == dtype_of(op)
    assert_close(found, densify(in_double(op)), magnitude(op), coarsest(op))


@law
def test_transpose_is_an_involution(op: LinearOperator) -> None:
    assert transpose(op).shape == op.shape[::-1]
    assert same(transpose(transpose(op)), op)
    exact = in_double(op)
    assert_close(densify(transpose(exact)), densify(exact).T, magnitude(op).T, torch.float64)


@law
def test_rows_are_the_rows_of_the_matrix(op: LinearOperator) -> None:
    exact = in_double(op)
    dense, size = densify(exact), magnitude(op)
    every = torch.arange(op.shape[0])
    for index in (every, every.flip(0)[None].expand(2, -1), every[0], every[:0], every.to(torch.int32)):
        at = index.long()
        assert_close(rows(exact, index), dense[at], size[at], torch.float64)
        assert rows(op, index).dtype == dtype_of(op)


@law
def test_simplify_keeps_the_matrix_and_is_idempotent(op: LinearOperator) -> None:
    exact = in_double(op)
    for change in (simplify, collapse):
        done = change(exact)
        assert_close(densify(done), densify(exact), magnitude(op), torch.float64)
        assert change(done) is done
        assert change(exact) is exact or not same(change(exact), exact)
    assert densify(simplify(op)).dtype == dtype_of(simplify(op))


@law
def test_structure_and_tensors_rebuild_the_operator(op: LinearOperator) -> None:
    spec, stored = structure(op), dict(tensors(op))
    assert hash(spec) == hash(structure(op))
    through_json = rebuild(json.loads(json.dumps(spec)), stored)
    assert same(through_json, op)
    assert structure(through_json) == spec
    assert all(dict(tensors(through_json))[name] is value for name, value in stored.items())


@law
def test_map_leaves_keeps_identity_and_sharing(op: LinearOperator) -> None:
    assert map_leaves(op, lambda leaf: leaf) is op
    calls: list[LinearOperator] = []

    def copy(leaf: LinearOperator) -> LinearOperator:
        calls.append(leaf)
        return dataclasses.replace(cast(Any, leaf))

    copied = map_leaves(op, copy)
    assert same(copied, op)
    assert len(calls) == len(set(calls)) == len(set(leaves(op))) == len(set(leaves(copied)))
    assert len(set(nodes(op))) == len(set(nodes(copied)))
    assert not set(leaves(op)) & set(leaves(copied))


def nodes(op: LinearOperator) -> list[LinearOperator]:
    return [op, *(node for child in children(op) for node in nodes(child))]


@law
def test_gradients_flow_into_every_used_leaf(op: LinearOperator) -> None:
    exact = map_leaves(in_double(op), as_trained)
    dense = densify(exact)
    trained = {id(t): t for _, t in tensors(exact) if t.requires_grad}.values()
    if not dense.requires_grad:
        assert not apply(exact, draw_input(op, (4,))).requires_grad
        return
    x = draw_input(op, (4,))
    weights = draw_input(transpose(op), (4,))
    through_apply = torch.autograd.grad((apply(exact, x) * weights).sum(), trained, allow_unused=True)
    through_dense = torch.autograd.grad((x @ dense.T * weights).sum(), trained, allow_unused=True)
    for mine, reference in zip(through_apply, through_dense, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None and reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8 * float(1 + reference.abs().max()))


def as_trained(leaf: LinearOperator) -> LinearOperator:
    floats = {n: t.clone().requires_grad_() for n, t in tensors(leaf) if t.is_floating_point()}
    return dataclasses.replace(cast(Any, leaf), **floats)


@pytest.mark.parametrize("name", MARKET)
def test_market(name: str) -> None:
    for check in LAWS:
        check(MARKET[name](0))


def test_a_seed_is_an_operator() -> None:
    assert all(same(build(3), build(3)) for build in MARKET.values())
