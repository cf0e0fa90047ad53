"""Large activations are computed in pieces, so that less memory is in use at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lrcompile.budget import quantity
from lrcompile.errors import UsageError
from lrcompile.feeds import feeds, shapes
from lrcompile.graphs.base import Graph, Inputs
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten


@dataclass(frozen=True)
class ScheduleMemory(GraphPass):
    """Compute attention, MLPs and whatever else works row by row in row tiles, so that large values are never whole.

    rewrite:  softmax(q @ k) @ v  ->  concat over i of softmax(q[i] @ k) @ v

    Which rows depend on which follows from the operators, not from a template. Tiles are standard operators (Slice,
    the nodes once for each tile, Concat); free dimensions stay free. Runs after everything else; the file grows by
    some nodes, weights are stored once.

    Args:
        tiles: the most of one part; more save less and cost time where there are few rows.
        limit: what is low enough: "8MB", or "0.5" of what it was.
        shape: sizes to plan for where there is no data: "batch=1;sequence=512".

    Source: query tiles as in arXiv 2112.05682, chunks found on the graph as in arXiv 2401.10652.
    """

    name: ClassVar[str] = "schedule-memory"
    late: ClassVar[bool] = True
    tiles: int = 8
    limit: str = ""
    shape: str = ""

    def __post_init__(self) -> None:
        if self.tiles < 2:
            raise UsageError(f"{self.tiles} tiles are too few", where=f"{self.name}.tiles", hint="2 on")
        quantity(self.limit or None, f"{self.name}.limit")

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites the graph where that lowers the peak; says by how much, and why it is not lower."""
        tile = getattr(graph, "tile_rows", None)
        if tile is None:
            return [Refused("graph", f"a graph of kind '{graph.kind}' has no nodes")]
        sample = self._sample(graph, context)
        if isinstance(sample, Refused):
            return [sample]
        limit = quantity(self.limit or None, f"{self.name}.limit") or 0.0
        found = tile(sample, limit=limit, most=self.tiles)
        if found.model is None:
            context.notes.append(f"nothing was cut: {found.reason}")
            return [Refused("graph", found.reason)]
        ratio = found.after / found.before
        more = f"; not lower: {found.reason}" if found.reason else ""
        context.notes.append(f"activations at once {found.before:,} B -> {found.after:,} B (×{ratio:.2f}){more}")
        return [Rewritten(name, detail) for name, detail in found.parts]

    def _sample(self, graph: Graph, context: Context) -> Inputs | Refused:
        """Inputs of the sizes to plan for."""
        free = [size for spec in graph.input_specs for size in spec.shape if not isinstance(size, int)]
        if self.shape:
            context.sample = feeds(graph, given=shapes(self.shape.split(";")))
        elif context.sample is None and free:
            names = ", ".join(dict.fromkeys(str(size) for size in free))
            hint = f"give samples, or {self.name}{{shape={free[0]}=1;…}}"
            context.notes.append(f"nothing was cut: the sizes of {names} are not known: {hint}")
            return Refused("graph", f"the sizes of {names} are not known")
        elif context.sample is None:
            context.sample = feeds(graph)
        return context.sample or {}
