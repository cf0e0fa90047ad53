"""Dense columns beside low rank: the algebra against brute force, prices, promises, and what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn

import lrcompile
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.calibrate import Moments
from lrcompile.choices import Offer
from lrcompile.columns import Columns, Layout, beside, keeping, loudest
from lrcompile.dataflow import interpret
from lrcompile.gauge import identity_gauge
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.formulas import build
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import apply, cost, densify, low_rank, same, structure
from lrcompile.passes.low_rank import LowRank
from lrcompile.profiling.survey import form_of, representatives, survey
from lrcompile.rewrite import Context, Proposal
from lrcompile.sites import LinearSite
from lrcompile.spectrum import spectrum

seeds = st.integers(0, 10_000)
sizes = st.integers(3, 12)


def problem(seed: int, out: int, into: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a metric of its inputs and one of its outputs, both definite."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, outputs = draw(3 * into, into) * draw(into).exp(), draw(3 * out, out)
    return draw(out, into), inputs.T @ inputs / len(inputs), outputs.T @ outputs / len(outputs)


def error(weight: Tensor, made: Tensor, inner: Tensor, outer: Tensor) -> float:
    difference = weight - made
    return float(((outer @ difference) * (difference @ inner)).sum())


def whole(split: Columns, rank: int) -> Tensor:
    kept, left, right = split.factors(rank)
    made = left @ right
    assert not made[:, split.kept].any()
    made[:, split.kept] = kept
    return made


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, sizes, st.data())
def test_tails_are_the_errors_of_the_factors(seed: int, out: int, into: int, data: st.DataObject) -> None:
    weight, inner, outer = problem(seed, out, into)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, into - 1), min_size=1, max_size=into - 1))))
    split = keeping(weight, inner, kept, outer)
    scale = error(weight, torch.zeros_like(weight), inner, outer)
    assert bool((split.tails.diff() <= 1e-12 * scale).all())
    for rank in range(len(split.tails)):
        found = error(weight, whole(split, rank), inner, outer)
        assert found == pytest.approx(float(split.tails[rank]), rel=1e-6, abs=1e-9 * scale)
        assert found == pytest.approx(float(split.errors(inner, outer)[rank]), rel=1e-6, abs=1e-9 * scale)


@settings(deadline=None, max_examples=30)
@given(seeds, sizes, sizes, st.data())
def test_nothing_near_is_better(seed: int, out: int, into: int, data: st.DataObject) -> None:
    """Moving the columns, or the factors with the columns fitted by least squares, only loses more."""
    weight, inner, outer = problem(seed, out, into)
    kept = loudest(weight, inner, outer, data.draw(st.integers(1, into - 1)))
    split = keeping(weight, inner, kept, outer)
    rank = data.draw(st.integers(0, len(split.tails) - 1))
    least = float(split.tails[rank]) * (1 - 1e-9) - 1e-12
    columns, left, right = split.factors(rank)
    generator = torch.Generator().manual_seed(seed + 1)
    for size in (1e-3, 1e-1, 1.0):
        nudge = torch.randn(out, len(kept), generator=generator, dtype=torch.float64)
        made = whole(split, rank)
        made[:, kept] += size * nudge
        assert error(weight, made, inner, outer) >= least
        other = (left + size * torch.randn(left.shape, generator=generator, dtype=torch.float64)) @ right
        root = torch.linalg.cholesky(inner)
        lacking = (weight - other)[:, split.rest] @ root[split.rest] + weight[:, kept] @ root[kept]
        other[:, kept] = torch.linalg.lstsq(root[kept].T, lacking.T).solution.T
        assert error(weight, other, inner, outer) >= least
    assert error(weight, whole(split, rank), inner, outer) <= float(spectrum(weight, inner, outer).tails[rank]) + 1e-9
    assert torch.equal(columns, split.factors(rank)[0])


def test_without_columns_it_is_the_plain_spectrum_and_with_all_the_weight():
    weight, inner, outer = problem(3, 6, 9)
    none = keeping(weight, inner, torch.empty(0, dtype=torch.long), outer)
    torch.testing.assert_close(none.tails, spectrum(weight, inner, outer).tails)
    every = keeping(weight, inner, torch.arange(9), outer)
    assert torch.equal(whole(every, 0), weight) and not every.tails.any()


def test_the_loudest_columns_are_those_of_most_output_energy():
    weight, inner, _ = problem(5, 6, 9)
    inner[4] *= 100
    inner[:, 4] *= 100
    assert 4 in loudest(weight, inner, None, 1)
    assert loudest(weight, inner.diagonal(), None, 3).tolist() == loudest(weight, inner, None, 3).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gauged", [True, False])
def test_the_expression_is_the_sum_of_both(gauged: bool, dtype: torch.dtype):
    weight, inner, outer = problem(7, 24, 48)
    split = keeping(weight, inner, loudest(weight, inner, outer, 8), outer)
    kept, left, right = split.factors(9)
    factors = identity_gauge(left, right, dtype) if gauged else low_rank(left.to(dtype), right.to(dtype))
    made = beside(kept, split.kept, factors)
    layout = Layout(24, 48, 8, dtype, gauged)
    assert cost(made) == layout.price(9, 1)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(densify(made).double(), whole(split, 9), rtol=limit, atol=limit)
    x = torch.randn(5, 48)
    torch.testing.assert_close(apply(made, x), x @ densify(made).float().T, rtol=1e-3 + limit, atol=1e-3 + limit)


# -- proposals ---------------------------------------------------------------------------------

LOUD = 12


def loud(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Vectors with a few massive channels."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, channels, generator=generator)
    rows[:, torch.randperm(channels, generator=generator)[:LOUD]] *= 30
    return rows


def setting(
    out: int, into: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, tokens: int = 3000
) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    graph = ModuleGraph(nn.Sequential(nn.Linear(into, out, bias=bias, dtype=dtype)))
    site = graph.linear_sites()[0]
    rows = loud(tokens, into) + 1
    moments = Moments.zeros(into)
    moments.update(rows)
    return site, Context(graph, {site.input: moments}), rows


def with_columns(site: LinearSite, context: Context, **options: Any) -> list[Proposal]:
    return [p for p in LowRank(**{"columns": True, **options}).proposals(site, context) if "columns" in p.form]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "gauge with columns"), (torch.float16, "with columns")])
def test_a_proposal_keeps_its_promise_and_price(bias: bool, dtype: torch.dtype, form: str):
    site, context, rows = setting(160, 320, bias=bias, dtype=dtype)
    proposals = with_columns(site, context)
    assert proposals and {p.form for p in proposals} == {form}
    energy = context.energy(site)
    for proposal in proposals[::3]:
        new = proposal.by[site.name]
        assert (new.operator.shape, densify(new.operator).dtype) == (site.shape, dtype)
        assert context.price(site, new.operator) == proposal.cost
        assert proposal.cost.macs < 160 * 320 and proposal.cost.nbytes < 160 * 320 * dtype.itemsize
        error = context.error(site, new.operator, new.shift)
        assert error <= 1.01 * proposal.error + 1e-6 * energy
        assert proposal.error <= 2 * error + 1e-3 * energy
        assert (new.shift is not None) == bias
        out = rows[:50] @ densify(new.operator).float().T
        torch.testing.assert_close(apply(new.operator, rows[:50]), out, rtol=1e-2, atol=1e-2 * float(out.abs().max()))


@pytest.mark.parametrize("damp", [1e-5, 0.0])
@pytest.mark.parametrize("tokens", [3, 60])
def test_few_tokens_and_dead_channels(tokens: int, damp: float):
    site, context, rows = setting(160, 320, tokens=tokens)
    rows[:, ::2] = 0.0
    rows[:, 1::8] = rows[:, 3::8]
    moments = Moments.zeros(320)
    moments.update(rows)
    context = dataclasses.replace(context, moments={site.input: moments})
    for shrink in (None, 0.0):
        proposals = with_columns(site, context, damp=damp, shrink=shrink)
        assert proposals
        for proposal in proposals[::8]:
            new = proposal.by[site.name]
            assert densify(new.operator).isfinite().all()
            error = context.error(site, new.operator, new.shift)
            assert error <= 1.1 * proposal.error + 1e-3 * context.energy(site)


def test_massive_channels_lose_less_in_as_many_values():
    site, context, _ = setting(160, 320)
    plain = [p for p in LowRank(columns=False).proposals(site, context)]
    assert not any("columns" in p.form for p in plain)
    for proposal in with_columns(site, context):
        rivals = [p.error for p in plain if p.cost.parameters <= 1.01 * proposal.cost.parameters]
        assert proposal.error < min(rivals)


@pytest.mark.parametrize("options", [{"columns": False}, {"metric": "plain"}, {"metric": "diagonal"}])
def test_where_they_are_not_offered(options: dict[str, Any]):
    site, context, _ = setting(160, 320)
    assert not with_columns(site, context, **options)


def test_none_for_tall_weights_without_data_or_where_the_gather_costs_more():
    assert not with_columns(*setting(320, 320)[:2])
    site, context, _ = setting(160, 320)
    assert not with_columns(site, Context(context.graph))
    assert not with_columns(*setting(32, 64)[:2])
    layout = Layout.of((160, 320), torch.float32, align=8, gauged=True)
    assert layout is not None and all(layout.values(r) + 400 * layout.count < 160 * 320 for r in layout.ranks(8))


def test_a_tied_weight_gets_none():
    torch.manual_seed(0)
    site, context, _ = setting(160, 320)
    tied = LinearSite(site.name, site.operator, (*site.uses, type(site.uses[0])("t", "t", role="transposed")))
    assert not with_columns(tied, context)


# -- what runs ---------------------------------------------------------------------------------


def onnx_model(weight: Tensor, *, convolution: bool) -> OnnxGraph:
    """``x @ W.T``, or a 1×1 convolution with steps."""
    out, into = weight.shape
    held = weight.reshape(out, into, 1, 1) if convolution else weight.T
    node = helper.make_node("Conv" if convolution else "MatMul", ["x", "w"], ["y"], name="n")
    if convolution:
        node.attribute.append(helper.make_attribute("strides", [2, 2]))
    shape = [1, into, 6, 6] if convolution else [7, into]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(held.contiguous().numpy(), "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return OnnxGraph(ir.serde.deserialize_model(proto))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("gauged", [True, False])
def test_onnx_runtime_computes_it(gauged: bool, convolution: bool):
    """One Gather, of the columns alone; the middle value is not copied but read where it was computed."""
    weight, inner, outer = problem(7, 24, 48)
    graph = onnx_model(weight.float(), convolution=convolution)
    (site,) = graph.linear_sites()
    split = keeping(weight, inner, loudest(weight, inner, outer, 8), outer)
    kept, left, right = split.factors(9)
    factors = identity_gauge(left, right, torch.float32) if gauged else low_rank(left.float(), right.float())
    made = beside(kept, split.kept, factors)
    graph.replace(site, made, None)
    built = OnnxRuntime().build(graph)
    x = torch.randn(*((1, 48, 6, 6) if convolution else (7, 48)))
    rows = x[:, :, ::2, ::2].movedim(1, -1) if convolution else x
    expected = (rows @ densify(made).T).movedim(-1, 1) if convolution else rows @ densify(made).T
    torch.testing.assert_close(torch.from_numpy(built.run({"x": x.numpy()})["y"]), expected, rtol=1e-3, atol=1e-3)
    assert [node.op_type for node in built.model.graph].count("Gather") == 1
    assert built.nbytes <= cost(made).nbytes + 8 * 8 + 64  # indices are wider in ONNX


def test_other_readers_of_the_file_compute_the_same():
    """The formulas that C is made of, and the exported program."""
    weight, inner, _ = problem(11, 24, 48)
    graph = onnx_model(weight.float(), convolution=False)
    split = keeping(weight, inner, loudest(weight, inner, None, 8))
    kept, left, right = split.factors(9)
    graph.replace(graph.linear_sites()[0], beside(kept, split.kept, identity_gauge(left, right, torch.float32)), None)
    built = OnnxRuntime().build(graph)
    x = torch.randn(7, 48)
    expected = built.run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(interpret.run(build(built.model), {"x": x.numpy()})["y"], expected, rtol=1e-4, atol=1e-4)
    found = lrcompile.to_program(graph, {"x": x.numpy()}).module()(x)["y"]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


class Tail(nn.Module):
    """A layer that reads a few massive channels, as a down projection does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(160, 320), nn.Linear(320, 160)
        self.register_buffer("scale", 1.0 + 30 * (torch.arange(320) % 27 == 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.scale)


def vectors(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(64, 160, generator=generator)} for _ in range(count)]


