"""``torch.compile(backend="lrcompile")`` against Inductor alone, in turns, and what looking up the weights costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import lrcompile
from benchmarks.common import WORK, table, write
from lrcompile import Budget, Options, Plan, Settings
from lrcompile.backends.dynamo import backend
from lrcompile.backends.dynamo.dispatch import Dispatcher
from lrcompile.graphs.module_sites import share
from lrcompile.measure import interval
from lrcompile.zoo import minilm, smollm2

KEEPS = {0.8: 0.92, 0.6: 0.80, 0.4: 0.62}
"""What is kept, and the ratio that is required of it."""
REGIONAL = (0.6, 0.80)
WEIGHTS, WIDTH = 210, 64
LIMIT = 0.3
GATE = 10.0  # out of the way: the drift is reported, and it is the ratio that is looked at here
SECONDS = 20.0
Forward = Callable[[], Any]


def main() -> None:
    """Measures on one thread, where other work on the machine disturbs least."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [*_minilm(), _smollm2()]
    found = _overhead()
    parts = (f"1 × {WEIGHTS}", f"{WEIGHTS // 7} × 7")
    lookup = [[part, f"{ms:.3f}", LIMIT] for part, ms in zip(parts, found, strict=True)]
    title = "torch.compile with factors, ratio to Inductor dense"
    columns = ("captured graphs × weights", "ms per forward", "required")
    write("compile", title, [_HEAD, table(_COLUMNS, rows), _LOOKUP, table(columns, lookup)])


_COLUMNS = ("model", "tokens", "keep", "sites run as factors", "relative L2", "eager dense, ms", "Inductor dense, ms",
            "lrcompile, ms", "ratio to Inductor dense", "required")  # fmt: skip
_HEAD = """Each row is one plan, run as it was compiled. One thread, float32, `torch.inference_mode`. Dense and factors
take turns; the ratio is the median of the paired ratios with its 95 % interval. *Sites* is what `Plan.status()` says
of the code that ran. Relative L2: `Plan.drift` on evaluation data; plans are made with gradients, without probes.
*bare* has no options: exact passes alone, which find nothing in trained weights, so it shows what the backend itself
costs. SmolLM2 is compiled one decoder layer at a time; its head and its embedding are one tensor and stay dense."""
_LOOKUP = f"""## The dispatcher

Finding the factors of {WEIGHTS} planned weights and checking that none was written to: calls of the dispatcher with
compiled code that does nothing."""


# -- whole models ------------------------------------------------------------------------------


def _minilm() -> Iterator[list[object]]:
    model = minilm.module()
    batches = (minilm.calibration(), minilm.evaluation())
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (1, 128)))
    feeds = (ids, torch.ones_like(ids))
    eager, dense = share(model), torch.compile(share(model))
    ready = torch.compile(share(model), backend="lrcompile")
    yield _row("MiniLM, bare", "1×128", "1", None, feeds, (eager, dense, ready), "")
    for keep, required in KEEPS.items():
        settings = Settings(cache=WORK / "cache", probes=False)
        options = Options(max_drift=GATE, settings=settings)
        plan = lrcompile.plan(model, Budget(keep=keep), calibration=batches[0], evaluation=batches[1], options=options)
        torch._dynamo.reset()
        dense, ready = torch.compile(share(model)), torch.compile(model, backend="lrcompile", options={"plan": plan})
        yield _row("MiniLM", "1×128", f"{plan.keep:.4f}", plan, feeds, (eager, dense, ready), required)


def _smollm2() -> list[object]:
    """Layer by layer: a whole model of thirty layers takes minutes to compile."""
    torch._dynamo.reset()
    model = smollm2.module()
    keep, required = REGIONAL
    settings = Settings(cache=WORK / "cache", probes=False, exclude=("*lm_head*",))
    data = {"calibration": smollm2.calibration(24, 128), "evaluation": smollm2.evaluation(6, 128)}
    plan = lrcompile.plan(model, Budget(keep=keep), options=Options(max_drift=GATE, settings=settings), **data)
    eager, dense = share(model), share(model)
    for layer, plain in zip(model.model.model.layers, dense.model.model.layers, strict=True):
        layer.compile(backend="lrcompile", options={"plan": plan})
        plain.compile()
    feeds = (torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (1, 64))),)
    chosen = [entry for entry in plan.entries.values() if "lm_head" not in entry.name]
    values = sum(entry.shape[0] * entry.shape[1] for entry in chosen)
    kept = 1 - (1 - plan.keep) * sum(entry.shape[0] * entry.shape[1] for entry in plan.entries.values()) / values
    return _row("SmolLM2-135M, regional", "1×64", f"{kept:.4f}", plan, feeds, (eager, dense, model), required)


def _row(
    name: str, tokens: str, keep: str, plan: Plan | None, feeds: Sequence[Tensor], models: Sequence[Any], required: Any
) -> list[object]:
    with torch.inference_mode():
        eager, dense, ready = [lambda m=m: m(*feeds) for m in models]
        times = _in_turns((eager, dense, ready), SECONDS)
    ratio, low, high = interval(times[1], times[2])
    status = {} if plan is None else plan.status()
    sites = "—" if plan is None else f"{sum(s == 'compressed' for s in status.values())} of {len(plan.compressed)}"
    drift = "—" if plan is None or plan.drift is None else f"{plan.drift:.3f}"
    medians = [f"{float(np.median(each)) * 1e3:.1f}" for each in times]
    row = [name, tokens, keep, sites, drift, *medians, f"{ratio:.3f} [{low:.3f}, {high:.3f}]", required or "—"]
    print(row, flush=True)
    return row


def _in_turns(calls: Sequence[Forward], seconds: float) -> list[list[float]]:
    """Seconds of each call, in turns, after three that do not count."""
    for _ in range(3):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 20:
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return times


# -- the dispatcher ----------------------------------------------------------------------------


def _overhead() -> tuple[float, float]:
    """Milliseconds per forward of ``WEIGHTS`` layers: captured in one graph, and in graphs of seven that share code."""
    torch.manual_seed(0)
    parts = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(7))) for _ in range(WEIGHTS // 7)]
    model = nn.Sequential(*parts).eval().requires_grad_(False)
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
        start = time.perf_counter()
        for dispatcher, args in calls:
            dispatcher(*args)
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))
