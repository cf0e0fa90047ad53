"""The low-rank pass: prices, promises, and what it builds, on sites of a small module."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lrcompile.calibrate import Moments
from lrcompile.errors import UsageError
from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import densify, structure
from lrcompile.passes.low_rank import LowRank
from lrcompile.rewrite import Context
from lrcompile.sites import LinearSite


def correlated(tokens: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) * torch.logspace(0, -2, channels)
    return torch.randn(tokens, channels, generator=generator) @ mixing.T + 2 * torch.randn(
        channels, generator=generator
    )


def setting(
    out: int, into: int, *, bias: bool = True, tokens: int = 4000, dtype: torch.dtype = torch.float32, align: int = 4
) -> tuple[LinearSite, Context, Tensor]:
    """A site, its context, and the vectors that it reads."""
    torch.manual_seed(0)
    graph = ModuleGraph(nn.Sequential(nn.Linear(into, out, bias=bias, dtype=dtype)))
    site = graph.linear_sites()[0]
    rows = correlated(tokens, into)
    moments = Moments.zeros(into)
    moments.update(rows)
    return site, Context(graph, {site.input: moments}, align=align), rows


def measured(site: LinearSite, proposal, rows: Tensor) -> float:
    """Mean squared error of the built replacement's outputs over real vectors."""
    new = proposal.by[site.name]
    difference = rows.double() @ (densify(site.operator).double() - densify(new.operator).double()).T
    shift = 0.0 if new.shift is None else new.shift.double()
    return float((difference - shift).square().sum(1).mean())


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
@pytest.mark.parametrize("metric", ["whitened", "diagonal", "plain"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_proposal_keeps_its_promise(shape: tuple[int, int], metric: str, bias: bool):
    """Whatever metric chose the directions, the error that is claimed is the error at the outputs."""
    site, context, rows = setting(*shape, bias=bias)
    energy = context.energy(site)
    proposals = list(LowRank(metric=metric).proposals(site, context))  # type: ignore[arg-type]
    assert context.ranks(site) == [4, 8, 12, 16]
    gauged = [rank for rank in context.ranks(site, gauged=True) if rank**2 >= 16 * shape[0]]
    assert [p.rank for p in proposals] == [*context.ranks(site), *gauged] and gauged
    for proposal in proposals:
        error = measured(site, proposal, rows)
        assert error == pytest.approx(context.error(site, *_held(site, proposal)), rel=1e-2, abs=1e-5 * energy)
        assert error <= proposal.error * 1.001 + 1e-6 * energy
        assert proposal.error <= 2 * error + 1e-3 * energy


def _held(site: LinearSite, proposal):
    new = proposal.by[site.name]
    return new.operator, new.shift


@pytest.mark.parametrize("metric", ["whitened", "diagonal", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_price_is_what_is_built(metric: str, dtype: torch.dtype):
    site, context, rows = setting(32, 48, dtype=dtype)
    for proposal in LowRank(metric=metric, permute=True).proposals(site, context):  # type: ignore[arg-type]
        new = proposal.by[site.name]
        assert context.price(site, new.operator) == proposal.cost
        assert proposal.cost.nbytes < 32 * 48 * dtype.itemsize or "gauge" in proposal.label
        assert (new.operator.shape, densify(new.operator).dtype) == ((32, 48), dtype)
        assert measured(site, proposal, rows) <= 1.1 * proposal.error + 1e-3 * context.energy(site)


@pytest.mark.parametrize("tokens", [3, 12, 48, 150])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
@pytest.mark.parametrize("metric", ["whitened", "diagonal", "plain"])
def test_few_tokens_give_finite_factors_and_kept_promises(tokens: int, shape: tuple[int, int], metric: str):
    site, context, rows = setting(*shape, tokens=tokens)
    for proposal in LowRank(metric=metric).proposals(site, context):  # type: ignore[arg-type]
        assert densify(proposal.by[site.name].operator).isfinite().all()
        assert measured(site, proposal, rows) <= 1.1 * proposal.error + 1e-3 * context.energy(site)


def compare(weight: Tensor, few: Tensor, others: Tensor) -> tuple[float, float]:
    """Relative error on other vectors, mean over the ranks, with the shrink that few tokens call for and without."""
    graph = ModuleGraph(nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)))
    graph.model[0].weight.data.copy_(weight)  # type: ignore[index]
    site = graph.linear_sites()[0]
    moments = Moments.zeros(weight.shape[1])
    moments.update(few)
    sure = Moments(moments.gram * 1e6, moments.total * 1e6, moments.absolute, moments.absmax, moments.tokens * 10**6)
    found = []
    for statistics in (moments, sure):
        context = Context(graph, {site.input: statistics})
        errors = torch.tensor([measured(site, p, others) for p in LowRank().proposals(site, context)])
        found.append(float(errors.mean() / (others @ weight.T).square().sum(1).mean()))
    return found[0], found[1]


def test_shrinking_helps_on_tokens_that_were_not_seen():
    """On real activations with one token per channel, over several layers of the digits network."""
    zoo = pytest.importorskip("lrcompile.zoo.digits_vit")
    network, seen = zoo.module(), {}
    names = ["blocks.0.attention.q", "blocks.0.up", "blocks.1.attention.o", "blocks.1.attention.v", "blocks.1.up"]
    for name in names:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    with torch.inference_mode():
        network(torch.from_numpy(zoo.calibration()[0]["images"][:4]))
        few = dict(seen)
        network(torch.from_numpy(zoo.evaluation()[0]["images"]))
        others = dict(seen)
    gains = [compare(network.get_submodule(n).weight.detach(), few[n], others[n]) for n in names]
    assert sum(shrunk for shrunk, _ in gains) < 0.9 * sum(unshrunk for _, unshrunk in gains)


def test_shrinking_leaves_a_large_mean_alone():
    """A mean correlates all channels; it is known well from few tokens and must not shrink away."""
    weight, rows = torch.randn(48, 48, generator=torch.Generator().manual_seed(3)), correlated(4000, 48)
    shrunk, unshrunk = compare(weight, rows[:24] + 30, rows + 30)
    assert shrunk < 1.5 * unshrunk


def test_the_mean_is_exact_where_there_is_a_bias():
    site, context, rows = setting(32, 48)
    proposal = next(LowRank().proposals(site, context))
    new = proposal.by[site.name]
    assert new.shift is not None
    weight = densify(site.operator).double()
    moved = rows.double() @ densify(new.operator).double().T + new.shift.double()
    torch.testing.assert_close(moved.mean(0), (rows.double() @ weight.T).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"center": False}, {"metric": "plain"}, {"metric": "diagonal"}])
