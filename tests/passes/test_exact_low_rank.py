"""Only weights that are rank deficient to rounding are factorised, and nothing is lost by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import densify, structure
from lrcompile.passes.exact_low_rank import ExactLowRank, factorise, numerical_rank, rank_at_least
from lrcompile.rewrite import Context, Refused, Rewritten

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def product(out: int, into: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A product of two random factors, rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    return (left @ right / (rank * into) ** 0.5).to(dtype)


def apply(weight: Tensor, *, align: int = 8):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    graph = ModuleGraph(nn.Sequential(layer))
    (outcome,) = ExactLowRank().apply(graph, Context(graph, align=align))
    return graph, outcome


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (200, 200)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_a_rounded_product_is_found_and_kept(shape: tuple[int, int], rank: int, dtype: torch.dtype):
    weight = product(*shape, rank, dtype)
    graph, outcome = apply(weight)
    assert outcome == Rewritten("0", f"rank {rank}")
    new = densify(graph.linear_sites()[0].operator).double()
    error = float((new - weight.double()).norm() / weight.double().norm())
    assert error <= torch.finfo(dtype).eps * (50 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("rank", [8, 24])
def test_a_product_that_was_computed_in_float32(rank: int):
    """A merged adapter: accumulation leaves more noise than storage does."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, rank, generator=generator) @ torch.randn(rank, 256, generator=generator)
    assert apply(weight)[1] == Rewritten("0", f"rank {rank}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_weight_stays(dtype: torch.dtype):
    """Also in half precision, where ``max(shape) * eps`` would exceed every singular value."""
    weight = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    graph, outcome = apply(weight.to(dtype))
    assert isinstance(outcome, Refused) and "is not below break-even" in outcome.reason
    assert rank_at_least(weight.to(dtype), float(weight.double().square().sum())) > 180
    assert not graph.replacements


def test_a_decaying_spectrum_is_not_rounding():
    """Singular values of a thousandth of the largest say something; dropping them is not exact."""
    left, _, right = torch.linalg.svd(product(64, 64, 64, torch.float64))
    weight = ((left * torch.logspace(0, -5, 64, dtype=torch.float64)) @ right).float()
    assert isinstance(apply(weight)[1], Refused)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_dropped_is_below_the_rounding_of_the_weight(dtype: torch.dtype):
    """Of a weight that decays to nothing: new error against the real one at most twice what storing it cost."""
    left, _, right = torch.linalg.svd(product(64, 64, 64, torch.float64))
    real = (left * torch.logspace(0, -8, 64, dtype=torch.float64)) @ right
    stored = real.to(dtype).double()
    rank, factors = factorise(real.to(dtype))
    assert factors is not None and rank < 30
    assert (factors[0] @ factors[1] - real).norm() <= 2 * (stored - real).norm()


def test_rank_above_break_even_stays():
    assert apply(product(64, 64, 40))[1] == Refused("0", "rank 40 or more of 64 is not below break-even")


def test_small_and_zero_weights():
    assert apply(product(12, 64, 2))[1] == Refused("0", "too small to gain")
    graph, outcome = apply(torch.zeros(32, 48))
    assert outcome == Rewritten("0", "rank 1")
    assert torch.equal(densify(graph.linear_sites()[0].operator), torch.zeros(32, 48))


def test_what_is_replaced_already_is_left_alone():
    graph, _ = apply(product(64, 96, 5))
    before = structure(graph.linear_sites()[0].operator)
    (outcome,) = ExactLowRank().apply(graph, Context(graph))
    assert outcome == Refused("0", "not a plain matrix")
    assert structure(graph.linear_sites()[0].operator) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 20, 48])
def test_the_cheap_bound_is_a_bound(rank: int, dtype: torch.dtype):
    weight = product(48, 80, rank, dtype)
    exact = numerical_rank(weight, torch.linalg.svdvals(weight.double()))
    assert rank_at_least(weight, float(weight.double().square().sum())) <= exact <= rank
    assert exact >= rank - 2  # the smallest of 48 singular values may be rounding
