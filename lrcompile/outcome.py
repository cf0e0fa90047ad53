"""What came of a run: the gate, the sizes that were measured, the decisions, the reports."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile import feeds, measure, timing, verify
from lrcompile.budget import COSTS, Budget, quantity
from lrcompile.choices import Choice, Planned
from lrcompile.errors import GateError, UsageError
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.base import SUFFIXES, Graph
from lrcompile.linop import show
from lrcompile.lowering import Runnable
from lrcompile.report import html_text, json_text, record
from lrcompile.stages import Run

GATED = 4
"""Held-out samples that both models hold at a time."""
NODES = 1.01
"""Nodes that a pass for memory adds may make a file larger by this much; a result without them by nothing."""
SLOWER = 1.02
"""A result is slower where the lower end of the measured latency ratio's interval is above this."""


def target_of(graph: Graph, out: Path | None) -> Path | None:
    """The file that a run publishes: ``out``, or the artefact's index inside a folder.

    Raises:
        UsageError: its name is that of another kind of model.
    """
    known = SUFFIXES.get(graph.kind, ())
    if out is not None and known and out.suffix in set().union(*SUFFIXES.values()) and out.suffix not in known:
        what = f"a model of kind '{graph.kind}' is not written to a {out.suffix} file"
        raise UsageError(what, where=str(out), hint=f"give a name that ends in {known[0]}")
    return out if out is None or known else out / "lrcompile.json"


def missing(run: Run, built: Runnable, files: AtomicSet | None, budget: Budget) -> np.ndarray:
    """(limits,) how much more room each limit needs than the allocator thought; 0 where the limit holds.

    What files hold beside tensors is not known before they are written, and a site whose pass broke its
    promise is larger than planned.
    """
    planned, before = run.planned, run.report.before
    if planned is None or before is None:
        return np.zeros(len(COSTS))
    macs = built.macs(run.sample) if budget.macs is not None and run.sample is not None else 0
    on_disk = built.nbytes if files is None else files.nbytes
    got = np.array([planned.after.parameters, on_disk, macs, 0.0])  # the latency is measured, and judged apart
    whole = np.array([planned.before.parameters, before.bytes, before.macs, 1.0])
    over = got - budget.limits(whole, np.zeros(len(COSTS)))
    return np.where(over > 1e-9 * whole, np.maximum(got - planned.expected, over), 0.0)


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
    held = run.evaluation.cut(GATED)
    drift = verify.measure(run.graph.run, built.run, held, limit=limit, metric=run.options.metric)
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
        run.report.budget = reached(run, budget)
        verify.require(drift)


def drifted(run: Run) -> bool:
    """Whether the gate has measured a drift above its limit."""
    drift = run.report.drift
    return drift is not None and not drift.passed and drift.value is not None and np.isfinite(drift.value)


def describe_after(run: Run, built: Runnable, files: AtomicSet | None) -> None:
    """Size, hash, latency and memory of the artefact, read from its files where it has some."""
    report, before = run.report, run.report.before
    if run.options.task is not None:
        run.tell("scoring both models")
        scores = run.options.task(run.graph.run), run.options.task(built.run)
        report.task = {name: {"before": scores[0][name], "after": scores[1][name]} for name in scores[0]}
    built.release()
    macs = built.macs(run.sample) if run.sample is not None else 0
    on_disk = built.nbytes if files is None else files.nbytes
    after = record.Size(built.parameters, on_disk, macs)
    interval = None
    source: Path | None = getattr(run.graph, "path", None)
    filed = files is not None and run.graph.kind == "onnx" and source is not None
    if run.options.latency and (filed or run.timing is not None):
        before, after, interval = _timed(run, built, files, before, after)
    if files is not None:
        report.output = record.FileInfo(files.target.name, sha256(files.path), on_disk)
    report.before, report.after = before, after
    report.ratio = None if before is None else record.Ratio.of(before, after, interval)


def _timed(
    run: Run, built: Runnable, files: AtomicSet | None, before: record.Size | None, after: record.Size
) -> tuple[record.Size | None, record.Size, tuple[float, float, float] | None]:
    found = run.timing or timing.measured(run, built, files)
    if before is None:
        return before, after, None
    if found is None:
        run.report.notes.append("latency was not measured: ONNX Runtime does not run the model on this CPU")
        return before, after, None
    peaks = _peaks(run, files)
    sizes = [
        record.Size(size.parameters, size.bytes, size.macs, ms, peak)
        for size, ms, peak in zip((before, after), found.median_ms, peaks, strict=True)
    ]
    return sizes[0], sizes[1], (found.ratio, found.low, found.high)


