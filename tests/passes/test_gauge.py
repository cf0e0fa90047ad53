"""The identity gauge: the same matrix in fewer values, and rows that keep the rounding small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.gauge import best_window, identity_gauge
from lrcompile.linop import Identity, Product, Select, Stack, cost, densify, leaves


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_same_matrix_with_fewer_values(out: int, into: int, data: st.DataObject):
    rank = data.draw(st.integers(1, min(out, into)))
    left, right = normal(out, rank, seed=out), normal(rank, into, seed=into)
    found = identity_gauge(left, right, torch.float64)
    torch.testing.assert_close(densify(found), left @ right, rtol=1e-6, atol=1e-8)
    assert cost([(0, found)]).parameters == rank * (out + into - rank)
    assert cost([(0, found)]).macs == rank * (out + into - rank)


def test_half_precision_takes_pivots_and_float32_a_window():
    left, right = normal(64, 24, seed=1), normal(24, 48, seed=2)
    wide, narrow = identity_gauge(left, right, torch.float32), identity_gauge(left, right, torch.float16)
    assert not any(isinstance(leaf, Select) for leaf in leaves(wide))
    assert isinstance(narrow, Product) and isinstance(narrow.left, Select)
    scale = float((left @ right).abs().max())
    assert float((densify(wide).double() - left @ right).abs().max()) < 1e-4 * scale
    assert float((densify(narrow).double() - left @ right).abs().max()) < 1e-2 * scale


def test_singular_windows_are_passed_over():
    """The first rows repeat each other: only a window that avoids them, or pivots, can work."""
    left = normal(40, 6, seed=3)
    left[:30] = left[:1]
    assert best_window(left, range(35))[0] >= 29
    left[20:] = left[:1]
    left[[3, 9, 14, 19, 25]] = normal(5, 6, seed=4)  # independent rows, never six side by side
    assert best_window(left, range(35))[1] == float("inf")
    right = normal(6, 20, seed=5)
    found = identity_gauge(left, right, torch.float32)
    torch.testing.assert_close(densify(found).double(), left @ right, rtol=1e-4, atol=1e-4)


def test_factors_of_smaller_rank():
    left, right = normal(30, 4, seed=6) @ normal(4, 10, seed=7), normal(10, 25, seed=8)
    found = identity_gauge(left, right, torch.float32)
    torch.testing.assert_close(densify(found).double(), left @ right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [5, 12])
def test_whole_rank_and_window_at_an_end(rank: int):
    left = torch.cat([torch.eye(rank, dtype=torch.float64), 1e-6 * normal(12 - rank, rank)])
    found = identity_gauge(left, normal(rank, 9), torch.float32)
    assert isinstance(found, Product)
    match found.left:
        case Stack(parts=(Identity(size), *_)) | Identity(size):
            assert size == rank
        case _:
            pytest.fail("the identity stands first")
