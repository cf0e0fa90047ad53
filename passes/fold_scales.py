"""Scales that only linear layers read become part of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lrcompile.graphs.base import Graph
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten


@dataclass(frozen=True)
class FoldScales(GraphPass):
    """Multiply the gain of an RMS norm, or any constant scale, into the layers that read it, where nobody else does.

    rewrite:  (x * g) @ W  ->  x @ (diag(g) W)

    Not among the passes that always run: it writes new weights, and saves elementwise multiplications only.
    """

    name: ClassVar[str] = "fold-scales"
    early: ClassVar[bool] = True

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites the graph where a scale can go; a graph without nodes is refused."""
        fold = getattr(graph, "fold_scales", None)
        if fold is None:
            return [Refused("graph", f"a graph of kind '{graph.kind}' has no elementwise nodes")]
        done, reason = fold()
        return [Rewritten(name) for name in done] or [Refused("graph", reason)]
