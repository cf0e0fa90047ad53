"""The smallest result under a drift limit: predicted losses are calibrated on a few plans that are measured.

Predicted loss orders the plans; what they really do to the outputs is measured on calibration samples.
The samples that calibration did not see stay the gate's: a plan that fails there lowers the limit here by
what the two measurements differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile import stages, verify
from lrcompile.choices import Planned
from lrcompile.curves import probe_batches
from lrcompile.errors import UsageError
from lrcompile.progress import Watched

PLANS = 6
"""How many plans are measured at most."""
CLOSE = 0.95
"""A plan that reaches this share of the limit is not worth improving."""
SAMPLES = 64
"""Calibration samples that each plan is measured on."""


@dataclass(eq=False)
class Seeker:
    """Looks for the smallest plan whose drift stays below ``limit``; the graph is left as it was.

    Attributes:
        limit: of the drift on calibration samples.
        loss: predicted loss of the plan that :meth:`seek` found; the next search starts from it.
    """

    run: stages.Run
    limit: float
    loss: float

    def seek(self, first: Planned) -> Planned:
        """The plan of fewest bytes that was measured below the limit; one without any rewrite if none was."""
        good, bad, found = 0.0, float("inf"), None
        planned = first
        for _ in range(PLANS):
            measured = self._measured(planned)
            if measured <= self.limit:
                good, found = max(good, self.loss), planned
                if measured >= CLOSE * self.limit or self._exhausted(planned):
                    break
            else:
                bad = min(bad, self.loss)
            step = min(max(self.limit * (1 + CLOSE) / 2 / max(measured, 1e-12), 0.1), 10.0)
            wanted = self.loss * step**2
            if not good < wanted < bad:
                wanted = (good * bad) ** 0.5 if good > 0 else bad / 10
            self.loss = wanted
            planned = first.within(self.loss)
        self.loss = good
        return found if found is not None else first.within(0.0)

    def tighten(self, held_out: float, allowed: float) -> None:
        """Lowers the limit after the gate has measured ``held_out`` instead of the ``allowed`` drift."""
        self.limit *= 0.98 * allowed / held_out
        self.loss *= (0.98 * allowed / held_out) ** 2

    def _measured(self, planned: Planned) -> float:
        run = self.run
        if run.calibration is None:
            raise UsageError("a drift limit alone needs calibration data", hint="give --calib, or another limit")
        batches = probe_batches(run.calibration, SAMPLES)
        run.tell("measuring a plan", len(batches))
        mark = run.graph.journal.mark()
        try:
            stages.install(run, planned)
            built = run.backend.build(run.graph)
            return verify.measure(run.graph.run, built.run, Watched(batches, run.tell), metric=run.options.metric).value
        finally:
            run.graph.rollback(mark)
            run.graph.release()

    @staticmethod
    def _exhausted(planned: Planned) -> bool:
        """Whether nothing smaller is on offer."""
        return all(
            choice.proposal is not None
            and choice.cost.nbytes <= min(each.cost.nbytes for each in planned.offers[choice.site.name].usable)
            for choice in planned.choices
            if not choice.outside and planned.offers[choice.site.name].usable
        )
