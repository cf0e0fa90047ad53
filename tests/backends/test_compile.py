"""torch.compile(model, backend="lrcompile"): which weights really run as factors, and that the numbers are theirs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.backends.dynamo import backend
from lrcompile.errors import LrcompileWarning
from lrcompile.linop import low_rank
from tests.backends.compiling import WIDTH, Stack, Watch, close, compressed, planned, reference, samples, stack
from tests.graphs.modules import gpt2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", LrcompileWarning)
        yield


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))


def compiled(model: nn.Module, plan: Any, watch: Any, **more: Any) -> Any:
    return torch.compile(model, backend="lrcompile", options={"plan": plan, "inner": watch, **more})


def test_the_name_is_known_to_torch():
    assert "lrcompile" in torch._dynamo.list_backends()


def test_every_planned_site_runs_as_its_factors():
    model, watch = stack(), Watch()
    plan = planned(model)
    assert len(plan.compressed) >= 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = compiled(model, plan, watch)
    assert close(run(X), reference(model, plan)(X))
    assert compressed(watch, plan, model) == len(plan.compressed)
    assert len(watch.products) == 6 + len(plan.compressed)
    assert sum(text == "compressed" for text in plan.status().values()) == len(plan.compressed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert close(run(X), reference(model, plan)(X)) and watch.graphs == 1


def test_twelve_equal_blocks_with_different_ranks():
    """Torch shows the backend one block and reuses its code for the others: they must get their own factors."""
    model, watch = stack(12, broken=True), Watch()
    plan = planned(model, 0.5)
    ranks = {entry.recipe.label for entry in plan.entries.values() if entry.recipe is not None}
    assert len(ranks) >= 4 and len(plan.compressed) >= 12
    calls = 0

    def counting(module: Any, inputs: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return backend(module, inputs, **kwargs)

    run = torch.compile(model, backend=counting, options={"plan": plan, "inner": watch})
    expected = reference(model, plan)(X)
    for _ in range(2):
        watch.clear()
        assert close(run(X), expected)
        assert compressed(watch, plan, model) == len(plan.compressed)
        assert len(watch.runs) == 12
    assert calls <= 2
    assert watch.graphs <= 12


@pytest.mark.parametrize("broken", [False, True])
def test_dynamic_batch_and_rank_of_the_input(broken: bool):
    model, watch = stack(4, broken), Watch()
    plan = planned(model, 0.5)
    run = compiled(model, plan, watch)
    for shape in ((5,), (3,), (17,), (1,), (2, 7), (4, 3), (6, 11)):
        x = torch.randn(*shape, WIDTH)
        watch.clear()
        assert close(run(x), reference(model, plan)(x)), shape
        assert compressed(watch, plan, model) == len(plan.compressed)


def test_layers_compiled_one_by_one():
    model, watch = stack(6), Watch()
    plan = planned(model, 0.5)
    for block in model.blocks:
        block.compile(backend="lrcompile", options={"plan": plan, "inner": watch})
    assert close(model(X), reference(stack(6), plan)(X))
    assert compressed(watch, plan, model) == len(plan.compressed)


def test_conv1d_of_gpt2_and_its_tied_head():
    model, watch = gpt2(), Watch()
    ids = torch.arange(24).reshape(2, 12)
    plan = lrcompile.plan(
        model, lrcompile.Budget(keep=0.6), calibration=[{"input_ids": ids}], passes=[lrcompile.LowRank(metric="plain")],
        options=lrcompile.Options(settings=lrcompile.Settings(align=4, probes=False)),
    )  # fmt: skip
    run = compiled(model, plan, watch)
    assert close(run(ids, use_cache=False).logits, reference(model, plan)(ids, use_cache=False).logits)
    assert compressed(watch, plan, model) == len(plan.compressed) >= 4


def test_any_operator_of_the_algebra():
    """Factors of another kind are traced through; here low rank plus sparse, and a scaled sum."""
    from lrcompile.graphs.base import Replacement
    from lrcompile.linop import Dense, Scaled, Select, SemiSparse, Stack, Sum

    model = stack(2)
    plan = planned(model, 0.9)
    generator = torch.Generator().manual_seed(0)
    values, indices = torch.randn(64, 3, generator=generator), torch.randint(0, WIDTH, (64, 3), generator=generator)
    thin = low_rank(torch.randn(64, 4, generator=generator), torch.randn(4, WIDTH, generator=generator))
    halves = Stack((Dense(torch.randn(40, WIDTH)), Select(torch.arange(24), WIDTH)))
    plan.entries["blocks.0.up"].replacement = Replacement(Sum((thin, SemiSparse(values, indices, WIDTH))))
    plan.entries["blocks.1.up"].replacement = Replacement(Scaled(torch.tensor(0.5), Sum((thin, halves))))
    plan.table.states.clear()
    for rows in (1, 40):
        x = torch.randn(rows, WIDTH)
        for inner in ("eager", "aot_eager"):
            assert close(compiled(model, plan, inner)(x), reference(model, plan)(x))


# -- weights that change -------------------------------------------------------------------------


def test_written_in_place_loaded_assigned_and_merged():
    model, watch = stack(), Watch()
    plan = planned(model)
    assert "blocks.0.up" in plan.compressed and "blocks.1.down" in plan.compressed
    run = compiled(model, plan, watch)
    up = model.blocks[0].up

    def check(refits: int) -> None:
        watch.clear()
        before = run(X).clone()
        assert close(before, reference(model, plan)(X)), "stale"
        assert compressed(watch, plan, model) == len(plan.compressed)
        assert plan.table.refits == refits

    check(0)
    up.weight.add_(torch.randn_like(up.weight) * 0.1)
    check(1)
    model.load_state_dict(stack(seed=5).state_dict())
    check(1 + len(plan.compressed))
    up.weight = nn.Parameter(torch.randn_like(up.weight))
    check(2 + len(plan.compressed))
    low = torch.randn(64, 2) @ torch.randn(2, WIDTH)
    up.weight += low  # an adapter is merged …
    check(3 + len(plan.compressed))
    up.weight -= low  # … and taken out
    check(4 + len(plan.compressed))
    up.weight.data = torch.randn_like(up.weight)
    check(5 + len(plan.compressed))
    up.bias.add_(1)  # a bias is no factor: nothing is made anew
    check(5 + len(plan.compressed))
    assert watch.graphs == 1


def test_a_swap_of_the_module_around_a_planned_weight():
    """As adapters do it: the layer becomes the base of another module, and keeps its factors."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.a = base, nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x))

    model, watch = stack(), Watch()
    plan = planned(model)
    run = compiled(model, plan, watch)
    run(X)
    planned_model: Any = reference(model, plan)
    adapter = Adapter(model.blocks[0].up)
    model.blocks[0].up = adapter  # type: ignore[assignment]
    watch.clear()
    with pytest.warns(LrcompileWarning, match="stays dense: it is not in the plan"):
        found = run(X)
    wanted: Any = Adapter(planned_model.blocks[0].up)
    wanted.a, wanted.b = adapter.a, adapter.b
    planned_model.blocks[0].up = wanted
    assert close(found, planned_model(X))
    thin = [shape for shape in watch.products if 2 not in shape]
    assert len(thin) == 6 + len(plan.compressed)


