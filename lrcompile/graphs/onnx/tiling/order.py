"""An order of nodes that keeps less alive, written so that ONNX Runtime follows it."""

from __future__ import annotations

import onnx_ir as ir

from lrcompile.graphs.onnx.tiling.memory import Lives, Readers, depth_first, execution
from lrcompile.graphs.onnx.tiling.sizes import Sizes


def reordered(model: ir.Model, sizes: Sizes) -> tuple[ir.Model, float] | None:
    """A copy whose nodes are in an order that keeps less alive, and the share that it needs; None where that is all.

    Of the inputs of a node, what frees the most memory when it is done is computed first (R. Sethi and J. D. Ullman,
    1970, for trees). ONNX Runtime's default executor goes depth first from the last node and takes the producers of a
    node's inputs from the last to the first in the file, so what comes first stands last.
    """
    clone = model.clone()
    readers = Readers(clone.graph)
    before = max(Lives(execution(clone.graph, readers), sizes, readers).bytes(), default=0)
    order = _order(clone.graph, sizes, readers)
    clone.graph.remove(list(clone.graph))
    clone.graph.extend(order)
    readers = Readers(clone.graph)
    after = max(Lives(execution(clone.graph, readers), sizes, readers).bytes(), default=0)
    return (clone, after / before) if after < before else None


def _order(graph: ir.Graph, sizes: Sizes, readers: Readers) -> list[ir.Node]:
    """A topological order in which the producer to be computed first stands last."""
    place = {node: at for at, node in enumerate(graph)}
    reads: dict[ir.Node, list[ir.Node]] = {node: [] for node in place}
    for node in place:
        for value in node.outputs:
            for user in readers.of(value):
                if node not in reads[user]:
                    reads[user].append(node)
    gain = _gains(reads, sizes)
    sinks = [node for node in place if not any(readers.of(value) for value in node.outputs)]
    chosen = {node: sorted(found, key=lambda each: (-gain[each], place[each])) for node, found in reads.items()}
    return depth_first(reversed(sinks), chosen)


def _gains(reads: dict[ir.Node, list[ir.Node]], sizes: Sizes) -> dict[ir.Node, int]:
    """What is free again once a node and all before it are computed: the most that they need, less what they leave."""
    need: dict[ir.Node, int] = {}
    left = {node: sum(map(sizes.nbytes, node.outputs)) for node in reads}
    for node, before in reads.items():
        held = most = 0
        for each in sorted(before, key=lambda each: left[each] - need[each]):
            most, held = max(most, held + need[each]), held + left[each]
        need[node] = max(most, held + left[node])
    return {node: need[node] - left[node] for node in need}
