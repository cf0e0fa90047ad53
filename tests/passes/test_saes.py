"""The SAES-SVD baseline: SVD-LLM where nothing moved, the best β of its range, the anchored optimum, a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.anchored import RIDGE, anchored
from benchmarks.saes import CLAMP, aces, energies, factors, lost, roots, sequential, uniform, uniform_rank
from lrcompile.spectrum import spectrum
from tests.graphs.modules import llama


def streams(seed: int, out: int, into: int, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight, inputs of the compressed and the uncompressed model, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    now = draw(tokens, into) @ draw(into, into)
    before = now @ (torch.eye(into, dtype=torch.float64) + 0.2 * draw(into, into)) + 0.3 * draw(tokens, into)
    return draw(out, into), now, before, now.T @ now / tokens, (before - now).T @ now / tokens


sizes = st.integers(3, 14)
seeds = st.integers(0, 10_000)


@settings(deadline=None)
@given(seeds, sizes, sizes, st.data())
def test_is_svd_llm_where_nothing_has_moved(seed: int, out: int, into: int, data: st.DataObject) -> None:
    weight, _, _, second, _ = streams(seed, out, into)
    rank = data.draw(st.integers(1, min(out, into)))
    left, right = factors(weight, second, torch.zeros_like(second), rank)
    expected = spectrum(weight, second).factors(rank)
    root, _ = roots(second)
    torch.testing.assert_close(left @ right @ root, expected[0] @ expected[1] @ root, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(seeds, sizes, sizes, st.data())
def test_no_other_beta_of_the_range_loses_less(seed: int, out: int, into: int, data: st.DataObject) -> None:
    weight, _, _, second, moved = streams(seed, out, into)
    root, inverse = roots(second)
    whole, shifted = weight @ root, weight @ moved @ inverse.T
    rank = data.draw(st.integers(1, max(1, min(out, into) - 1)))
    outside, total = energies(whole, shifted, rank)
    beta = aces(whole, shifted, rank)
    assert CLAMP[0] <= beta <= CLAMP[1]
    grid = torch.linspace(*CLAMP, 101).tolist()
    assert lost(beta, outside, total) <= min(lost(each, outside, total) for each in grid) + 1e-12


@settings(deadline=None)
@given(seeds, sizes, sizes, st.floats(0.1, 0.9))
def test_coefficients_are_those_of_the_projected_energies(seed: int, out: int, into: int, beta: float) -> None:
    weight, _, _, second, moved = streams(seed, out, into)
    root, inverse = roots(second)
    whole, shifted = weight @ root, weight @ moved @ inverse.T
    left, _, right = torch.linalg.svd(whole)
    mixed = whole + beta * shifted
    outside = left[:, 1:].T @ mixed @ right[1:].T  # what no leading direction of either side touches
    expected = float(outside.square().sum() / mixed.square().sum())
    assert lost(beta, *energies(whole, shifted, 1)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(seeds, sizes, sizes, st.floats(0.0, 1.0))
def test_is_the_best_of_its_rank_for_the_anchored_target(seed: int, out: int, into: int, beta: float) -> None:
    weight, now, before, second, moved = streams(seed, out, into)
    target = (1 - beta) * now @ weight.T + beta * before @ weight.T
    loss = lambda made: float((now @ made.T - target).square().sum())  # noqa: E731
    rank = max(1, min(out, into) // 2)
    left, right = factors(weight, second, moved, rank, (beta, beta))
    unaware = factors(weight, second, torch.zeros_like(second), rank)
    assert loss(left @ right) <= loss(unaware[0] @ unaware[1]) * (1 + 1e-9)
    nudged = loss(left @ (right + 1e-3 * torch.randn(right.shape, generator=torch.Generator().manual_seed(seed))))
    assert loss(left @ right) <= nudged * (1 + 1e-9)


def test_every_linear_of_a_model_gets_factors_of_its_budget() -> None:
    model, ids = llama(), torch.arange(96).reshape(6, 16) % 50
    before = {
        name: module.weight.clone() for name, module in model.named_modules() if ".layers." in name and _is(module)
    }
    found = sequential(model, list(ids.split(2)), uniform(0.5))
    assert set(found) == set(before)
    for name, (left, right) in found.items():
        weight = model.get_submodule(name).weight
        assert left.shape[1] == uniform_rank(weight, 0.5) and left.numel() + right.numel() <= 0.5 * weight.numel()
        torch.testing.assert_close(weight, left @ right)
        assert not torch.equal(weight, before[name])


def test_factors_of_full_rank_change_nothing() -> None:
    model, ids = llama(), torch.arange(96).reshape(6, 16) % 50
    reference = model(input_ids=ids).logits
    sequential(model, list(ids.split(2)), uniform(10.0))
    torch.testing.assert_close(model(input_ids=ids).logits, reference, rtol=1e-3, atol=1e-4)


def test_later_layers_are_fitted_to_what_the_compressed_ones_give() -> None:
    """In the second layer the inputs have moved, so its factors are not those of the uncompressed model's inputs."""
    model, ids = llama(), torch.arange(96).reshape(6, 16) % 50
    name, seen = "model.layers.1.mlp.down_proj", []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    model(input_ids=ids)
    handle.remove()
    second = seen[0].T @ seen[0] / len(seen[0])
    still = factors(linear.weight.clone(), second, torch.zeros_like(second), uniform_rank(linear.weight, 0.4))
    left, right = sequential(model, list(ids.split(2)), uniform(0.4))[name]
    assert not torch.allclose(left @ right, still[0] @ still[1], atol=1e-4)


def _is(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@settings(deadline=None, max_examples=25)
@given(seeds, sizes, sizes, st.floats(0.1, 1.0))
def test_an_anchored_target_is_the_ridge_regression(seed: int, out: int, into: int, beta: float) -> None:
    """At β 1 and no ridge to speak of it is the least-squares map from the moved inputs to the original outputs."""
    weight, now, before, second, moved = streams(seed, out, into)
    target = now @ weight.T + beta * (before - now) @ weight.T
    found = anchored(weight, second, moved, beta)

    def loss(made: Tensor) -> float:
        change = made - weight
        penalty = RIDGE * (change.square() * second.diagonal()).sum()
        return float((now @ made.T - target).square().sum() / len(now) + penalty)

    generator = torch.Generator().manual_seed(seed)
    nudge = 1e-3 * torch.randn(found.shape, generator=generator, dtype=torch.float64)
    assert loss(found) <= min(loss(found + nudge), loss(found - nudge), loss(weight)) * (1 + 1e-9)