def test_refresh_after_a_write_that_torch_cannot_see():
    model = stack()
    plan = planned(model)
    run = compiled(model, plan, "eager")
    before = run(X).clone()
    model.blocks[0].up.weight.data.add_(0.5)
    assert torch.equal(run(X), before)  # the documented limit
    assert lrcompile.refresh(model) == len(plan.compressed)
    assert close(run(X), reference(model, plan)(X)) and not close(run(X), before, 1e-3)
    assert plan.table.refits == 1  # the other weights turn out to be unchanged


def test_without_statistics_a_changed_weight_stays_dense(tmp_path: Any):
    model = stack()
    plan = planned(model)
    plan.save(tmp_path, statistics=False)
    plan = lrcompile.Plan.load(tmp_path)
    run = compiled(model, plan, Watch())
    run(X)
    model.blocks[0].up.weight.mul_(2)
    with pytest.warns(LrcompileWarning, match="blocks.0.up has changed and stays dense: the plan was saved without"):
        run(X)
    assert plan.status()["blocks.0.up"].startswith("dense: the plan was saved without statistics")


# -- how it is called ---------------------------------------------------------------------------


def test_gradients_get_dense_weights_and_one_warning():
    model, watch = stack().train(), Watch()
    plan = planned(model)
    run = compiled(model, plan, watch)
    twin = stack().train()
    with torch.enable_grad():
        with pytest.warns(LrcompileWarning, match="gradients are wanted, so 6 planned weights stay dense"):
            run(X).square().sum().backward()
        run(torch.cat([X, X])).sum()  # compiled anew, without another warning
        twin(X).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and close(mine.grad, other.grad)
    assert all(len(run) == 6 for run in watch.runs)
    assert all(text.startswith("dense: gradients") for text in plan.status().values())
    run(X)
    assert plan.status()["blocks.0.up"] == "compressed"


