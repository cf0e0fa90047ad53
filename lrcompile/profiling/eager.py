"""Times a module's products in torch, in this process: what the ``eager`` backend would run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompile.costs import SCHEMA, Shape, described
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_run import call
from lrcompile.graphs.module_time import both, caller, ready
from lrcompile.graphs.structured import affine
from lrcompile.linop import Dense, LinearOperator
from lrcompile.measure import interleaved
from lrcompile.profiling.survey import Candidate, Survey, anchored, copied, copies, image, random_weight
from lrcompile.progress import Progress
from lrcompile.report import machine, versions
from lrcompile.sites import Window
from lrcompile.windows import convolve


def measured(survey: Survey, threads: int, seconds: float, tell: Progress) -> dict[str, Any]:
    """The costs as ``costs.json`` holds them.

    Raises:
        InvalidInputError: the model fails on the batch.
    """
    graph = survey.graph
    assert isinstance(graph, ModuleGraph)
    call(graph.model, survey.feed)
    tell("timing products of every shape", len(survey.candidates))
    shapes = []
    with ready([graph.model], threads):
        for shape, candidates in survey.candidates.items():
            shapes.append(_shape(survey, shape, candidates, seconds))
            tell.advance()
        total, anchor = _model(graph, survey, 10 * seconds)
    return {
        "schema": SCHEMA,
        "runtime": "torch",
        "threads": threads,
        "total_ms": total,
        "anchor": anchor,
        "inputs": {name: list(array.shape) for name, array in survey.feed.items()},
        "machine": machine(),
        "versions": versions(),
        "shapes": shapes,
    }


def _shape(survey: Survey, shape: Shape, candidates: Sequence[Candidate], seconds: float) -> dict[str, Any]:
    count = copies(survey, shape)
    weight = random_weight(shape)
    x = torch.randn(*image(shape), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    dense = _calls(lambda w: _applied(shape, w, x), [Dense(weight.clone()) for _ in range(count)])
    absolute: list[float] = []
    forms: dict[str, list[dict[str, Any]]] = {}
    for each in candidates:
        operator = each.build()
        chain = _calls(lambda op: _applied(shape, op, x), [copied(operator) for _ in range(count)])
        rows = interleaved([dense, chain], seconds)
        absolute += rows[0]
        ratio = statistics.median(b / a for a, b in zip(*rows, strict=True))
        forms.setdefault(each.form, []).append({"macs": each.macs, "rank": each.rank, "ratio": ratio})
    ms = statistics.median(absolute or interleaved([dense], seconds)[0]) / count
    points = {form: [{"macs": p["macs"], "rank": p["rank"], "ms": ms * p["ratio"]} for p in found]
              for form, found in forms.items()}  # fmt: skip
    return {
        **described(shape),
        "sites": survey.counts[shape],
        "ms": ms,
        "forms": [{"form": form, "points": found} for form, found in points.items()],
    }


def _applied(shape: Shape, operator: LinearOperator, x: Tensor) -> Callable[[], object]:
    if shape.window:
        return lambda: convolve(operator, x, Window(*shape.window))
    return lambda: affine(operator, x, None)


def _calls(make: Callable[[Any], Callable[[], object]], each: Sequence[Any]) -> Callable[[], None]:
    """One call that goes through products with weights of their own."""
    made = [make(one) for one in each]

    def run() -> None:
        for one in made:
            one()

    return run


def _model(graph: ModuleGraph, survey: Survey, seconds: float) -> tuple[float, dict[str, Any] | None]:
    """The whole model's milliseconds, and its ratio to one that has something cheaper at every site."""
    mark, sites = graph.journal.mark(), {site.name: site for site in graph.linear_sites()}
    before = caller(graph.model, survey.feed)
    chosen = survey.anchor()
    if not chosen:
        return statistics.median(interleaved([before], seconds)[0]), None
    operators = {id(each): each.build() for each in chosen.values()}
    stood = both(graph)[1]
    try:
        for name, each in chosen.items():
            graph.replace(sites[name], copied(operators[id(each)]))
        with ready([stood, graph.model]):
            rows = interleaved([caller(stood, survey.feed), caller(graph.model, survey.feed)], seconds)
    finally:
        graph.rollback(mark)
    ratio = statistics.median(b / a for a, b in zip(*rows, strict=True))
    return statistics.median(rows[0]), {"ratio": ratio, "sites": anchored(survey)}