def test_no_shift_without_centering(options: dict):
    site, context, _ = setting(32, 48)
    assert next(LowRank(**options).proposals(site, context)).by[site.name].shift is None
    bare, context, _ = setting(32, 48, bias=False)
    assert next(LowRank().proposals(bare, context)).by[bare.name].shift is None


def test_without_data_it_is_the_plain_svd():
    site, context, _ = setting(32, 48)
    context = dataclasses.replace(context, moments={})
    values = torch.linalg.svdvals(densify(site.operator).double())
    for proposal in LowRank().proposals(site, context):
        assert proposal.error == pytest.approx(float(values[proposal.rank :].square().sum()), rel=1e-8)
        operator, shift = _held(site, proposal)
        assert shift is None
        assert context.error(site, operator) == pytest.approx(proposal.error, rel=1e-4)


def test_small_weights_are_refused_with_the_break_even():
    site, context, _ = setting(10, 12, align=8)
    assert "multiple of 8 is below break-even 5" in LowRank(gauge=False).refuse(site, context)
    assert LowRank(gauge=False).refuse(*setting(32, 48)[:2]) == ""
    assert LowRank().refuse(site, context) != ""  # in the identity gauge too: it would save less than it copies


def test_min_rank_skips_the_smallest():
    site, context, _ = setting(32, 48)
    assert [p.rank for p in LowRank(min_rank=3, gauge=False).proposals(site, context)] == [12, 16]


def test_equal_inputs_give_equal_bytes():
    first, second = (
        next(LowRank().proposals(site, context)).by[site.name]
        for site, context, _ in (setting(32, 48), setting(32, 48))
    )
    assert structure(first.operator) == structure(second.operator)
    assert torch.equal(densify(first.operator), densify(second.operator))
    assert first.shift is not None and second.shift is not None and torch.equal(first.shift, second.shift)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "best"}, {"shrink": -0.1}, {"shrink": 1.1}, {"shrink": float("nan")}, {"damp": -1.0},
        {"damp": float("nan")}, {"damp": float("inf")}, {"alpha": float("nan")}, {"min_rank": 0},
    ],
)  # fmt: skip
def test_options_out_of_range(options: dict):
    with pytest.raises(UsageError, match="low-rank"):
        LowRank(**options)
