"""Latency budgets: what they reach, and how well a plan's latency is predicted.

``LRCOMPILE_LATENCY="minilm*,smollm2-1x512-t1" python -m benchmarks latency``: patterns choose settings, by default all.
A setting's rows are kept in the cache folder as soon as they are there, and the table shows all settings that the same
code measured on the same machine, so that runs may be short.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import WORK, kept, made_by, pieces, ratio_text, table, write
from lrcompile import Budget, LowRank, Options, Pipeline, measure, zoo
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.budget import COSTS
from lrcompile.choices import Planned
from lrcompile.errors import InfeasibleError
from lrcompile.feeds import feeds, stored
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings

BATCHES = (("minilm", 1, 128, 0), ("minilm", 16, 128, 0), ("smollm2", 1, 512, 0), ("smollm2_cached", 1, 1, 128))
"""Models, samples, tokens of each, and tokens that its cache holds already."""
THREADS = (1, 2)
TARGETS = (0.8, 0.6)
PLANS = (0.95, 0.85, 0.75, 0.65, 0.55)
SAMPLES = 20
"""Calibration samples: few, since prices and times do not depend on them."""
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
    past: int
    threads: int

    @property
    def label(self) -> str:
        after = f" after {self.past}" if self.past else ""
        threads = f"{self.threads} thread{'s'[: self.threads > 1]}"
        return f"{self.model}, {self.samples}×{self.tokens} tokens{after}, {threads}"

    @property
    def key(self) -> str:
        """Its name for patterns and files."""
        return f"{self.batch}-t{self.threads}"

    @property
    def batch(self) -> str:
        """The name of what is fed."""
        return f"{self.model}-{self.samples}x{self.tokens}" + (f"+{self.past}" if self.past else "")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What is fed, by input and free size."""
        return {"input_ids": (self.samples, self.tokens)} | ({"past": (self.past,)} if self.past else {})


SETTINGS = tuple(Setting(*batch, threads) for batch in BATCHES for threads in THREADS)


def main() -> None:
    """Measures the chosen settings, one by one; the table is written after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    patterns = os.environ.get("LRCOMPILE_LATENCY", "*").split(",")
    chosen = [one for one in SETTINGS if any(fnmatch.fnmatchcase(one.key, pattern) for pattern in patterns)]
    if not chosen:
        raise SystemExit(f"no setting fits; they are {', '.join(one.key for one in SETTINGS)}")
    made = made_by(__file__)
    for one in chosen:
        start = time.monotonic()
        reached, predicted = _measured(one)
        kept("latency", one.key, made, {"model": one.model, "reached": reached, "predicted": predicted})
        print(f"{one.key}: {time.monotonic() - start:.0f} s", flush=True)
        _write(made)


def _write(made: Mapping[str, object]) -> None:
    found = pieces("latency", (one.key for one in SETTINGS), made).values()
    reached, predicted = ([row for each in found for row in each[part]] for part in ("reached", "predicted"))
    slower = sum(float(str(row[2]).split(" ")[0]) > 1 for row in [*reached, *predicted] if row[2] != "—")
    ours = [(each["model"], row) for each in found for row in each["predicted"]]
    groups = {"all": ours, **{name: [pair for pair in ours if pair[0] == name] for name, *_ in BATCHES}}
    said = "; ".join(f"{name} {_error([row for _, row in rows])}" for name, rows in groups.items() if rows)
    summary = f"Error of 90 % of the plans: {said}. Plans or results slower than dense: {slower}."
    write("latency", "Latency budgets", [
        _HEAD, table(("setting", "target", "measured", "by the run itself", "SHA-256"), reached),
        _PREDICTED.format(low=min(PLANS), high=max(PLANS)),
        table(("setting", "predicted", "measured", "error"), predicted), summary])  # fmt: skip


def _error(predicted: Sequence[Sequence[object]]) -> str:
    errors = sorted(abs(float(str(row[3]))) for row in predicted)
    return f"{100 * errors[-(-9 * len(errors) // 10) - 1]:.1f} % of {len(errors)}"


def _measured(one: Setting) -> tuple[list[list[object]], list[list[object]]]:
    dense = zoo.exported(one.model)
    graph = OnnxGraph.load(dense)
    path = stored(feeds(graph, None, one.shapes), WORK / f"latency-{one.batch}.npz")
    del graph
    whole = zoo.load(one.model).calibration()
    data = whole[:: max(len(whole) * len(whole[0]["input_ids"]) // SAMPLES, 1)]
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
    return [one.label, target, ratio_text(timing), f"{own:.3f}", sha256(out)[:12]]


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
        yield [one.label, f"{expected:.3f}", ratio_text(timing), f"{expected / timing.ratio - 1:+.3f}"]


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