def _peaks(run: Run, files: AtomicSet | None) -> list[int | None]:
    """Peak memory of both files, where there are files."""
    batch = timing.feed(run, planned=run.prices is not None)
    source: Path | None = getattr(run.graph, "path", None)
    if batch is None or files is None or source is None or run.graph.kind != "onnx":
        return [None, None]
    with tempfile.TemporaryDirectory() as folder:
        path = feeds.stored(batch, Path(folder) / "feeds.npz")
        return [measure.peak_memory(file, path) for file in (source, files.path)]


def refuse_growth(run: Run, budget: Budget) -> None:
    """Stops a result that is larger or slower than what came in.

    Raises:
        GateError: it is, and the user did not ask for it.
    """
    ratio = run.report.ratio
    run.report.budget = reached(run, budget)
    if ratio is None or run.options.force_growth:
        return
    larger = ratio.bytes is not None and ratio.bytes > (NODES if run.cut else 1)
    slower = ratio.latency_low is not None and ratio.latency_low > SLOWER
    if (larger and run.report.input is not None) or slower:
        run.report.status = "gate_failed"
        what = f"{ratio.bytes:.3f} times the bytes" if larger else f"{ratio.latency:.3f} times the latency"
        raise GateError(f"the result has {what} of the original", hint="--force-growth publishes it all the same")


def reached(run: Run, budget: Budget) -> dict[str, record.BudgetLine]:
    """Every limit with what the result reaches."""
    after, planned = run.report.after, run.planned
    keep = planned.after.parameters / planned.before.parameters if planned and planned.before.parameters else None
    values = {
        "keep": keep,
        "bytes": None if after is None else float(after.bytes),
        "macs": None if after is None else float(after.macs),
        "latency": timing.predicted(run) if run.timing is None else run.timing.ratio,
        "drift": None if run.report.drift is None else run.report.drift.value,
    }
    lines = {}
    for name, value in values.items():
        target = quantity(getattr(budget, name), name)
        if target is None:
            continue
        before = float(getattr(run.report.before, name, None) or 0)
        share = name in ("bytes", "macs") and target <= 1 and before > 0
        lines[name] = record.BudgetLine(target, value / before if share and value is not None else value)
    return lines


def decide(run: Run, planned: Planned | None) -> None:
    """Decisions of all sites, in the graph's order, with the counts of what happened."""
    report = run.report
    report.decisions, report.spectra = [], []
    choices = {choice.site.name: choice for choice in planned.choices} if planned is not None else {}
    touched = getattr(run.graph, "replacements", {})
    counts: dict[str, int] = dict.fromkeys(record.SITES, 0)
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


def conclude(run: Run) -> None:
    """What the report says once nothing is chosen any more: decisions, passes, what stood aside."""
    decide(run, run.planned)
    report = run.report
    report.passes = [each for each in report.passes if each.name not in {str(each) for each in run.linear}]
    if run.planned is not None:
        choices = run.planned.choices
        for each in run.linear:
            own = sum(choice.proposal is not None and choice.proposal.source == each.name for choice in choices)
            seconds = round(run.planning, 3)
            run.report.passes.append(record.PassRecord(str(each), False, own, len(choices) - own, None, seconds))


def _decision(site: Any, choice: Choice | None, touched: dict) -> record.Decision:
    structure = show(site.operator)
    if choice is None or choice.proposal is None:
        if site.name in touched:
            keep = None if choice is None else choice.held.parameters / choice.before.parameters
            return record.Decision(site.name, site.shape, "exact", structure, keep, None, None, "loses nothing")
        reason = choice.reason if choice is not None else site.frozen or "no budget was given"
        return record.Decision(site.name, site.shape, None, structure, 1.0, 0.0, 0.0, reason)
    proposal = choice.proposal
    if choice.site.name in touched:
        structure = show(touched[choice.site.name].operator)
    keep = proposal.cost.parameters / choice.before.parameters
    error = choice.error / choice.energy if choice.error is not None and choice.energy else None
    return record.Decision(
        site.name, site.shape, proposal.source, structure, keep, choice.predicted, error, choice.reason
    )


def predict(run: Run, planned: Planned) -> None:
    """What a plan would reach, for a verb that builds nothing."""
    before = run.report.before
    if before is None:
        return
    saved = planned.before.nbytes - planned.after.nbytes
    removed = planned.before.parameters - planned.after.parameters
    after = record.Size(
        round(before.parameters - removed), before.bytes - saved, round(before.macs - planned.saved_macs)
    )
    run.report.after = after
    run.report.ratio = record.Ratio.of(before, after)


def write_reports(run: Run, files: AtomicSet) -> None:
    """The JSON sidecar and the HTML report beside the artefact."""
    target, suffixes = files.target, SUFFIXES.get(run.graph.kind)
    own = "report" if suffixes is None else f"{target.stem if target.suffix in suffixes else target.name}.report"
    name = run.options.report_name or own
    run.report.report = f"{name}.json"
    files.stage(f"{name}.json").write_text(json_text(run.report), encoding="utf-8")
    files.stage(f"{name}.html").write_text(html_text(run.report), encoding="utf-8")
