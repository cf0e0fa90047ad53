"""The best low-rank approximation against oracles: brute force, other routes to the optimum, exact identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.calibrate import Moments
from lrcompile.spectrum import Metric, Spectrum, importance_matrix, metric_matrix, sampling_shrink, spectrum

METRICS: tuple[Metric, ...] = ("plain", "diagonal", "whitened")
SHAPES = [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1), (7, 40), (40, 7)]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, channels: int, seed: int = 1, *, offset: float = 0.5) -> Tensor:
    """Correlated vectors (tokens, channels) with a mean, float64."""
    mixing = normal(channels, channels, seed=seed) * torch.logspace(0, -1.5, channels, dtype=torch.float64)
    return normal(tokens, channels, seed=seed + 1) @ mixing.T + offset * normal(channels, seed=seed + 2)


def moments(rows: Tensor) -> Moments:
    """Exact moments, held in float64."""
    absolute = rows.abs()
    return Moments(rows.T @ rows, rows.sum(0), absolute.sum(0), absolute.amax(0), tokens=len(rows), samples=1)


def matrix(found: Moments | None, metric: Metric, *, center: bool = False, damp: float = 0.0) -> Tensor | None:
    return metric_matrix(found, metric, center=center, shrink=0.0, damp=damp, alpha=0.5)


def full(metric: Tensor | None, size: int) -> Tensor:
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(metric) if metric.ndim == 1 else metric


def loss(weight: Tensor, factors: tuple[Tensor, Tensor], metric: Tensor) -> float:
    difference = factors[0] @ factors[1] - weight.double()
    return float(((difference @ metric) * difference).sum())


def brute_force(weight: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Truncated SVD in the coordinates of the metric's symmetric root; pseudo-inverse where it is singular."""
    values, vectors = torch.linalg.eigh(metric)
    values = torch.where(values > 1e-12 * values[-1], values, 0.0)
    root = vectors * values.sqrt()
    inverse = vectors * torch.where(values > 0, values.rsqrt(), 0.0)
    left, singular, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ inverse.T


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tails_are_the_errors_of_the_factors(kind: Metric, shape: tuple[int, int]):
    weight = normal(*shape)
    metric = matrix(moments(inputs(300, shape[1])), kind)
    found, h = spectrum(weight, metric), full(metric, shape[1])
    total = float(found.tails[0])
    assert found.tails.shape == (min(shape) + 1,)
    assert total == pytest.approx(float(((weight @ h) * weight).sum()), rel=1e-10)
    for rank in range(min(shape) + 1):
        left, right = found.factors(rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert loss(weight, (left, right), h) == pytest.approx(float(found.tails[rank]), rel=1e-6, abs=1e-10 * total)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_no_matrix_of_the_rank_is_better_than_brute_force_says(kind: Metric, shape: tuple[int, int]):
    weight = normal(*shape)
    metric = matrix(moments(inputs(300, shape[1])), kind)
    h = full(metric, shape[1])
    for rank in (1, 4, 9):
        left, right = spectrum(weight, metric).factors(rank)
        torch.testing.assert_close(left @ right, brute_force(weight, h, rank), rtol=1e-6, atol=1e-7)


@quick
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 10**6), st.integers(1, 40), st.data())
def test_random_factors_never_beat_the_tail(out: int, into: int, seed: int, tokens: int, data: st.DataObject):
    """Also with fewer tokens than channels, where the metric is singular."""
    weight = normal(out, into, seed=seed)
    metric = matrix(moments(inputs(tokens, into, seed=seed)), "whitened", damp=1e-9)
    assert metric is not None
    rank = data.draw(st.integers(0, min(out, into)))
    found = spectrum(weight, metric)
    mine = loss(weight, found.factors(rank), metric)
    random = normal(out, rank, seed=seed + 5)
    best_right = torch.linalg.lstsq(random, weight).solution if rank else normal(0, into)
    scale = 1e-7 * float(found.tails[0]) + 1e-12
    assert mine <= loss(weight, (random, best_right), metric) + scale
    assert mine == pytest.approx(float(found.tails[rank]), rel=1e-5, abs=scale)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (24, 24)])
def test_both_routes_give_one_optimum(shape: tuple[int, int]):
    """Projection of the outputs where wide, Cholesky where tall; a square weight goes either way."""
    weight, metric = normal(*shape), matrix(moments(inputs(400, shape[1])), "whitened")
    assert metric is not None
    found = spectrum(weight, metric)
    energies = torch.linalg.svdvals(weight @ torch.linalg.cholesky(metric)).square()
    torch.testing.assert_close(found.energies, energies[: len(found.energies)], rtol=1e-8, atol=1e-9)
    rank = min(shape) // 3
    projector = torch.linalg.eigh(weight @ metric @ weight.T).eigenvectors[:, -rank:]
    left, right = found.factors(rank)
    torch.testing.assert_close(left @ right, projector @ projector.T @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(10, 32), (32, 10), (32, 32)])
