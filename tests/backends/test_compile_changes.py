"""The torch.compile backend: weights that come back to what they were, and changed kernels of convolutions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lrcompile import Plan
from tests.backends.compiling import close, planned, reference, stack
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
