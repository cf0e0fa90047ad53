"""float16 on a CPU: statistics, gradients and probes are those of float32 arithmetic, and as fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from lrcompile.graphs.base import Replacement
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_widened import widened
from lrcompile.linop import Dense, densify, low_rank


class Net(nn.Module):
    """Linear layers, a product of two activations, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.tanh(self.up(x)))
        h = h + (h @ h.transpose(-1, -2)).softmax(-1) @ h
        return self.mix(h.transpose(-1, -2)).mean(-1)


BATCH = {"x": np.random.default_rng(0).standard_normal((6, 10, 32)).astype(np.float32)}


def moments(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    graph = ModuleGraph(model)
    graph.check(BATCH)
    sites = graph.linear_sites()
    if kind == "gradients":
        found = graph.gradients([BATCH], sites, memory=2**30, seed=0).moments
        return {site.name: found[site.name].second() for site in sites}
    if kind == "inputs":
        seen = graph.observe([BATCH], sites, memory=2**30)
        return {site.name: seen[site.input].second() for site in sites}
    changes = {site.name: Replacement(Dense(0.9 * densify(site.operator))) for site in sites}
    return {name: torch.tensor(value) for name, value in graph.probe([BATCH], changes).items()}


@pytest.mark.parametrize("kind", ["inputs", "gradients", "probes"])
def test_close_to_float32(kind: str) -> None:
    half, single = (moments(model, kind) for model in (Net().half(), Net().half().float()))
    for name, value in single.items():
        assert float((half[name] - value).norm() / value.norm()) < 0.02, name


def test_a_backward_pass_takes_a_sane_time() -> None:
    """The product that torch computes element by element: of a gradient with a matrix that is not transposed."""
    weight, gradient = torch.randn(512, 512).half(), torch.randn(64, 512).half()
    layer = nn.Linear(512, 512).half()

    wanted = gradient.float() @ weight.float()
    with widened(layer):
        found = torch.mm(gradient, weight)
        own = _seconds(gradient, weight)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-2)
    assert own < 20 * _seconds(gradient.float(), weight.float())  # without, some hundreds


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """The shortest of a few products."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return min(times)


def test_other_models_are_left_alone() -> None:
    with widened(nn.Linear(4, 4)) as mode:
        assert mode is None


def test_factors_are_multiplied_out_in_float32() -> None:
    left, right = torch.randn(96, 40).half(), torch.randn(40, 64).half()
    found = densify(low_rank(left, right))
    assert found.dtype == torch.float16 and torch.equal(found, (left.float() @ right.float()).half())
