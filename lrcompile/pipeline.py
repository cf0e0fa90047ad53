"""The main job: exact rewrites, a plan under a budget, the artefact, the gate, the report.

Nothing is published before the graph is well-formed, every site does what its pass promised,
and the outputs of the *built artefact* stay close on inputs that calibration did not see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile import costs, outcome, stages, timing
from lrcompile.budget import COSTS, Budget, quantity
from lrcompile.choices import Planned
from lrcompile.errors import GateError, InfeasibleError, LrcompileError, UsageError
from lrcompile.files import AtomicSet, made_folder
from lrcompile.graphs.base import Graph
from lrcompile.lowering import Runnable
from lrcompile.options import Options
from lrcompile.order import Pivoted
from lrcompile.progress import Progress
from lrcompile.registry import EXACT, FOLLOWING, backend_for, load
from lrcompile.report import record
from lrcompile.rewrite import Context, GraphPass, LinearPass, Pass
from lrcompile.seeking import Seeker

ROUNDS = 8
"""How often a result that misses its limits is chosen again."""


@dataclass(eq=False)
class Result:
    """A rewritten model with its report.

    Attributes:
        graph: the rewritten graph.
        built: the artefact, ready to run.
        report: what was decided and measured.
        path: where it was published, if it was.
        planned: what the allocator chose, where there was a limit.
        final: what was built: ``graph``, or its copy that passes over the nodes of the result have cut up.
    """

    graph: Graph
    built: Runnable
    report: record.Report
    path: Path | None = None
    planned: Planned | None = None
    final: Graph | None = None

    @property
    def model(self) -> Any:
        """The rewritten ``nn.Module``, ``torch.export.ExportedProgram`` or ``onnx_ir.Model``: what was given."""
        return getattr(self.built, "module", None) or getattr(self.built, "model", None)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes the artefact with its reports into a folder; :func:`lrcompile.load` reads it back.

        Raises:
            UsageError: there is one already and ``force`` is not set.
        """
        from lrcompile.artifact import save_result

        return save_result(self, Path(folder), force=force)


