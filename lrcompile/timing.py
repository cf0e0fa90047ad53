"""Time as a budget: what is timed, what candidates cost, and what to do where a result misses its target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrcompile import costs, feeds, measure
from lrcompile.budget import COSTS, Budget, quantity
from lrcompile.choices import Offer
from lrcompile.errors import InfeasibleError, UsageError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Inputs
from lrcompile.lowering import Runnable
from lrcompile.profiling import here
from lrcompile.profiling.prices import Prices
from lrcompile.profiling.survey import survey
from lrcompile.report import machine
from lrcompile.sites import LinearSite

if TYPE_CHECKING:
    from lrcompile.stages import Run

CLOSE = 0.05
"""A result within this share of its target has reached it."""
PRECISION = 0.015
"""How well the ratio of a result is to be known, as far as the machine allows."""
CORRECTIONS = 4
"""How often the prices are corrected by a result that was measured."""
LEAST = 0.01
"""A result that saves less than this share of the time tells nothing about the scale of the prices."""


def feed(run: Run, *, planned: bool) -> dict[str, np.ndarray] | None:
    """The batch of timed runs: the user's own, else the first samples of the data, else one that is made up.

    Args:
        planned: under a latency budget; then it is of the calibration samples, which a plan has as well.
    """
    options = run.options
    if options.latency_inputs is not None:
        return feeds.feeds(run.graph, options.latency_inputs, samples=options.latency_batch)
    order = (run.calibration, run.evaluation) if planned else (run.evaluation, run.calibration)
    data = next((each for each in order if each is not None), None)
    if data is not None:
        return feeds.first(run.graph, data, options.latency_batch)
    made = run.sample if run.timed is None else run.timed
    return None if made is None else dict(made)


def pricer(run: Run, budget: Budget) -> Callable[[Sequence[LinearSite], Mapping[str, Offer]], Prices] | None:
    """What finds out the price of everything on offer; None without a latency budget."""
    if budget.latency is None:
        return None
    if run.calibration is None and run.options.latency_inputs is None:
        raise UsageError(
            "a latency budget needs inputs to measure with",
            where="--latency",
            hint="give --calib samples.npz, or --latency-inputs with one batch",
        )

    def price(sites: Sequence[LinearSite], offers: Mapping[str, Offer]) -> Prices:
        batch = feed(run, planned=True) or {}
        found = survey(run.graph, sites, offers, batch)
        given = run.options.costs
        if given is None:
            table = here.table(found, run.backend, run.options.threads, run.options.settings.cache, run.tell)
        else:
            table = given if isinstance(given, costs.CostTable) else costs.load(Path(given))
            _check(run, table, batch)
        run.prices = Prices(found, table, given is not None)
        run.prices.check()
        return run.prices

    return price


def _check(run: Run, table: costs.CostTable, batch: Inputs) -> None:
    """Whether the user's table is of this runtime and batch; says where it is of another machine."""
    runtime = "onnxruntime" if run.graph.kind == "onnx" else "torch"
    if table.runtime != runtime:
        raise UsageError(
            f"the costs were measured in {table.runtime}, this model runs in {runtime}",
            where="--costs",
            hint="profile this model",
        )
    shapes = {name: tuple(array.shape) for name, array in batch.items()}
    differing = [name for name, shape in table.inputs.items() if name in shapes and shapes[name] != shape]
    if differing:
        name = differing[0]
        sizes = ["×".join(map(str, each)) for each in (table.inputs[name], shapes[name])]
        raise UsageError(
            f"the costs were measured with {name} of {sizes[0]}, the timed batch has {sizes[1]}",
            where="--costs",
            hint="profile with the same --calib and --latency-batch, or give the same --latency-inputs",
        )
    there, mine = table.machine.get("cpu"), machine()["cpu"]
    if there and there != mine:
        run.report.notes.append(f"costs were measured on {there}; the latency in this report is of {mine}")


# -- measuring -----------------------------------------------------------------------------------


def measured(run: Run, built: Runnable, files: AtomicSet | None) -> measure.Timing | None:
    """The result against the original, in turns; None where they do not run here or nothing can be fed."""
    batch = feed(run, planned=run.prices is not None)
    if batch is None:
        return None
    run.tell("measuring latency")
    if run.graph.kind != "onnx":
        return _modules(run, batch)
    source: Path | None = getattr(run.graph, "path", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = files.path if files is not None else _written(built.model, folder / "after.onnx")  # type: ignore[attr-defined]
        if source is None:
            source = _written(run.graph.model, folder / "before.onnx")  # type: ignore[attr-defined]
        batch_file = feeds.stored(batch, folder / "feeds.npz")
        options = run.options
        priced = run.prices is not None
        return measure.time_files(
            [source, result],
            batch_file,
            seconds=options.seconds,
            threads=options.threads,
            precision=PRECISION if priced else 0.0,
            busy=priced,
        )


def _written(model: object, path: Path) -> Path:
    from lrcompile.graphs.onnx.save import write

    with AtomicSet(path) as files:
        write(model, files)  # type: ignore[arg-type]
    return path


def _modules(run: Run, batch: Inputs) -> measure.Timing:
    from lrcompile.graphs.module import ModuleGraph
    from lrcompile.graphs.module_time import both, caller, ready

    assert isinstance(run.graph, ModuleGraph)
    pair = both(run.graph)
    with ready(pair, run.options.threads):
        calls = [caller(model, batch) for model in pair]
        rows = measure.interleaved(calls, run.options.seconds, precision=PRECISION)
    return measure.summary([rows], run.options.threads)


# -- correcting ----------------------------------------------------------------------------------


def predicted(run: Run) -> float | None:
    """What the prices say that the plan takes."""
    if run.prices is None or run.planned is None:
        return None
    return float(run.planned.expected[COSTS.index("latency")])


def misses(run: Run, budget: Budget) -> bool:
    """Whether the measured result is too far from its target; then the prices have been corrected by it.

    A result that is faster than it had to be has paid with quality for nothing, so it is a miss too where
    the target was what made it small.

    Raises:
        InfeasibleError: it is too slow, and corrections do not help.
    """
    target, expected = quantity(budget.latency, "latency"), predicted(run)
    if run.prices is None or run.timing is None or target is None or expected is None:
        return False
    ratio = run.timing.ratio
    slow = ratio > (1 + CLOSE) * target
    if not slow and not (ratio < (1 - CLOSE) * target and expected > (1 - CLOSE) * target):
        return False
    if run.prices.given:
        if slow:
            run.report.notes.append(f"the costs predict ×{expected:.3f}, on this machine the result takes ×{ratio:.3f}")
        return False
    if run.corrections == CORRECTIONS or 1 - ratio < LEAST:
        if slow:
            raise _too_slow(target, ratio)
        return False
    run.corrections += 1
    table = run.prices.table
    run.prices.table = table.scaled(table.scale * (1 - ratio) / max(1 - expected, LEAST))
    return True


def _too_slow(target: float, ratio: float) -> InfeasibleError:
    return InfeasibleError(
        f"latency {target:g} cannot be met; the best found was measured at {ratio:.3f}",
        where="latency",
        hint="raise the limit, or let more sites or passes take part",
        best={"latency": ratio},
    )
