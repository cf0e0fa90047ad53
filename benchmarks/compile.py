"""``torch.compile(backend="lrcompile")`` against Inductor alone, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lrcompile
from benchmarks.common import WORK, table, write
from lrcompile import Budget, Options, Plan, Settings
from lrcompile.graphs.module_sites import share
from lrcompile.measure import interval
from lrcompile.zoo import minilm

KEEPS = {0.8: 0.92, 0.6: 0.80, 0.4: 0.62}
"""What is kept, and the ratio that is required of it."""
GATE = 10.0  # out of the way: the drift is reported, and it is the ratio that is looked at here
SECONDS = 10.0
CLOCK = time.thread_time  # other work on the machine hardly disturbs it, and everything runs on this one thread
Forward = Callable[[], Any]


def main() -> None:
    """MiniLM as a whole, on one thread."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    write("compile", "torch.compile with factors, ratio to Inductor dense", [HEAD, table(COLUMNS, list(_minilm()))])


COLUMNS = ("model", "tokens", "keep", "sites run as factors", "relative L2", "eager dense, ms", "Inductor dense, ms",
            "lrcompile, ms", "ratio to Inductor dense", "required")  # fmt: skip
HEAD = """Each row is one plan, run as it was compiled. One thread and its CPU time, float32, `torch.inference_mode`.
Dense and factors take turns; the ratio is the median of the paired ratios with its 95 % interval. *Sites* is what
`Plan.status()` says of the code that ran. Relative L2: `Plan.drift` on evaluation data; plans are made with gradients,
without probes. *bare* has no options: exact passes alone, which find nothing in trained weights, so it shows what the
backend itself costs."""


def _minilm() -> Iterator[list[object]]:
    model = minilm.module()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (1, 128)))
    feeds = (ids, torch.ones_like(ids))
    eager, dense = share(model), torch.compile(share(model))
    ready: Any = torch.compile(share(model), backend="lrcompile")
    yield row("MiniLM, bare", "1×128", "1", None, feeds, (eager, dense, ready), "")
    for keep, required in KEEPS.items():
        plan = planned(model, keep, minilm.calibration()[::4], minilm.evaluation())
        options: Any = {"plan": plan}
        ready = torch.compile(model, backend="lrcompile", options=options)
        yield row("MiniLM", "1×128", f"{plan.keep:.4f}", plan, feeds, (eager, dense, ready), required)


def planned(model: nn.Module, keep: float, calibration: Any, evaluation: Any, exclude: tuple[str, ...] = ()) -> Plan:
    settings = Settings(cache=WORK / "cache", probes=False, exclude=exclude)
    options = Options(max_drift=GATE, settings=settings)
    return lrcompile.plan(model, Budget(keep=keep), calibration=calibration, evaluation=evaluation, options=options)


def row(
    name: str, tokens: str, keep: str, plan: Plan | None, feeds: Sequence[Tensor], models: Sequence[Any], required: Any
) -> list[object]:
    with torch.inference_mode():
        eager, dense, ready = [lambda m=m: m(*feeds) for m in models]
        times = _in_turns((eager, dense, ready), SECONDS)
    ratio, low, high = interval([(times[1], times[2])])
    status = {} if plan is None else plan.status()
    sites = "—" if plan is None else f"{sum(s == 'compressed' for s in status.values())} of {len(plan.compressed)}"
    drift = "—" if plan is None or plan.drift is None else f"{plan.drift:.3f}"
    medians = [f"{float(np.median(each)) * 1e3:.1f}" for each in times]
    found = [name, tokens, keep, sites, drift, *medians, f"{ratio:.3f} [{low:.3f}, {high:.3f}]", required or "—"]
    print(found, flush=True)
    return found


def _in_turns(calls: Sequence[Forward], seconds: float) -> list[list[float]]:
    """Seconds of each call, in turns, after three that do not count."""
    for _ in range(3):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    end = CLOCK() + seconds
    while CLOCK() < end or len(times[0]) < 20:
        for call, found in zip(calls, times, strict=True):
            start = CLOCK()
            call()
            found.append(CLOCK() - start)
    return times
