"""What finding the factors of all weights costs a compiled model at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import lrcompile
from benchmarks.common import table, write
from benchmarks.compile import CLOCK, GATE
from lrcompile import Budget, Options, Plan, Settings
from lrcompile.backends.dynamo import backend
from lrcompile.backends.dynamo.dispatch import Dispatcher

WEIGHTS, WIDTH, LIMIT = 210, 64, 0.3
_HEAD = f"""Finding the factors of {WEIGHTS} planned weights and checking that none was written to: calls of the
dispatcher with compiled code that does nothing. Median of the CPU time."""


def main() -> None:
    """All weights in one graph, and in graphs of seven that share code."""
    torch.set_num_threads(1)
    parts = (f"1 × {WEIGHTS}", f"{WEIGHTS // 7} × 7")
    rows = [[part, f"{ms:.3f}", LIMIT] for part, ms in zip(parts, _overhead(), strict=True)]
    columns = ("captured graphs × weights", "ms per forward", "required")
    write("dispatch", "The dispatcher of torch.compile", [_HEAD, table(columns, rows)])


def _overhead() -> tuple[float, float]:
    """Milliseconds per forward of ``WEIGHTS`` layers: captured in one graph, and in graphs of seven that share code."""
    torch.manual_seed(0)
    parts = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(7))) for _ in range(WEIGHTS // 7)]
    model = nn.Sequential(*parts).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)  # so that two hundred of them in a row neither explode nor vanish
    x = torch.randn(1, WIDTH)
    options = Options(max_drift=GATE, settings=Settings(probes=False))
    plan = lrcompile.plan(model, Budget(keep=0.6), calibration=[torch.randn(64, WIDTH)], options=options)
    calls = _Capture(plan)
    with torch.inference_mode():
        torch.compile(model, backend=calls)(x)
        whole = _best([(calls.made[0], calls.args)])
    torch._dynamo.reset()
    calls = _Capture(plan)
    with torch.inference_mode():
        torch.compile(parts[0], backend=calls)(x)
        one, args = calls.made[0], calls.args
        weights = [each.index for each in one.marked]
        regional = _best([(one, _swapped(args, weights, part)) for part in parts])
    return whole, regional


class _Capture:
    """A backend that keeps its dispatcher and what it was called with; its code does nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.made: list[Dispatcher] = []
        self.args: list[Any] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        found = backend(module, inputs, options={"plan": self.plan, "inner": self._nothing})
        self.made.append(found)
        self.args = list(inputs)
        result = (torch.zeros(1, WIDTH),)
        return lambda *args: result

    @staticmethod
    def _nothing(module: fx.GraphModule, inputs: list[Any]) -> Any:
        return lambda *args: None


def _swapped(args: Sequence[Any], weights: Sequence[int], part: nn.Sequential) -> list[Any]:
    """The arguments of another layer that shares the code."""
    found = list(args)
    for index, layer in zip(weights, part, strict=True):
        found[index] = layer.weight
    return found


def _best(calls: Sequence[tuple[Dispatcher, Sequence[Any]]], rounds: int = 300) -> float:
    """Median milliseconds of all calls together."""
    times = []
    for _ in range(rounds):
        start = CLOCK()
        for dispatcher, args in calls:
            dispatcher(*args)
        times.append((CLOCK() - start) * 1e3)
    return float(np.median(times))
