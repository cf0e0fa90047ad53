"""Passes and backends by name: ours, and those that other packages announce by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from lrcompile.errors import UsageError, nearest

PASSES = {
    "absorb": "lrcompile.passes.absorb:Absorb",
    "clean": "lrcompile.passes.clean:Clean",
    "fold": "lrcompile.passes.fold:Fold",
    "fold-scales": "lrcompile.passes.fold_scales:FoldScales",
    "exact-low-rank": "lrcompile.passes.exact_low_rank:ExactLowRank",
    "conv-low-rank": "lrcompile.passes.conv_low_rank:ConvLowRank",
    "low-rank": "lrcompile.passes.low_rank:LowRank",
    "schedule-memory": "lrcompile.passes.schedule_memory:ScheduleMemory",
}
BACKENDS = {
    "onnxruntime": "lrcompile.backends.onnxruntime:OnnxRuntime",
    "exported": "lrcompile.backends.exported:Exported",
    "eager": "lrcompile.backends.eager:Eager",
}
EXACT = ("clean", "fold", "exact-low-rank")
"""Passes that always run, in this order."""
FOLLOWING = ("absorb",)
"""Exact passes that tidy up behind replaced weights, in this order."""
LOSSY = ("low-rank", "conv-low-rank")
"""Passes that a budget is spent on where none are named."""


def names(kind: str) -> dict[str, str]:
    """Name → ``module:class`` of all passes (``kind="passes"``) or backends; an installed name beats ours."""
    ours = PASSES if kind == "passes" else BACKENDS
    return {**ours, **{point.name: point.value for point in entry_points(group=f"lrcompile.{kind}")}}


def load(kind: str, name: str) -> Any:
    """The class behind a name.

    Raises:
        UsageError: unknown, or it cannot be imported.
    """
    known = names(kind)
    if name not in known:
        raise UsageError(f"unknown {'pass' if kind == 'passes' else 'backend'} '{name}'", hint=nearest(name, known))
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"cannot be loaded: {error}", where=name, hint="reinstall the package that brings it"
        ) from error


def passes() -> dict[str, type]:
    """All passes that can be loaded, by name."""
    return {name: load("passes", name) for name in names("passes")}


def backend_for(graph: object) -> Any:
    """An instance of the first backend that takes the graph; `exported` stands before `eager`, whose graphs it extends.

    Raises:
        UsageError: none does.
    """
    for name in names("backends"):
        found = load("backends", name)
        if isinstance(graph, found.accepts):
            return found()
    raise UsageError(f"no backend takes a graph of kind '{getattr(graph, 'kind', type(graph).__name__)}'")
