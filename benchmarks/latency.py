"""Latency budgets: what they reach, and how well a plan's latency is predicted.

``LRCOMPILE_LATENCY_MODELS=minilm,smollm2 python -m benchmarks latency``: any model of the zoo that takes ``input_ids``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import WORK, table, write
from lrcompile import Budget, LowRank, Options, Pipeline, measure, zoo
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.budget import COSTS
from lrcompile.choices import Planned
from lrcompile.errors import InfeasibleError
from lrcompile.feeds import feeds, stored
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings

BATCHES = {"minilm": ((1, 128), (16, 128)), "smollm2": ((1, 512),)}
THREADS = (1, 2)
TARGETS = (0.8, 0.6)
PLANS = (0.95, 0.85, 0.75, 0.65, 0.55)
SECONDS = float(os.environ.get("LRCOMPILE_LATENCY_SECONDS", "4"))
_HEAD = """`--latency R` chooses ranks and forms by measured prices, measures the file that it made, and corrects the
prices where that misses R by more than 5 %. Each row is one file, measured again afterwards in a new process, in turns
with the dense file: median of the paired ratios with its 95 % interval. One thread: processor time of that thread,
so that other programs on the machine do not count; more threads: wall time. The gate on drift is kept out of the
way."""
_PREDICTED = """## Predicted and measured latency of plans

Each plan is chosen by the prices alone, at a latency between {low} and {high}; no result corrects them."""


@dataclass(frozen=True)
class Setting:
    """One way to run a model."""

    model: str
    samples: int
    tokens: int
    threads: int

    @property
    def label(self) -> str:
        return f"{self.model}, {self.samples}×{self.tokens} tokens, {self.threads} thread{'s'[: self.threads > 1]}"


def main() -> None:
    """Measures every setting of the chosen models."""
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = os.environ.get("LRCOMPILE_LATENCY_MODELS", "minilm").split(",")
    reached, predicted = [], []
    for name in chosen:
        for samples, tokens in BATCHES.get(name, ((1, 128),)):
            for threads in THREADS:
                one = Setting(name, samples, tokens, threads)
                found, plans = _measured(one)
                reached += found
                predicted += plans
                _write(reached, predicted)


def _write(reached: Sequence[Sequence[object]], predicted: Sequence[Sequence[object]]) -> None:
    errors = sorted(abs(float(str(row[3]))) for row in predicted)
    p90 = errors[min(round(0.9 * len(errors)), len(errors) - 1)] if errors else float("nan")
    slower = sum(float(str(row[2]).split(" ")[0]) > 1 for row in [*reached, *predicted] if row[2] != "—")
    summary = f"Error, 90 % of {len(errors)} plans: {100 * p90:.1f} %. Plans or results slower than dense: {slower}."
    write("latency", "Latency budgets", [
        _HEAD, table(("setting", "target", "measured", "by the run itself", "SHA-256"), reached),
        _PREDICTED.format(low=min(PLANS), high=max(PLANS)),
        table(("setting", "predicted", "measured", "error"), predicted), summary])  # fmt: skip


def _measured(one: Setting) -> tuple[list[list[object]], list[list[object]]]:
    dense = zoo.exported(one.model)
    graph = OnnxGraph.load(dense)
    batch = feeds(graph, None, {"input_ids": (one.samples, one.tokens)})
    path = stored(batch, WORK / f"latency-{one.model}-{one.samples}x{one.tokens}.npz")
    data = zoo.load(one.model).calibration()[::5]
    reached = [_reached(one, dense, data, path, target) for target in TARGETS]
    return reached, list(_predictions(one, dense, data, path))


def _options(one: Setting, path: Path) -> Options:
    settings = Settings(cache=WORK / "cache", refine=False)
    return Options(max_drift=100.0, latency_inputs=path, latency_batch=one.samples, threads=one.threads,
                   force=True, seconds=SECONDS, settings=settings)  # fmt: skip


def _reached(one: Setting, dense: Path, data: Sequence, path: Path, target: float) -> list[object]:
    out = WORK / f"latency-{one.model}-{target}.onnx"
    try:
        result = Pipeline([LowRank()], Budget(latency=target), _options(one, path)).run(dense, data, out=out)
    except InfeasibleError as error:
        return [one.label, target, "—", f"refused: {error.message}", "—"]
    timing = _timed(one, dense, out, path)
    own = result.report.budget["latency"].reached or float("nan")
    return [one.label, target, _ratio(timing), f"{own:.3f}", sha256(out)[:12]]


def _predictions(one: Setting, dense: Path, data: Sequence, path: Path) -> Iterator[list[object]]:
    """Plans at other targets by the same prices: the same choice with more or less room."""
    start = 0.8
    planned, _ = Pipeline([LowRank()], Budget(latency=start), _options(one, path)).plan(dense, data)
    for ratio in PLANS:
        room = np.zeros(len(COSTS))
        room[COSTS.index("latency")] = start - ratio
        chosen = planned.again(room)
        expected = float(chosen.expected[COSTS.index("latency")])
        timing = _timed(one, dense, _built(chosen), path)
        yield [one.label, f"{expected:.3f}", _ratio(timing), f"{expected / timing.ratio - 1:+.3f}"]


def _built(planned: Planned) -> Path:
    graph = planned.context.graph
    mark, sites = graph.journal.mark(), {site.name: site for site in graph.linear_sites()}
    for choice in planned.choices:
        if choice.proposal is not None:
            for name, new in choice.proposal.build().items():
                graph.replace(sites[name], new.operator, new.shift)
    with AtomicSet(WORK / "latency-plan.onnx", force=True) as files:
        OnnxRuntime().build(graph, out=files)
    graph.rollback(mark)
    return files.target


def _timed(one: Setting, dense: Path, file: Path, path: Path) -> measure.Timing:
    found = measure.time_files([dense, file], path, seconds=SECONDS, threads=one.threads, precision=0.015, busy=True)
    if found is None:
        raise SystemExit(f"{file} does not run")
    return found


def _ratio(timing: measure.Timing) -> str:
    return f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]"
