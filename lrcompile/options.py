"""What a run is told beside its passes and its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrcompile.budget import Budget, quantity
from lrcompile.costs import CostTable
from lrcompile.errors import UsageError, nearest
from lrcompile.planning import Settings
from lrcompile.verify import Metric, Run

PRESETS: dict[str, float] = {"safe": 1e-4, "balanced": 0.2, "small": 0.5, "mcu": 0.5}
"""Largest drift (relative L2 of the worst output) that a preset lets through."""


Task = Callable[[Run], Mapping[str, float]]


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
        latency_inputs: the batch of timed runs, in any form that calibration takes, instead of the first samples.
        seconds: how long latency is measured.
        threads: of timed runs; 0 is all cores.
        costs: under a latency budget, a ``costs.json`` (or a report that holds one) instead of measuring here;
            results do not correct it, so equal tables give equal plans.
        task: scores a run, ``task(model.run) -> {"accuracy": 0.98}``; reported for both files.
        report_name: stem of the reports; by default the artefact's with ``.report``.
    """

    preset: str | None = None
    max_drift: float | None = None
    metric: Metric | None = None
    data_free: bool = False
    force: bool = False
    force_growth: bool = False
    latency: bool = True
    latency_batch: int = 8
    latency_inputs: Any = None
    seconds: float = 4.0
    threads: int = 0
    costs: str | Path | CostTable | None = None
    task: Task | None = None
    report_name: str = ""
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"unknown preset '{self.preset}'", hint=nearest(self.preset, PRESETS))
        if self.max_drift is not None and not self.max_drift >= 0:
            raise UsageError(f"{self.max_drift} is no limit", where="max-drift", hint="a number from 0 on")
        for name, least in (("threads", 0), ("latency_batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{getattr(self, name)} is too few", where=name.replace("_", "-"), hint=f"{least} on")

    def preset_for(self, budget: Budget) -> str:
        """The preset in force."""
        return self.preset or ("small" if budget.limited else "safe")

    def config(self, budget: Budget) -> dict[str, Any]:
        """What is in force, by the names of the command line's options."""
        metric = None if self.metric is None else f"{self.metric.__module__}:{self.metric.__qualname__}"
        limit = {} if self.max_drift is None else {"max-drift": self.max_drift}
        timed = {"threads": self.threads, "latency-batch": self.latency_batch} if budget.latency is not None else {}
        timed |= {
            name: str(value)
            for name, value in (("costs", self.costs), ("latency-inputs", self.latency_inputs))
            if isinstance(value, str | Path)
        }
        return {
            "preset": self.preset_for(budget),
            **limit,
            **timed,
            **({} if metric is None else {"metric": metric}),
            "include": list(self.settings.include),
            "exclude": list(self.settings.exclude),
            "data-free": self.data_free,
            "force-growth": self.force_growth,
            "latency-check": self.latency,
            **({} if self.settings.probes is None else {"probes": self.settings.probes}),
            "seed": self.settings.seed,
        }

    def limit(self, budget: Budget) -> float:
        """The drift limit in force: the smaller one where both the budget and the options have one."""
        given = [limit for limit in (self.max_drift, quantity(budget.drift, "drift")) if limit is not None]
        return min(given) if given else PRESETS[self.preset_for(budget)]