@dataclass(frozen=True)
class Pipeline:
    """Passes in their order, under one budget.

    Exact graph passes run one after the other, each checked; linear passes share one allocation.

    Args:
        passes: the project's exact passes come before these unless ``exact`` is False.
        budget: without a limit only exact passes run.
    """

    passes: Sequence[Pass]
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    options: Options = Options()  # noqa: RUF009 - frozen
    exact: bool = True

    def run(
        self,
        graph: Any,
        calibration: Any = None,
        evaluation: Any = None,
        *,
        out: str | Path | None = None,
        tell: Progress | None = None,
    ) -> Result:
        """Rewrites a model; publishes it to ``out`` where one is given.

        Args:
            graph: a graph, ``nn.Module``, ONNX model or path.
            calibration: samples, see :class:`lrcompile.data.Batches`; a fifth is held out where
                ``evaluation`` is None.

        Raises:
            UsageError: a lossy budget without data, or an output that exists.
            InfeasibleError: the budget cannot be met.
            GateError: the result is too far off, larger or slower; nothing was published.
        """
        start = time.monotonic()
        from lrcompile.frontend import open_graph

        graph = open_graph(graph)
        outcome.target_of(graph, Path(out) if out is not None else None)  # a wrong name is told before the work
        run = self._prepare(graph, calibration, evaluation, tell, "optimize")
        try:
            return self._rewrite(run, Path(out) if out is not None else None, start)
        except LrcompileError as error:
            _stopped(error, run, self.budget, start)
            raise

    def plan(
        self, graph: Any, calibration: Any = None, *, tell: Progress | None = None
    ) -> tuple[Planned, record.Report]:
        """What :meth:`run` would choose; changes and writes nothing.

        Raises:
            UsageError: no limit, or a lossy budget without data.
            InfeasibleError: the budget cannot be met.
        """
        start = time.monotonic()
        from lrcompile.frontend import open_graph

        run = self._prepare(open_graph(graph), calibration, None, tell, "plan")
        if not self.budget.limited:
            raise UsageError("a plan needs a limit", hint="give --keep, --bytes, --macs, --latency or --drift")
        try:
            planned = self._planned(run)
            if self.budget.by_drift:
                planned = run.planned = self._seeker(run, planned).seek(planned)
        except LrcompileError as error:
            _stopped(error, run, self.budget, start)
            raise
        outcome.conclude(run)
        outcome.predict(run, planned)
        run.report.budget = outcome.reached(run, self.budget)
        run.report.seconds = time.monotonic() - start
        return planned, run.report

    # -- steps -----------------------------------------------------------------------------

    def _rewrite(self, run: stages.Run, out: Path | None, start: float) -> Result:
        rewrites, mark = self._exact(run), run.graph.journal.mark()
        planned = self._planned(run) if self.budget.limited else None
        seeker = self._seeker(run, planned) if planned is not None and self.budget.by_drift else None
        if planned is not None and seeker is not None:
            planned = run.planned = seeker.seek(planned)
        reserve = np.zeros(len(COSTS))
        rounds = 0
        while rounds < ROUNDS:
            wanted = 0 if planned is None else sum(choice.proposal is not None for choice in planned.choices)
            count = 0 if planned is None else stages.install(run, planned)
            stages.apply_following(run, self._following(run), self.options.settings.seed)
            try:
                return self._finish(run, rewrites + count, out, start)
            except _MissedError as missed:
                run.graph.rollback(mark)
                if count == wanted:  # else it is enough to choose without what was taken back
                    reserve, rounds = np.maximum(reserve, missed.room) + 0.1 * missed.room, rounds + 1
                planned = run.planned = missed.planned.again(reserve)
            except GateError:
                rounds += 1
                if seeker is None or planned is None or not outcome.drifted(run) or rounds == ROUNDS:
                    raise
                run.graph.rollback(mark)
                planned = run.planned = self._tightened(run, seeker, planned)
        raise InfeasibleError("the result keeps missing its limits", hint="relax them a little")

    def _prepare(self, graph: Graph, calibration: Any, evaluation: Any, tell: Progress | None, verb: str) -> stages.Run:
        data, held = stages.samples(graph, calibration, evaluation, needs_held=verb == "optimize")
        if self._lossy and data is None and not self.options.data_free:
            what = "a lossy budget" if self.budget.limited else "a pass that is not exact"
            raise UsageError(
                f"{what} needs calibration data",
                hint="give --calib samples.npz, or --data-free to go without (the result is stamped uncalibrated)",
            )
        if self.options.costs is not None and self.budget.latency is None:
            raise UsageError("--costs is of use with --latency only", hint="give --latency 0.8")
        report = stages.new_report(verb, self.options, self.budget)
        run = stages.Run(graph, backend_for(graph), self.options, report, tell or Progress(), data, held)
        stages.describe_before(run)
        stages.describe_calibration(run, lossy=self._lossy)
        run.report.config = self._config(calibration, evaluation)
        return run

    def _config(self, calibration: Any, evaluation: Any) -> dict[str, Any]:
        """What was asked for, by the names of the command line's options; ``--config`` runs it again."""
        sources = {"calibration": calibration, "evaluation": evaluation}
        given = {name: str(value) for name, value in sources.items() if isinstance(value, str | Path)}
        limits = {name: value for name, value in vars(self.budget).items() if value is not None}
        return {"pass": [str(each) for each in self.passes], **limits, **given, **self.options.config(self.budget)}

    @property
    def _lossy(self) -> bool:
        return self.budget.limited or any(isinstance(each, GraphPass) and not each.exact for each in self.passes)

    def _exact(self, run: stages.Run) -> int:
        """Graph passes in their order; those that rewrite nodes come before ours that rewrite weights."""
        ours = [load("passes", name)() for name in EXACT] if self.exact else []
        given = [each for each in self.passes if isinstance(each, GraphPass) and not (each.late or each.follows)]
        nodes, given = [p for p in given if p.early], [p for p in given if not p.early]
        context = Context(run.graph, align=run.backend.align, seed=self.options.settings.seed)
        # a metric of the user's own judges at the gate only
        limit = self.options.limit(self.budget) if self.options.metric is None else math.inf
        return stages.apply_exact(run, [*nodes, *ours, *given], context, limit)

    def _following(self, run: stages.Run) -> list[GraphPass]:
        """Exact passes behind replaced weights: ours, and the user's own; none where nothing puts channels in order."""
        given = [each for each in self.passes if isinstance(each, GraphPass) and each.follows]
        ours = [load("passes", name)() for name in FOLLOWING] if self.exact else []
        moves = any(Pivoted.of(site.operator) is not None for site in run.graph.linear_sites())
        return [*given, *(each for each in ours if moves and each not in given)]

    def _seeker(self, run: stages.Run, planned: Planned) -> Seeker:
        return Seeker(run, self.options.limit(self.budget), planned.predicted)

    def _tightened(self, run: stages.Run, seeker: Seeker, planned: Planned) -> Planned:
        """The next plan after one that drifted too far on held-out samples."""
        drift = run.report.drift
        if drift is not None and drift.value is not None and drift.limit is not None:
            seeker.tighten(drift.value, drift.limit)
        run.report.status = "ok"
        return seeker.seek(planned.within(seeker.loss))

    def _planned(self, run: stages.Run) -> Planned:
        linear = [each for each in self.passes if isinstance(each, LinearPass)]
        if not linear:
            raise UsageError("a budget needs a pass that makes weights smaller", hint="for instance low-rank")
        return stages.make_plan(run, linear, self.budget, absorbs=self.exact)

    def _finish(self, run: stages.Run, rewrites: int, out: Path | None, start: float) -> Result:
        report = run.report
        late = [each for each in self.passes if isinstance(each, GraphPass) and each.late]
        graph, cut = stages.apply_late(run, late, self.options.settings.seed)
        if not rewrites + cut:
            built = run.backend.build(run.graph)
            self._check_limits(run, built, None)
            self._check_latency(run, built, None)
            outcome.conclude(run)
            report.status = "unchanged"
            report.seconds = time.monotonic() - start
            return Result(run.graph, built, report, planned=run.planned)
        source = getattr(run.graph, "path", None)
        target = outcome.target_of(run.graph, out)
        files = AtomicSet(target, inputs=[source] if source else [], force=self.options.force) if target else None
        folder = target.parent if target is not None and target != out else None
        with made_folder(folder) if folder else nullcontext(), files or nullcontext():
            built = run.backend.build(graph, out=files)
            self._check_limits(run, built, files)
            self._check_latency(run, built, files)
            outcome.conclude(run)
            outcome.gate(run, built, self.budget)
            outcome.describe_after(run, built, files)
            outcome.refuse_growth(run, self.budget)
            report.seconds = time.monotonic() - start
            if files is not None:
                outcome.write_reports(run, files)
            built.release()
        return Result(run.graph, built, report, target, run.planned, graph)

    def _check_limits(self, run: stages.Run, built: Runnable, files: AtomicSet | None) -> None:
        room = outcome.missing(run, built, files, self.budget)
        if room.any() and run.planned is not None:
            raise _MissedError(run.planned, room)

    def _check_latency(self, run: stages.Run, built: Runnable, files: AtomicSet | None) -> None:
        """Measures what was built against a latency budget, and chooses again where it misses."""
        if run.prices is None or run.planned is None or not run.options.latency:
            return
        run.timing = timing.measured(run, built, files)
        if timing.misses(run, self.budget):
            run.report.costs["latency"] = costs.to_json(run.prices.table)
            raise _MissedError(run.planned, np.zeros(len(COSTS)))


class _MissedError(Exception):
    """A built result exceeds limits; it is taken back and chosen again with ``room`` to spare."""

    def __init__(self, planned: Planned, room: np.ndarray) -> None:
        super().__init__("the result exceeds its limits")
        self.planned = planned
        self.room = room


def _stopped(error: LrcompileError, run: stages.Run, budget: Budget, start: float) -> None:
    """Gives the error what was found until then."""
    report = error.report = run.report
    report.seconds = time.monotonic() - start
    if isinstance(error, InfeasibleError):
        report.feasible = False
        targets = {name: quantity(getattr(budget, name), name) or 0.0 for name in error.best}
        report.budget = {name: record.BudgetLine(targets[name], best) for name, best in error.best.items()}