def test_a_plan_with_columns_is_saved_refitted_and_compiled(tmp_path: Path):
    model = Tail().eval()
    options = lrcompile.Options(max_drift=10.0, latency=False)
    passes = [LowRank(columns=True)]
    plan = lrcompile.plan(model, lrcompile.Budget(keep=0.5), passes=passes, calibration=vectors(12, 1), options=options)
    entry = plan.entries["down"]
    assert entry.recipe is not None and "dense columns" in entry.recipe.label and entry.replacement is not None
    plan.save(tmp_path)
    loaded = lrcompile.Plan.load(tmp_path).bind(model)
    held = loaded.entries["down"].replacement
    assert held is not None and same(held.operator, entry.replacement.operator)
    again = loaded.refit(loaded.entries["down"], 2 * model.down.weight)
    assert not isinstance(again, str) and structure(again.operator) == structure(held.operator)
    torch.testing.assert_close(densify(again.operator), 2 * densify(held.operator), rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()
    with torch.no_grad():
        x = vectors(1, 9)[0]["x"]
        up = plan.entries["up"].replacement
        middle = (
            model.up(x) if up is None else apply(up.operator, x) + model.up.bias + _shift(up)
        ).tanh() * model.scale
        expected = apply(held.operator, middle) + model.down.bias + _shift(held)
        run = torch.compile(model, backend="lrcompile", options={"plan": loaded, "inner": lambda module, _: module})
        torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-2)
    assert loaded.status()["down"] == "compressed"


