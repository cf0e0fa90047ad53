"""The steps of a run: each takes the run's record and adds to it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile import measure, verify
from lrcompile.budget import Budget, quantity
from lrcompile.data import Batches
from lrcompile.errors import GateError, LrcompileError, UsageError
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.linop import Cost, show
from lrcompile.lowering import Backend, Runnable
from lrcompile.planning import Choice, Planned, Settings, plan
from lrcompile.progress import Progress
from lrcompile.report import html_text, json_text, machine, record, versions
from lrcompile.rewrite import Context, GraphPass, LinearPass, Refused, Rewritten
from lrcompile.samples import first_sample, sample_inputs

PRESETS: dict[str, float] = {"safe": 1e-4, "balanced": 0.2, "small": 0.5, "mcu": 0.5}
"""Largest drift (relative L2 of the worst output) that a preset lets through."""
SLOWER = 1.02
"""A result is slower where the lower end of the measured latency ratio's interval is above this."""


@dataclass(frozen=True)
class Options:
    """Everything beside passes and budget.

    Args:
        preset: a name from :data:`PRESETS`; None means ``small`` under a budget, else ``safe``.
        max_drift: instead of the preset's limit.
        metric: ``(reference outputs, candidate outputs) -> float``, larger is worse; the limit applies to it.
        data_free: allow a lossy budget without calibration data.
        force: replace an existing output.
        force_growth: publish a result that is larger or slower.
        latency: measure latency and memory of files.
        latency_batch: samples per run when latency is measured.
        seconds: how long latency is measured.
    """

    preset: str | None = None
    max_drift: float | None = None
    metric: verify.Metric | None = None
    data_free: bool = False
    force: bool = False
    force_growth: bool = False
    latency: bool = True
    latency_batch: int = 8
    seconds: float = 4.0
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"unknown preset '{self.preset}'", hint=f"known: {', '.join(PRESETS)}")

    def limit(self, budget: Budget) -> float:
        """The drift limit in force."""
        if self.max_drift is not None:
            return self.max_drift
        if budget.drift is not None:
            return float(quantity(budget.drift, "drift") or 0.0)
        return PRESETS[self.preset or ("small" if budget.limited else "safe")]


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


