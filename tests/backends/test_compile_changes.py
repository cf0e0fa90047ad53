"""The torch.compile backend: weights that come back to what they were, and changed kernels of convolutions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lrcompile import Plan
from tests.backends.compiling import Watch, close, compressed, planned, reference, stack
from tests.backends.test_compile import X, compiled, fresh

__all__ = ["fresh"]


def test_a_weight_that_is_restored_gets_its_planned_factors_back():
    """As an adapter does that is merged and taken out: nothing is factorised anew for the second step."""
    model = stack()
    plan = planned(model)
    run = compiled(model, plan, "eager")
    before, kept = run(X).clone(), {name: value.clone() for name, value in model.state_dict().items()}
    model.blocks[0].up.weight += 0.5
    assert not close(run(X), before, 1e-3) and plan.table.refits == 1
    model.load_state_dict(kept)
    assert torch.equal(run(X), before) and plan.table.refits == 1
    model.blocks[0].up.weight = nn.Parameter(kept["blocks.0.up.weight"].clone())
    assert torch.equal(run(X), before) and plan.table.refits == 1


class Image(nn.Module):
    """Two convolutions whose kernels have several places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, 2, padding=1), nn.Conv2d(16, 8, (1, 3), padding="same", dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_changed_kernel_is_factorised_anew(tmp_path: Path):
    torch.manual_seed(0)
    model, batch = Image().eval(), [{"x": torch.randn(4, 8, 8, 8)} for _ in range(3)]
    made = planned(model, 0.5, calibration=batch)
    made.save(tmp_path)
    for plan in (made, Plan.load(tmp_path)):
        assert "a" in plan.compressed
        torch._dynamo.reset()
        run, x = compiled(model, plan, "eager"), torch.randn(2, 8, 8, 8)
        run(x)
        model.a.weight.mul_(1.5)
        assert close(run(x), reference(model, plan)(x), 1e-5)
        assert plan.status()["a"] == "compressed" and plan.table.refits >= 1


def test_releasing_costs_no_recompilation_where_layers_are_planned_differently():
    """Torch's guards look at the class of a weight, and equal layers share code: one that stays dense must fit them."""
    model, watch = stack(12, broken=True), Watch()
    plan = planned(model, 0.6)
    for index, name in enumerate(plan.compressed):
        if index % 3 == 0:
            plan.entries[name].replacement = None
    plan.table.states.clear()
    plan.table.know(model)
    expected = reference(model, plan)(X)
    torch._dynamo.utils.counters.clear()
    run = compiled(model, plan, watch, release=True)
    for _ in range(3):
        watch.clear()
        assert close(run(X), expected)
        assert compressed(watch, plan, model) == len(plan.compressed) >= 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert "compressed, dense values released" in plan.status().values()


def test_a_layer_that_was_moved_keeps_its_weight():
    """The place that the plan knows is gone, so whoever holds the weight now may read it."""
    model = stack(2)
    plan = planned(model)
    model.blocks[0].up = nn.Sequential(model.blocks[0].up)
    expected = reference(stack(2), plan)(X)
    assert close(compiled(model, plan, "eager", release=True)(X), expected)
    assert plan.status()["blocks.0.up"] == "compressed, dense values kept: also held by a Linear"
    assert plan.status()["blocks.1.up"] == "compressed, dense values released"


def test_a_loaded_plan_releases_too(tmp_path: Path):
    planned(stack(4), 0.5).save(tmp_path)
    for regional in (False, True):
        torch._dynamo.reset()
        model, plan = stack(4), Plan.load(tmp_path)
        expected = reference(model, plan)(X)
        if regional:
            plan.bind(model)
            for block in model.blocks:
                block.compile(backend="lrcompile", options={"plan": plan, "inner": "eager", "release": True})
            run = model
        else:
            run = compiled(model, plan, "eager", release=True)
        assert close(run(X), expected) and close(run(X), expected)
        assert sum(text.endswith("released") for text in plan.status().values()) == len(plan.compressed)