def _shift(by: Replacement) -> Tensor:
    return torch.zeros(1) if by.shift is None else by.shift


def test_prices_of_columns_are_those_of_a_site_that_has_them():
    site, context, _ = setting(160, 320)
    offered = representatives(
        context.graph, [site], [LowRank(columns=True)], {"input": np.zeros((1, 320), "float32")}, 8
    )
    forms = {form_of(p) for p in offered[site.name].proposals}
    assert {form_of(p) for p in LowRank(columns=True).proposals(site, context)} <= forms
    found = survey(context.graph, [site], offered, {"input": np.zeros((1, 320), "float32")})
    assert {each.form for each in found.candidates[found.shapes[site.name]]} == forms


def test_a_form_is_timed_where_any_site_of_the_shape_is_offered_it():
    graph = ModuleGraph(nn.Sequential(nn.Linear(320, 160), nn.Linear(160, 320), nn.Linear(320, 160)))
    sites, feed = graph.linear_sites(), {"input": np.zeros((1, 320), "float32")}
    first, last = (
        list(LowRank(columns=True).proposals(site, Context(graph, trial=True))) for site in (sites[0], sites[2])
    )
    offers = {
        sites[0].name: Offer([p for p in first if "columns" not in p.form], []),
        sites[2].name: Offer(last, []),
    }
    found = survey(graph, sites, offers, feed)
    assert {each.form for each in found.candidates[found.shapes[sites[0].name]]} == {form_of(p) for p in last}
