"""Making a plan: the pipeline's choice for a whole module, as entries that outlive it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrcompile.budget import Budget
from lrcompile.choices import Choice, Planned
from lrcompile.errors import UnsupportedError
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph, Replacement
from lrcompile.options import Options
from lrcompile.pipeline import Pipeline
from lrcompile.plans import Entry, Plan, Recipe, content
from lrcompile.progress import Progress
from lrcompile.report import record
from lrcompile.rewrite import Pass
from lrcompile.sites import LinearSite


def make(
    model: Any,
    passes: Sequence[Pass],
    budget: Budget,
    options: Options,
    calibration: Any = None,
    evaluation: Any = None,
    tell: Progress | None = None,
) -> Plan:
    """The plan of a module, ONNX model or path under a budget.

    With evaluation data the plan is installed in a copy of the module tree and has to pass the gate.

    Raises:
        UsageError: no limit, or a lossy budget without data.
        UnsupportedError: the model has no linear weight.
        InfeasibleError: the budget cannot be met.
        GateError: the outputs drift too far on the evaluation data.
    """
    graph = open_graph(model)
    _require_sites(graph)
    pipeline = Pipeline(passes, budget, options)
    if evaluation is None:
        planned, report = pipeline.plan(graph, calibration, tell=tell)
        held: Mapping[str, Replacement] = _chosen(planned) if graph.kind == "module" else {}
    else:
        result = pipeline.run(graph, calibration, evaluation, tell=tell)
        assert result.planned is not None  # there is a limit
        planned, report = result.planned, result.report
        held = dict(getattr(graph, "replacements", {}))
    plan = _plan(model, graph, planned, report, held, passes)
    plan.budget = {name: value for name, value in vars(budget).items() if value is not None}
    del planned, graph
    gc.collect()  # the graph's copy of the module tree holds the module's own parameters
    return plan


def _require_sites(graph: Graph) -> None:
    sites = graph.linear_sites()
    if not sites:
        raise UnsupportedError("the model has no linear weight: there is nothing to plan", where=_title(graph))
    if all(site.frozen for site in sites):
        raise UnsupportedError(f"no weight can be replaced: {sites[0].frozen}", where=sites[0].name)


def _title(graph: Graph) -> str:
    return type(getattr(graph, "model", graph)).__name__


def _chosen(planned: Planned) -> dict[str, Replacement]:
    chosen: dict[str, Replacement] = {}
    for choice in planned.choices:
        if choice.proposal is not None:
            chosen.update(choice.proposal.by)
    return chosen


def _plan(
    model: Any,
    graph: Graph,
    planned: Planned,
    report: record.Report,
    held: Mapping[str, Replacement],
    passes: Sequence[Pass],
) -> Plan:
    texts = {each.name: str(each) for each in passes}
    names = _names(model if isinstance(model, nn.Module) else getattr(graph, "model", None))
    made = _Made(graph, names, {choice.site.name: choice for choice in planned.choices}, held, texts)
    entries = [made.entry(site) for site in graph.linear_sites()]
    drift = report.drift
    plan = Plan(
        {entry.name: entry for entry in entries},
        dict(planned.context.moments),
        dict(planned.context.gradients),
        calibrated=bool(planned.context.moments),
        align=planned.context.align,
        seed=planned.context.seed,
        report=report,
        verified=drift is not None and bool(drift.passed),
        drift=None if drift is None else drift.value,
        graph=graph.kind,
        passes={str(each): each for each in passes},
    )
    if isinstance(model, nn.Module):
        plan.modules.add(model)
        plan.table.know(model)
    return plan


def _names(model: Any) -> dict[int, list[str]]:
    """By ``id`` of a parameter: all of its names."""
    found: dict[int, list[str]] = {}
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
    return found


@dataclass(frozen=True)
class _Made:
    """What the entries are made from."""

    graph: Any
    names: Mapping[int, list[str]]
    choices: Mapping[str, Choice]
    held: Mapping[str, Replacement]
    texts: Mapping[str, str]  # of the passes, by their name

    def entry(self, site: LinearSite) -> Entry:
        choice = self.choices.get(site.name)
        reason = site.frozen or ("" if choice is None else choice.reason)
        if self.graph.kind != "module":
            return Entry(site.name, (), site.kind, site.shape, "", "", reason=reason)
        reader = self.graph.found(site.name).readers[0]
        weight = reader.module._parameters.get("weight")
        if weight is None:  # computed from other parameters
            return Entry(site.name, (), reader.kind, site.shape, "", "", reason=reason)
        replacement = self.held.get(site.name)
        return Entry(
            site.name,
            tuple(self.names.get(id(weight), ())),
            reader.kind,
            tuple(weight.shape),
            str(weight.dtype).removeprefix("torch."),
            content(weight),
            replacement,
            None if replacement is None else self._recipe(site, choice),
            reason,
        )

    def _recipe(self, site: LinearSite, choice: Choice | None) -> Recipe | None:
        uses = tuple(use.input for use in site.uses)
        biased = all(use.bias is not None for use in site.uses)
        proposal = None if choice is None else choice.proposal
        if proposal is None:
            return Recipe("exact-low-rank", "", uses, biased, site.window)  # the one exact pass over single weights
        if len(proposal.sites) > 1:
            return None
        return Recipe(self.texts.get(proposal.source, proposal.source), proposal.label, uses, biased, site.window)
