"""The steps of a run: each takes the run's record and adds to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrcompile import costs, timing, verify
from lrcompile.budget import Budget
from lrcompile.choices import Choice, Planned
from lrcompile.data import Batches
from lrcompile.errors import LrcompileError, ResourceError
from lrcompile.files import digest
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.linop import Cost
from lrcompile.lowering import Backend
from lrcompile.measure import Timing
from lrcompile.options import Options
from lrcompile.planning import plan
from lrcompile.profiling.prices import Prices
from lrcompile.progress import Progress
from lrcompile.report import machine, record, versions
from lrcompile.rewrite import Context, GraphPass, LinearPass, Outcome, Proposal, Refused, Rewritten, storage_dtype
from lrcompile.samples import first_sample, sample_inputs
from lrcompile.sites import LinearSite

GROWN = 16
"""Rounding of half precision grows through the layers of a model: so many times its spacing are no sign of a mistake
where sums are taken in another order, while a channel in the wrong place changes the outputs by their own size."""


@dataclass(eq=False)
class Run:
    """One run while it happens."""

    graph: Graph
    backend: Backend
    options: Options
    report: record.Report
    tell: Progress
    calibration: Batches | None
    evaluation: Batches | None
    planned: Planned | None = None
    sample: Inputs | None = None
    stored: int = 0  # bytes of the tensors of the model as it came
    linear: Sequence[LinearPass] = ()
    planning: float = 0.0  # seconds
    prices: Prices | None = None  # under a latency budget
    timing: Timing | None = None  # of the result against the original, where it was measured
    corrections: int = 0  # of the prices by results
    cut: int = 0  # rewrites of passes over the nodes of the result
    timed: Inputs | None = None  # without data: the sizes that such a pass was told


def new_report(verb: Any, options: Options, budget: Budget) -> record.Report:
    """An empty report that knows where it is made."""
    return record.Report(
        verb,
        versions=versions(),
        machine=machine(),
        seed=options.settings.seed,
        preset=options.preset_for(budget),
        feasible=True,
    )


def samples(
    graph: Graph, calibration: Any, evaluation: Any, *, needs_held: bool
) -> tuple[Batches | None, Batches | None]:
    """Calibration and held-out samples, checked against the graph's inputs.

    Raises:
        InvalidInputError: wrong names, shapes or types, no samples, NaN.
        UsageError: too few samples to hold one out.
    """
    data = None if calibration is None else _checked(graph, calibration)
    held = None if evaluation is None else _checked(graph, evaluation)
    if data is not None and held is None and needs_held:
        data, held = data.split()
    return data, held


def _checked(graph: Graph, source: Any) -> Batches:
    batches = source if isinstance(source, Batches) else Batches(source)
    specs_for = getattr(graph, "specs_for", None)  # a module's signature has more inputs than it needs
    specs = graph.input_specs if specs_for is None else specs_for(batches.names)
    return batches.check(specs)


# -- before ------------------------------------------------------------------------------------


def describe_before(run: Run) -> None:
    """Size and file of the model as it came; its MACs on one sample."""
    run.sample = _one_sample(run)
    path: Path | None = getattr(run.graph, "path", None)
    run.stored = run.graph.nbytes
    on_disk = sum(file.stat().st_size for file in run.graph.files) or run.stored
    macs = run.graph.macs(run.sample) if run.sample is not None else 0
    run.report.before = record.Size(run.graph.parameters, on_disk, macs)
    if path is not None and run.graph.files:
        name = path.name or path.resolve().name
        run.report.input = record.FileInfo(name, digest(path, run.graph.files), on_disk)


def _one_sample(run: Run) -> Inputs | None:
    for batches in (run.evaluation, run.calibration):
        if batches is not None:
            return first_sample(next(iter(batches)), run.graph)
    made = sample_inputs(run.graph, run.options.settings.seed)
    return None if made is None else first_sample(made, run.graph)


def describe_calibration(run: Run, *, lossy: bool) -> None:
    """Kind, samples and hash of the calibration data."""
    data = run.calibration
    if data is None:
        run.report.calibration = record.Calibration("uncalibrated" if lossy else "none")
        if lossy:
            run.report.notes.append("uncalibrated: ranks were chosen without data")
        return
    run.report.calibration = record.Calibration("samples", data.samples, None, data.sha256)
    run.report.notes.extend(data.notes)


# -- rewriting ---------------------------------------------------------------------------------


def apply_exact(
    run: Run,
    passes: Sequence[GraphPass],
    context: Context,
    lossy: float | None = None,
    before: Callable[[Inputs], Outputs] | None = None,
    rounding: float | None = None,
) -> int:
    """Applies graph passes one by one; one whose result differs is taken back. Returns the rewrites.

    Args:
        lossy: largest drift of a pass that does not claim to be exact; the gate measures it again.
        before: computes what the results are compared with; by default the model as it came.
        rounding: largest drift of a pass that does; by default what the type of the outputs bears.
    """
    total = 0
    batch = _batch(run)
    reference = None if batch is None else (before or run.graph.run)(batch)
    if reference is None and passes:
        run.report.notes.append("exact rewrites were checked by structure only: no inputs could be made up")
    for each in passes:
        run.tell(each.name)
        start, mark = time.monotonic(), run.graph.journal.mark()
        outcomes, reason = _applied(each, run.graph, context)
        done = [outcome for outcome in outcomes if isinstance(outcome, Rewritten)]
        if reason is None and (done or run.graph.journal.mark() != mark):  # what a pass does not admit counts too
            reason, now = _differs(run, batch, reference, rounding if each.exact else lossy)
            if reason is None and not each.exact:
                reference = now  # what follows is measured against it
        if reason is not None:
            run.graph.rollback(mark)
            done = []
        total += len(done)
        refused = sum(isinstance(outcome, Refused) for outcome in outcomes)
        seconds = round(time.monotonic() - start, 3)
        run.report.passes.append(record.PassRecord(str(each), each.exact, len(done), refused, reason, seconds))
        run.report.notes.extend(f"{each.name}: {item.site}: {item.detail}" for item in done[:20])
    return total


def _batch(run: Run) -> Inputs | None:
    """What rewrites that promise the same outputs are tried on."""
    return next(iter(run.evaluation)) if run.evaluation is not None else run.sample


def apply_following(run: Run, passes: Sequence[GraphPass], seed: int) -> None:
    """Applies exact passes that tidy up behind replaced weights, compared with the model before them."""
    if not passes:
        return
    _forget(run.report, passes)
    built = run.backend.build(run.graph)
    context = Context(run.graph, align=run.backend.align, seed=seed)
    noise = max(torch.finfo(storage_dtype(site.operator)).eps for site in run.graph.linear_sites())
    apply_exact(run, passes, context, before=built.run, rounding=max(verify.EXACT["float32"], GROWN * noise))
    built.release()


def _forget(report: record.Report, passes: Sequence[GraphPass]) -> None:
    """Takes out what passes that run again for every choice have reported."""
    names, titles = {str(each) for each in passes}, tuple(f"{each.name}: " for each in passes)
    report.passes = [each for each in report.passes if each.name not in names]
    report.notes = [note for note in report.notes if not note.startswith(titles)]


def apply_late(run: Run, passes: Sequence[GraphPass], seed: int) -> tuple[Graph, int]:
    """Applies passes over the nodes of the result to a copy with all sites written out; returns it and the rewrites."""
    if not passes:
        return run.graph, 0
    titles = tuple(f"{each.name}: " for each in passes)
    report = run.report  # another choice before has left its marks
    _forget(report, passes)
    given = run.sample if run.calibration is not None or run.evaluation is not None else None
    graph = run.backend.finished(run.graph)
    context = Context(graph, align=run.backend.align, seed=seed, sample=given)
    count = run.cut = apply_exact(replace(run, graph=graph), passes, context)
    run.timed = None if given is not None else context.sample
    report.notes.extend(f"{title}{note}" for title, note in zip(titles, context.notes, strict=False))
    graph.release()
    return (graph, count) if count else (run.graph, 0)


def _applied(each: GraphPass, graph: Graph, context: Context) -> tuple[Sequence[Outcome], str | None]:
    """What a pass did, or why it stopped half way."""
    try:
        return each.apply(graph, context), None
    except (ResourceError, MemoryError):
        raise
    except Exception as error:  # a pass of another package may raise anything
        return [], f"{type(error).__name__}: {error}"


def _differs(
    run: Run, batch: Inputs | None, reference: Outputs | None, limit: float | None
) -> tuple[str | None, Outputs | None]:
    """Why a rewrite must be taken back, None where it holds; and what the model computes now.

    Args:
        limit: of the drift; None for rounding.
    """
    try:
        run.graph.verify()
        built = run.backend.build(run.graph)
        if batch is None or reference is None:
            return None, None
        meter = verify.DriftMeter()
        found = built.run(batch)
        meter.add(batch, reference, found)
        if meter.sums:
            verify.require(meter.result(_rounding(reference) if limit is None else limit))
    except LrcompileError as error:
        return str(error), None
    return None, found


def _rounding(outputs: Outputs) -> float:
    """Largest relative change that is rounding, for the narrowest float among the outputs."""
    names = {array.dtype.name for array in outputs.values()}
    return max((verify.EXACT[name] for name in names if name in verify.EXACT), default=verify.EXACT["float32"])


def make_plan(run: Run, passes: Sequence[LinearPass], budget: Budget, *, absorbs: bool) -> Planned:
    """Statistics, proposals, scales and the allocator's choice."""
    start = time.monotonic()
    came, now = _sizes(run)
    settings = run.options.settings
    planned = plan(
        run.graph,
        passes,
        budget,
        run.calibration,
        settings,
        came=came,
        now=now,
        sample=run.sample,
        price=timing.pricer(run, budget),
        absorbs=absorbs,
        tell=run.tell,
    )
    run.planned, run.linear, run.planning = planned, passes, time.monotonic() - start
    run.report.notes.extend(planned.notes)
    run.report.costs = {"curves": {name: vars(curve) for name, curve in planned.curves.items()}}
    if run.prices is not None:
        run.report.costs["latency"] = costs.to_json(run.prices.table)
    moments = list(planned.context.moments.values())
    if run.report.calibration is not None and run.calibration is not None and moments:
        tokens = max(moment.tokens for moment in moments)
        run.report.calibration = record.Calibration("samples", run.calibration.samples, tokens, run.calibration.sha256)
    return planned