def test_frozen_weights_are_compressed_with_gradients_on():
    model, watch = stack().requires_grad_(False), Watch()
    plan = planned(model)
    with torch.enable_grad():
        compiled(model, plan, watch)(X)
    assert compressed(watch, plan, model) == len(plan.compressed)


def test_inference_mode_and_weights_made_in_it():
    model, watch = stack(), Watch()
    plan = planned(model)
    run = compiled(model, plan, watch)
    with torch.inference_mode():
        assert close(run(X), reference(model, plan)(X))
        model.blocks[0].up.weight = nn.Parameter(torch.randn(64, WIDTH), requires_grad=False)
        assert model.blocks[0].up.weight.is_inference()
        run(X)
        assert plan.table.refits == 1
    assert compressed(watch, plan, model) == 2 * len(plan.compressed)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast(inner: str):
    model = stack(4, broken=True)
    plan = planned(model)
    run = compiled(model, plan, inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = run(X), reference(model, plan)(X)
    assert found.dtype == wanted.dtype and close(found, wanted, 1e-2)
    assert sum(text == "compressed" for text in plan.status().values()) == len(plan.compressed)
    assert close(run(X), reference(model, plan)(X))


def test_two_models_and_two_plans_at_once():
    one, two = stack(seed=0), stack(seed=3)
    plans = planned(one, 0.5), planned(two, 0.7)
    watches = Watch(), Watch()
    runs = [compiled(m, p, w) for m, p, w in zip((one, two), plans, watches, strict=True)]
    for _ in range(2):
        for run, model, plan in zip(runs, (one, two), plans, strict=True):
            assert close(run(X), reference(model, plan)(X))
    for watch, model, plan in zip(watches, (one, two), plans, strict=True):
        assert compressed(watch, plan, model) == 2 * len(plan.compressed)
    both = [compiled(one, plan, "eager") for plan in (plans[0], planned(one, 0.8))]
    assert not close(both[0](X), both[1](X), 1e-4)


def test_one_plan_for_two_modules_of_one_architecture():
    one, two = stack(), stack(seed=4)
    plan = planned(one).bind(two)
    run = compiled(two, plan, "eager")
    assert close(run(X), reference(two, plan)(X))
    assert plan.table.refits == len(plan.compressed)
    assert close(compiled(one, plan, "eager")(X), reference(one, plan)(X))


def test_threads_share_one_compiled_model():
    model, watch = stack(8, broken=True), Watch()
    plan = planned(model, 0.5)
    run = compiled(model, plan, watch)
    expected = reference(model, plan)(X)
    run(X)
    failures: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                if not close(run(X), expected):
                    failures.append("wrong")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert watch.graphs <= 8


def test_a_model_that_is_already_optimised():
    model = stack()
    result = lrcompile.optimize(
        model, lrcompile.Budget(keep=0.6), calibration=samples(), options=lrcompile.Options(max_drift=10.0)
    )
    watch = Watch()
    run = torch.compile(result.model, backend="lrcompile", options={"inner": watch}, fullgraph=True)
    assert close(run(X), result.model(X))
    assert sum(8 in shape or 16 in shape for shape in watch.products) > 0
    with pytest.raises(lrcompile.LrcompileError, match="no linear weight"):
        planned(result.model)


def test_the_bare_form_applies_exact_passes_only():
    model = stack()
    thin = torch.randn(64, 5) @ torch.randn(5, WIDTH)
    model.blocks[1].up.weight.copy_(thin)
    watch = Watch()
    run = torch.compile(model, backend="lrcompile", options={"inner": watch})
    assert close(run(X), model(X))
    assert watch.products.count((5, WIDTH)) == 1 and len(watch.products) == 7
    model.blocks[1].up.weight.copy_(torch.randn(64, WIDTH))  # no longer deficient: dense again
    watch.clear()
    assert close(run(X), model(X)) and len(watch.products) == 6


def test_a_plan_keeps_no_model_alive():
    import gc
    import weakref

    model = stack()
    plan = planned(model)
    run = compiled(model, plan, "eager")
    run(X)
    ref = weakref.ref(model.blocks[0].up.weight)
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None and not plan.modules and not plan.table.states


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_with_inductor(broken: bool):
    model = stack(3, broken)
    plan = planned(model, 0.5)
    run = torch.compile(model, backend="lrcompile", options={"plan": plan})
    for rows in (5, 3):
        x = torch.randn(rows, WIDTH)
        assert close(run(x), reference(model, plan)(x))
    model.blocks[0].up.weight.mul_(1.5)
    assert close(run(X), reference(model, plan)(X))
    assert sum(text == "compressed" for text in plan.status().values()) == len(plan.compressed)
    assert isinstance(model, Stack)
