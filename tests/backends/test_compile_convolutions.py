"""Convolutions in the torch.compile backend: kernels of one element and of any window."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompile.errors import LrcompileWarning
from tests.backends.compiling import close, planned, reference


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", LrcompileWarning)
        yield


def compiled(model: nn.Module, plan: Any, watch: Any, **more: Any) -> Any:
    return torch.compile(model, backend="lrcompile", options={"plan": plan, "inner": watch, **more})


class Image(nn.Module):
    """1×1 convolutions with and without strides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 1, stride=2), nn.Conv2d(32, 16, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_pointwise_convolutions():
    torch.manual_seed(0)
    model = Image().eval()
    batch = [{"x": torch.randn(4, 16, 6, 6)} for _ in range(3)]
    plan = planned(model, 0.4, calibration=batch)
    run = compiled(model, plan, "eager", release=True)
    x = torch.randn(3, 16, 8, 8)
    expected = reference(model, plan)(x)
    assert close(run(x), expected) and len(plan.compressed) == 2
    assert plan.status() == {"a": "compressed, dense values released", "b": "compressed, dense values released"}
    assert close(run(x), expected)


class Patches(nn.Module):
    """Convolutions of several windows, one applied to a single sample without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 24, 3, stride=2, padding=1)
        self.b = nn.Conv2d(24, 16, (3, 2), dilation=(2, 1), padding="same", bias=False)
        self.c = nn.Conv1d(16, 16, 5, padding=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return self.c(self.grouped(x)[0].flatten(1))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_convolutions_of_any_window(inner: str):
    torch.manual_seed(0)
    model = Patches().eval()
    batch = [{"x": torch.randn(4, 8, 9, 9)} for _ in range(3)]
    plan = planned(model, 0.4, calibration=batch)
    run = compiled(model, plan, inner)
    x = torch.randn(3, 8, 9, 9)
    expected = reference(model, plan)(x)
    assert close(run(x), expected) and set(plan.compressed) == {"a", "b", "c"}
    assert [plan.status()[name] for name in ("a", "b", "c")] == ["compressed"] * 3
    with torch.no_grad():
        model.a.weight.mul_(1.5)  # the same form is made again from the new weight
    assert close(run(x), reference(model, plan)(x))
    assert plan.status()["a"] == "compressed"