def new_report(verb: Any, options: Options) -> record.Report:
    """An empty report that knows where it is made."""
    return record.Report(
        verb, versions=versions(), machine=machine(), seed=options.settings.seed, preset=options.preset or "", feasible=True
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
    on_disk = sum(file.stat().st_size for file in run.graph.files) or run.graph.nbytes
    macs = run.graph.macs(run.sample) if run.sample is not None else 0
    run.report.before = record.Size(run.graph.parameters, on_disk, macs)
    if path is not None and path.is_file():
        run.report.input = record.FileInfo(path.name, sha256(path), on_disk)


def _one_sample(run: Run) -> Inputs | None:
    for batches in (run.evaluation, run.calibration):
        if batches is not None:
            return first_sample(next(iter(batches)))
    made = sample_inputs(run.graph, run.options.settings.seed)
    return None if made is None else first_sample(made)


def describe_calibration(run: Run) -> None:
    """Kind, samples and hash of the calibration data."""
    data = run.calibration
    if data is None:
        kind = "none" if not run.options.data_free else "uncalibrated"
        run.report.calibration = record.Calibration(kind)
        return
    run.report.calibration = record.Calibration("samples", data.samples, None, data.sha256)
    run.report.notes.extend(data.notes)


# -- rewriting ---------------------------------------------------------------------------------


def apply_exact(run: Run, passes: Sequence[GraphPass], context: Context) -> int:
    """Applies graph passes one by one; one whose result differs is taken back. Returns the rewrites."""
    total = 0
    batch = next(iter(run.evaluation)) if run.evaluation is not None else run.sample
    reference = None if batch is None else run.graph.run(batch)
    if reference is None and passes:
        run.report.notes.append("exact rewrites were checked by structure only: no inputs could be made up")
    for each in passes:
        run.tell(each.name)
        start, mark = time.monotonic(), run.graph.journal.mark()
        outcomes = each.apply(run.graph, context)
        done = [outcome for outcome in outcomes if isinstance(outcome, Rewritten)]
        reason = _differs(run, batch, reference) if done else None
        if reason is not None:
            run.graph.rollback(mark)
            done = []
        total += len(done)
        refused = sum(isinstance(outcome, Refused) for outcome in outcomes)
        seconds = round(time.monotonic() - start, 3)
        run.report.passes.append(record.PassRecord(str(each), each.exact, len(done), refused, reason, seconds))
        run.report.notes.extend(f"{each.name}: {item.site}: {item.detail}" for item in done[:20])
    return total


def _differs(run: Run, batch: Inputs | None, reference: Outputs | None) -> str | None:
    """Why an exact rewrite must be taken back; None where it holds."""
    try:
        run.graph.verify()
        built = run.backend.build(run.graph)
        if batch is None or reference is None:
            return None
        meter = verify.DriftMeter()
        meter.add(batch, reference, built.run(batch))
        if meter.sums:
            verify.require(meter.result(_rounding(reference)))
    except LrcompileError as error:
        return str(error)
    return None


def _rounding(outputs: Outputs) -> float:
    """Largest relative change that is rounding, for the narrowest float among the outputs."""
    names = {array.dtype.name for array in outputs.values()}
    return max((verify.EXACT[name] for name in names if name in verify.EXACT), default=verify.EXACT["float32"])


def make_plan(run: Run, passes: Sequence[LinearPass], budget: Budget) -> Planned:
    """Statistics, proposals, scales and the allocator's choice."""
    before = run.report.before
    whole = Cost() if before is None else Cost(0, before.bytes, before.macs)
    settings = run.options.settings
    start = time.monotonic()
    planned = plan(
        run.graph, passes, budget, run.calibration, settings, whole=whole, sample=run.sample, tell=run.tell
    )
    run.planned = planned
    run.report.notes.extend(planned.notes)
    run.report.costs = {"scales": planned.scales}
    for each in passes:
        own = sum(choice.proposal is not None and choice.proposal.source == each.name for choice in planned.choices)
        seconds = round(time.monotonic() - start, 3)
        run.report.passes.append(record.PassRecord(str(each), False, own, len(planned.choices) - own, None, seconds))
    moments = list(planned.context.moments.values())
    if run.report.calibration is not None and run.calibration is not None and moments:
        tokens = max(moment.tokens for moment in moments)
        run.report.calibration = record.Calibration("samples", run.calibration.samples, tokens, run.calibration.sha256)
    return planned


def install(run: Run, planned: Planned) -> int:
    """Puts the chosen expressions into the graph; one that breaks its promise stays dense."""
    count = 0
    by_name = {site.name: site for site in run.graph.linear_sites()}
    for choice in planned.choices:
        if choice.proposal is None:
            continue
        mark = run.graph.journal.mark()
        for name, new in choice.proposal.by.items():
            run.graph.replace(by_name[name], new.operator, new.shift)
        broken = _broken_promise(choice, planned.context)
        if broken:
            run.graph.rollback(mark)
            choice.proposal, choice.reason, choice.refused = None, f"rolled back: {broken}", True
            run.report.notes.append(f"{choice.site.name}: {choice.reason}")
        else:
            count += 1
    return count


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


# -- after -------------------------------------------------------------------------------------


def target_of(graph: Graph, out: Path | None) -> Path | None:
    """The file that a run publishes: ``out``, or the artefact's index inside a folder."""
    if out is None or graph.kind == "onnx":
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be made: {error.strerror}", where=str(out), hint="choose another output") from error
    return out / "lrcompile.json"


def gate(run: Run, built: Runnable, budget: Budget) -> None:
    """Measures the drift of the artefact on held-out samples and stops one that moved too far.

    Raises:
        GateError: above the limit.
    """
    if run.evaluation is None:
        run.report.notes.append("no held-out samples: the drift was not measured")
        return
    run.tell("measuring drift on held-out samples")
    limit = run.options.limit(budget)
    drift = verify.measure(run.graph.run, built.run, run.evaluation, limit=limit, metric=run.options.metric)
    run.graph.release()
    passed = drift.passed
    run.report.drift = record.Drift(
        drift.relative_l2,
        drift.cosine,
        drift.top1,
        drift.kl,
        drift.metric,
        drift.samples,
        limit,
        passed,
        drift.worst_output,
    )
    if not passed:
        run.report.status = "gate_failed"
        run.report.budget = reached(run, built, budget)
        verify.require(drift)


def describe_after(run: Run, built: Runnable, files: AtomicSet | None) -> None:
    """Size, hash, latency and memory of the artefact, read from its files where it has some."""
    report, before = run.report, run.report.before
    built.release()
    macs = built.macs(run.sample) if run.sample is not None else 0
    on_disk = built.nbytes if files is None else files.nbytes
    after = record.Size(built.parameters, on_disk, macs)
    interval = None
    source: Path | None = getattr(run.graph, "path", None)
    if run.options.latency and files is not None and run.graph.kind == "onnx" and source is not None:
        run.tell("measuring latency")
        before, after, interval = _timed(run, source, files.path, before, after)
    if files is not None:
        report.output = record.FileInfo(files.target.name, sha256(files.path), on_disk)
    report.before, report.after = before, after
    report.ratio = None if before is None else record.Ratio.of(before, after, interval)


def _timed(
    run: Run, source: Path, result: Path, before: record.Size | None, after: record.Size
) -> tuple[record.Size | None, record.Size, tuple[float, float, float] | None]:
    feeds = _feeds(run)
    if feeds is None or before is None:
        return before, after, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "feeds.npz"
        np.savez(path, **feeds)
        timing = measure.time_files([source, result], path, seconds=run.options.seconds)
        peaks = [measure.peak_memory(file, path) for file in (source, result)]
    if timing is None:
        run.report.notes.append("latency was not measured: ONNX Runtime does not run the model on this CPU")
        return before, after, None
    sizes = [
        record.Size(size.parameters, size.bytes, size.macs, ms, peak)
        for size, ms, peak in zip((before, after), timing.median_ms, peaks, strict=True)
    ]
    return sizes[0], sizes[1], (timing.ratio, timing.low, timing.high)


def _feeds(run: Run) -> dict[str, np.ndarray] | None:
    """Inputs for timing: the first batch of held-out samples."""
    if run.evaluation is not None:
        batch = next(iter(run.evaluation))
        return {name: array[: run.options.latency_batch] for name, array in batch.items()}
    return None if run.sample is None else dict(run.sample)


def refuse_growth(run: Run, budget: Budget) -> None:
    """Stops a result that is larger or slower than what came in.

    Raises:
        GateError: it is, and the user did not ask for it.
    """
    ratio = run.report.ratio
    if ratio is None or run.options.force_growth:
        return
    larger = ratio.bytes is not None and ratio.bytes > 1 and (run.report.after or ratio) is not None
    slower = ratio.latency_low is not None and ratio.latency_low > SLOWER
    if (larger and run.report.input is not None) or slower:
        run.report.status = "gate_failed"
        what = f"{ratio.bytes:.3f} times the bytes" if larger else f"{ratio.latency:.3f} times the latency"
        raise GateError(f"the result has {what} of the original", hint="--force-growth publishes it all the same")
    run.report.budget = reached(run, None, budget)


def reached(run: Run, built: Runnable | None, budget: Budget) -> dict[str, record.BudgetLine]:
    """Every limit with what the result reaches."""
    after, planned = run.report.after, run.planned
    keep = planned.after.parameters / planned.before.parameters if planned and planned.before.parameters else None
    values = {
        "keep": keep,
        "bytes": None if after is None else float(after.bytes),
        "macs": None if after is None else float(after.macs),
        "drift": None if run.report.drift is None else run.report.drift.relative_l2,
    }
    lines = {}
    for name, value in values.items():
        target = quantity(getattr(budget, name), name)
        if target is None:
            continue
        before = getattr(run.report.before, name, None)
        share = name in ("bytes", "macs") and target <= 1 and before
        lines[name] = record.BudgetLine(target, value / before if share and value is not None else value)
    return lines


def decide(run: Run, planned: Planned | None) -> None:
    """Decisions of all sites, in the graph's order, with the counts of what happened."""
    report = run.report
    choices = {choice.site.name: choice for choice in planned.choices} if planned is not None else {}
    touched = getattr(run.graph, "replacements", {})
    counts = dict.fromkeys(record.SITES, 0)
    for site in run.graph.linear_sites():
        choice = choices.get(site.name)
        rewritten = site.name in touched or (choice is not None and choice.proposal is not None)
        refused = bool(site.frozen) or (choice is not None and choice.refused)
        counts["total"] += 1
        counts["rewritten" if rewritten else "refused" if refused else "dense"] += 1
        report.decisions.append(_decision(site, choice, touched))
        if choice is not None and len(choice.tails):
            rank = None if choice.proposal is None else choice.proposal.rank
            report.spectra.append(record.Spectrum.of(site.name, choice.tails, rank))
    report.sites = counts
    subgraphs = getattr(run.graph, "subgraph_weights", list)()
    if subgraphs:
        report.notes.append(f"{len(subgraphs)} weights inside If, Loop or Scan bodies pass through unchanged")


def _decision(site: Any, choice: Choice | None, touched: dict) -> record.Decision:
    structure = show(site.operator)
    if choice is None or choice.proposal is None:
        if choice is None and site.name in touched:
            return record.Decision(site.name, site.shape, "exact", structure, None, None, None, "loses nothing")
        reason = choice.reason if choice is not None else site.frozen or "no budget was given"
        return record.Decision(site.name, site.shape, None, structure, 1.0, 0.0, 0.0, reason)
    proposal = choice.proposal
    if choice.site.name in touched:
        structure = show(touched[choice.site.name].operator)
    keep = proposal.cost.parameters / choice.before.parameters
    error = choice.error / choice.energy if choice.error is not None and choice.energy else None
    return record.Decision(site.name, site.shape, proposal.source, structure, keep, choice.predicted, error, choice.reason)


def predict(run: Run, planned: Planned) -> None:
    """What a plan would reach, for a verb that builds nothing."""
    before = run.report.before
    if before is None:
        return
    saved = planned.before.nbytes - planned.after.nbytes
    removed = planned.before.parameters - planned.after.parameters
    after = record.Size(round(before.parameters - removed), before.bytes - saved, round(before.macs - planned.saved_macs))
    run.report.after = after
    run.report.ratio = record.Ratio.of(before, after)


def write_reports(run: Run, files: AtomicSet) -> None:
    """The JSON sidecar and the HTML report beside the artefact."""
    stem = files.target.name.removesuffix(".onnx")
    name = "report" if run.graph.kind != "onnx" else f"{stem}.report"
    run.report.report = f"{name}.json"
    files.stage(f"{name}.json").write_text(json_text(run.report), encoding="utf-8")
    files.stage(f"{name}.html").write_text(html_text(run.report), encoding="utf-8")