def test_a_singular_metric_is_approximated_on_what_it_sees(shape: tuple[int, int]):
    weight, rows = normal(*shape), inputs(6, shape[1])
    metric = matrix(moments(rows), "whitened")
    left, right = spectrum(weight, metric).factors(min(6, *shape))
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(rows @ (left @ right).T, rows @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(8, 14), (14, 8)])
def test_dead_channels_do_no_harm(kind: Metric, shape: tuple[int, int]):
    rows = inputs(200, shape[1])
    rows[:, [0, 3]] = 0.0
    for damp in (0.0, 1e-5):
        metric = matrix(moments(rows), kind, damp=damp)
        found, weight = spectrum(normal(*shape), metric), normal(*shape)
        left, right = found.factors(min(shape))
        assert left.isfinite().all() and right.isfinite().all() and found.tails.isfinite().all()
        torch.testing.assert_close(rows @ (left @ right).T, rows @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", METRICS)
def test_no_tokens_and_all_zero_inputs(kind: Metric):
    for found in (Moments.zeros(8), moments(torch.zeros(20, 8, dtype=torch.float64))):
        for shape in ((5, 8), (11, 8)):
            for damp in (0.0, 1e-5):
                left, right = spectrum(normal(*shape), matrix(found, kind, damp=damp)).factors(3)
                assert left.isfinite().all() and right.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("kind", METRICS)
def test_full_rank_gives_the_weight_back(kind: Metric, shape: tuple[int, int], dtype: torch.dtype):
    weight = normal(*shape).to(dtype)
    left, right = spectrum(weight, matrix(moments(inputs(300, shape[1])), kind)).factors(min(shape))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(left @ right, weight.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_are_balanced_signed_and_reproducible(kind: Metric, shape: tuple[int, int]):
    weight, metric = normal(*shape).float(), matrix(moments(inputs(300, shape[1])), kind)
    left, right = spectrum(weight, metric).factors(7)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-10, atol=0.0)
    assert (left.gather(0, left.abs().argmax(0)[None]) > 0).all()
    again = spectrum(weight.clone(), None if metric is None else metric.clone()).factors(7)
    assert all(torch.equal(a, b) for a, b in zip((left, right), again, strict=True))


def test_small_ranks_are_prefixes_of_large_ones():
    found = spectrum(normal(12, 20), matrix(moments(inputs(300, 20)), "whitened"))
    small, large = found.factors(3), found.factors(9)
    torch.testing.assert_close(small[0], large[0][:, :3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small[1], large[1][:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_centering_makes_the_mean_exact_and_the_tail_the_error(shape: tuple[int, int]):
    weight, rows = normal(*shape), inputs(500, shape[1], offset=3.0)
    found = moments(rows)
    centered = spectrum(weight, matrix(found, "whitened", center=True))
    plain = spectrum(weight, matrix(found, "whitened"))
    for rank in (2, 6, 11):
        left, right = centered.factors(rank)
        shift = (weight - left @ right) @ found.mean()
        moved = rows @ (left @ right).T + shift
        torch.testing.assert_close(moved.mean(0), (rows @ weight.T).mean(0), rtol=1e-9, atol=1e-9)
        error = float((moved - rows @ weight.T).square().sum(1).mean())
        assert error == pytest.approx(float(centered.tails[rank]), rel=1e-6)
        assert error <= float(plain.tails[rank]) * (1 + 1e-9)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_errors_in_another_metric(kind: Metric, shape: tuple[int, int]):
    """The error at every rank of an approximation that was chosen in one metric and is judged in another."""
    weight, found = normal(*shape), moments(inputs(300, shape[1]))
    chosen, other = spectrum(weight, matrix(found, kind, damp=0.1)), found.second()
    errors = chosen.errors(other)
    for rank in (0, 3, 8, min(shape)):
        expected = loss(weight, chosen.factors(rank), other)
        assert float(errors[rank]) == pytest.approx(expected, rel=1e-5, abs=1e-7 * float(errors[0]))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_deficient_and_zero_weights(shape: tuple[int, int]):
    metric = matrix(moments(inputs(300, shape[1])), "whitened")
    deficient = normal(shape[0], 3) @ normal(3, shape[1], seed=9)
    found = spectrum(deficient, metric)
    assert float(found.tails[3]) <= 1e-12 * float(found.tails[0])
    left, right = found.factors(8)
    torch.testing.assert_close(left @ right, deficient, rtol=1e-6, atol=1e-6)
    nothing = spectrum(torch.zeros(shape), metric)
    assert nothing.tails.tolist() == [0.0] * (min(shape) + 1)
    left, right = nothing.factors(4)
    assert torch.equal(left @ right, torch.zeros(shape, dtype=torch.float64))


def test_tails_fall_and_end_at_zero():
    for kind in METRICS:
        found: Spectrum = spectrum(normal(9, 15), matrix(moments(inputs(100, 15)), kind))
        assert (found.tails.diff() <= 0).all() and float(found.tails[-1]) == 0.0


def test_the_diagonal_metric_scales_channels_by_their_mean_magnitude():
    rows = inputs(100, 6)
    metric = matrix(moments(rows), "diagonal")
    assert metric is not None
    np.testing.assert_allclose(metric.numpy(), rows.abs().mean(0).numpy(), rtol=1e-12)  # (mean |x| ** 0.5) squared


def test_shrinking_spares_the_variances_and_the_mean():
    rows = inputs(400, 10, offset=5.0)
    found = moments(rows)
    for center in (False, True):
        shrunk = metric_matrix(found, "whitened", center=center, shrink=1.0, damp=0.0, alpha=0.5)
        assert shrunk is not None
        mean = found.mean()
        expected = torch.diag(found.covariance().diagonal()) + (0.0 if center else torch.outer(mean, mean))
        torch.testing.assert_close(shrunk, expected, rtol=1e-10, atol=1e-10)


def test_how_far_few_tokens_shrink():
    correlated = inputs(2000, 40)
    shares = [sampling_shrink(moments(correlated[:tokens])) for tokens in (20, 80, 320, 2000)]
    assert shares == sorted(shares, reverse=True) and shares[0] < 0.7 and shares[-1] < 0.02
    assert sampling_shrink(moments(normal(2000, 40))) > 0.5  # of independent channels the diagonal is the truth
    few_dimensions = normal(80, 2, seed=4) @ normal(2, 40, seed=5)
    assert sampling_shrink(moments(few_dimensions)) < shares[1]
    assert sampling_shrink(Moments.zeros(4)) == 1.0
    assert sampling_shrink(moments(normal(50, 1))) == 0.0
    assert 0.0 <= sampling_shrink(moments(torch.zeros(9, 4, dtype=torch.float64))) <= 1.0


# -- both sides ---------------------------------------------------------------------------------


def two_sided_loss(weight: Tensor, factors: tuple[Tensor, Tensor], inner: Tensor, outer: Tensor) -> float:
    difference = factors[0] @ factors[1] - weight.double()
    return float(((outer @ difference @ inner) * difference).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_two_sided_optimum(shape: tuple[int, int], metric: Metric):
    """The truncation between the symmetric roots of G and H has the same loss, and the tails say what it is."""
    out, into = shape
    weight = normal(out, into, seed=3)
    inner = matrix(moments(inputs(200, into)), metric, damp=1e-6)
    outer_rows = inputs(300, out, seed=9)
    outer = outer_rows.T @ outer_rows / 300 + 1e-6 * torch.eye(out, dtype=torch.float64)
    found = spectrum(weight, inner, outer)
    whole = full(inner, into)
    values, vectors = torch.linalg.eigh(outer)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    for rank in {1, min(shape) // 2, min(shape)}:
        if rank == 0:
            continue
        best = inverse @ brute_force(root @ weight, whole, rank)
        difference = best - weight
        optimum = float(((outer @ difference @ whole) * difference).sum())
        ours = two_sided_loss(weight, found.factors(rank), whole, outer)
        scale = float(found.tails[0])
        assert ours == pytest.approx(optimum, rel=1e-6, abs=1e-9 * scale)
        assert float(found.tails[rank]) == pytest.approx(ours, rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_in_any_two_metrics(shape: tuple[int, int]):
    """For directions that neither metric makes orthogonal the cross terms count."""
    out, into = shape
    weight = normal(out, into, seed=5)
    found = spectrum(weight, matrix(moments(inputs(100, into)), "diagonal"))
    inner, outer = (rows.T @ rows for rows in (inputs(50, into, seed=6), inputs(60, out, seed=7)))
    errors = found.errors(inner, outer)
    assert len(errors) == min(shape) + 1 and float(errors[-1]) == 0
    for rank in range(1, min(shape)):
        expected = two_sided_loss(weight, found.factors(rank), inner, outer)
        assert float(errors[rank]) == pytest.approx(expected, rel=1e-5, abs=1e-6 * float(errors[0]))


def test_importance_is_shrunk_towards_its_diagonal_and_damped():
    rows = inputs(30, 6, offset=0.0)
    full_moments = moments(rows)
    found = importance_matrix(full_moments, damp=0.0)
    second = full_moments.second()
    torch.testing.assert_close(found.diagonal(), second.diagonal())
    away = ~torch.eye(6, dtype=torch.bool)
    share = (found / second)[away]
    assert float(share.max() - share.min()) < 1e-9 and 0.3 < float(share[0]) < 1.0
    assert float(torch.linalg.eigvalsh(importance_matrix(full_moments))[0]) > 0


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_an_importance_that_rounding_made_indefinite(shape: tuple[int, int]):
    """Gradients that all but vanish give such matrices; channels then count by themselves."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outer = torch.full((shape[0], shape[0]), 1e-40, dtype=torch.float64)
    outer.diagonal().copy_(torch.linspace(0.2, 0.5, shape[0]) * 1e-40)
    found = spectrum(weight, None, outer)
    left, right = found.factors(min(shape))
    assert torch.allclose(left.double() @ right.double(), weight.double(), atol=1e-5)
