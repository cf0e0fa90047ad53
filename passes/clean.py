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

    Works on ONNX graphs, by the passes of onnx_ir; a module tree has nothing of the kind.
    """

    name: ClassVar[str] = "clean"

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites the graph where something can go; names of inputs and outputs stay."""
        from lrcompile.graphs.onnx.graph import OnnxGraph

        if not isinstance(graph, OnnxGraph):
            return [Refused("graph", f"nothing to clean in a graph of kind '{graph.kind}'")]
        from onnx_ir import passes
        from onnx_ir.passes import common

        model = graph.model.clone()
        before = _size(model)
        signature = _signature(model)
        passes.Sequential(
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.DeduplicateInitializersPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
        )(model)
        after = _size(model)
        if after == before:
            return [Refused("graph", "nothing unused or repeated")]
        if _signature(model) != signature:
            return [Refused("graph", "cleaning would rename an input or output")]
        graph.adopt(model)
        removed = [f"{old - new} {what}" for old, new, what in zip(before, after, _PARTS, strict=True) if old != new]
        return [Rewritten("graph", "removed " + ", ".join(removed))]


_PARTS = ("nodes", "weights")


def _size(model) -> tuple[int, int]:  # noqa: ANN001 - onnx_ir is imported where it is used
    return sum(1 for _ in model.graph.all_nodes()), len(model.graph.initializers)


def _signature(model) -> tuple:  # noqa: ANN001
    return tuple((v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs))
