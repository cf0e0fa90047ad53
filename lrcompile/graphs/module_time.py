"""Timing modules: bare calls in turns, with nothing else inside the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lrcompile.graphs.base import Inputs
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_run import bind, evaluating
from lrcompile.graphs.module_sites import share


@contextmanager
def ready(models: Sequence[nn.Module], threads: int = 0) -> Iterator[None]:
    """Without dropout and gradients, torch on so many threads; 0 leaves its choice."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def caller(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    """A call of the module; its arguments are bound beforehand."""
    args, named = bind(model, inputs)
    return lambda: model(*args, **named)


def plain(graph: ModuleGraph) -> nn.Module:
    """What a graph without replacements runs: the module, or an exported program's own operations."""
    return graph.pair()[0] if isinstance(graph, FxGraph) else graph.model


def both(graph: ModuleGraph) -> tuple[nn.Module, nn.Module]:
    """The module as it was given, and as it stands; they share every tensor that was not replaced."""
    if isinstance(graph, FxGraph):
        return graph.pair()
    stands = share(graph.model)
    with graph.as_given():
        return share(graph.model), stands
