"""Graph hygiene: what no runtime needs goes away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lrcompile.graphs.base import Graph
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten


@dataclass(frozen=True)
class Clean(GraphPass):
    """Remove unused nodes and weights, weights stored twice, repeated subexpressions and identities.

    rewrite:  x -> Identity -> y  ->  x -> y;    W, copy of W  ->  W;    f(x), f(x)  ->  f(x)
    """

    name: ClassVar[str] = "clean"

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites the graph where something can go; names of inputs and outputs stay."""
        changed, detail = graph.clean()
        return [Rewritten("graph", detail) if changed else Refused("graph", detail)]