def _sizes(run: Run) -> tuple[Cost, Cost]:
    """Bytes and multiply–accumulates of the model as it came, and as it stands after exact rewrites."""
    before = run.report.before
    if before is None:
        return Cost(), Cost()
    came = Cost(0, before.bytes, before.macs)
    if not run.graph.journal.entries:
        return came, came
    built = run.backend.build(run.graph)
    macs = built.macs(run.sample) if run.sample is not None else before.macs
    return came, Cost(0, before.bytes - run.stored + built.nbytes, macs)


def install(run: Run, planned: Planned) -> int:
    """Puts the chosen expressions into the graph; one that breaks its promise is taken back. Returns how many stay."""
    count = 0
    by_name = {site.name: site for site in run.graph.linear_sites()}
    for choice in planned.choices:
        if choice.proposal is None:
            continue
        mark = run.graph.journal.mark()
        broken = _put(run.graph, by_name, choice.proposal) or _broken_promise(choice, planned.context)
        if broken:
            run.graph.rollback(mark)
            planned.broke(choice, broken)
            run.report.notes.append(f"{choice.site.name}: {choice.reason}")
        else:
            count += 1
    return count


def _put(graph: Graph, sites: Mapping[str, LinearSite], proposal: Proposal) -> str:
    """Installs a proposal; says why it cannot be."""
    try:
        if set(proposal.by) != set(proposal.sites):
            return f"{proposal.source} replaces {sorted(proposal.by)} instead of {sorted(proposal.sites)}"
        for name, new in proposal.by.items():
            graph.replace(sites[name], new.operator, new.shift)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:  # a pass of another package may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _broken_promise(choice: Choice, context: Context) -> str:
    """Why a site's error is not what its pass said; empty where it is."""
    proposal = choice.proposal
    if proposal is None or set(proposal.by) != {choice.site.name}:
        return ""
    new = proposal.by[choice.site.name]
    measured = choice.error = context.error(choice.site, new.operator, new.shift)
    choice.energy = context.energy(choice.site)
    if measured <= 1.1 * proposal.error + 1e-3 * choice.energy:
        return ""
    return f"its error is {measured:.3g}, but {proposal.source} promised {proposal.error:.3g}"
