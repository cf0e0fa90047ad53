"""When values are alive, in the order in which ONNX Runtime executes a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from lrcompile.graphs.onnx.tiling.sizes import Sizes

VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"])
"""Operators whose output lies where their input does."""


class Readers:
    """Who reads a value, among the nodes of a graph itself that stays as it is; what a body reads, its node reads."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._owners: dict[ir.Node, ir.Node] = {}
        self._known: dict[ir.Value, list[ir.Node]] = {}
        for node in graph:
            for attribute in node.attributes.values():
                for body in _bodies(attribute):
                    self._owners.update((inner, node) for inner in body.all_nodes())

    def of(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, each once."""
        if value not in self._known:
            self._known[value] = list(dict.fromkeys(self._owners.get(node, node) for node, _ in value.uses()))
        return self._known[value]


def _bodies(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def execution(graph: ir.Graph, readers: Readers) -> list[ir.Node]:
    """The order of ONNX Runtime's default executor: depth first from the last node without readers.

    Of the inputs of a node, what the later node makes is computed first.
    """
    place = {node: at for at, node in enumerate(graph)}
    reads: dict[ir.Node, set[ir.Node]] = {node: set() for node in place}
    read: set[ir.Node] = set()
    for node in place:
        for value in node.outputs:
            for user in readers.of(value):
                if user in reads:
                    reads[user].add(node)
                    read.add(node)
    starts = [node for node in place if node not in read]
    return depth_first(starts, {node: sorted(found, key=place.__getitem__) for node, found in reads.items()})


def depth_first(starts: Iterable[ir.Node], reads: Mapping[ir.Node, Sequence[ir.Node]]) -> list[ir.Node]:
    """Every node after all that it reads: of the starts the last one first, of what a node reads likewise."""
    stack = [(node, False) for node in starts]
    done: set[ir.Node] = set()
    order: list[ir.Node] = []
    while stack:
        node, leave = stack.pop()
        if leave:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((each, False) for each in reads[node] if each not in done)
    return order


@dataclass(eq=False)
class Lives:
    """Values with what they take and when, for one order of nodes; a view counts as what it looks at.

    Attributes:
        spans: root value → (first step, last step).
    """

    order: Sequence[ir.Node]
    sizes: Sizes
    readers: Readers
    at: dict[ir.Node, int] = field(default_factory=dict)
    roots: dict[ir.Value, ir.Value] = field(default_factory=dict)
    spans: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = {node: at for at, node in enumerate(self.order)}
        for step, node in enumerate(self.order):
            for value in node.outputs:
                self._made(node, value, step)

    def _made(self, node: ir.Node, value: ir.Value, step: int) -> None:
        if self.sizes.constant(value):
            return
        source = node.inputs[0] if node.op_type in VIEWS and not node.domain and node.inputs else None
        root = value if source is None else self.roots.get(source, value)
        last = len(self.order) if value.is_graph_output() else step
        last = max([last, *(self.at.get(user, step) for user in self.readers.of(value))])
        self.roots[value] = root
        first, until = self.spans.get(root, (step, step))
        self.spans[root] = first, max(until, last)

    def bytes(self) -> list[int]:
        """Live bytes at every step."""
        changes = [0] * (len(self.order) + 2)
        for value, (first, last) in self.spans.items():
            size = self.sizes.nbytes(value)
            changes[first] += size
            changes[min(last, len(self.order)) + 1] -= size
        total, found = 0, []
        for change in changes[: len(self.order)]:
            total += change
            found.append(total)
        return found

    @cached_property
    def table(self) -> list[list[ir.Value]]:
        """Values that are alive at every step."""
        found: list[list[ir.Value]] = [[] for _ in self.order]
        for value, (first, last) in self.spans.items():
            for step in range(first, min(last + 1, len(found))):
                found[step].append(value)
        return found

    def alive(self, step: int) -> list[ir.Value]:
        """Values that are alive at a step, the largest first."""
        return sorted(self.table[step], key=lambda value: -self.sizes.nbytes(value))

    def span(self, value: ir.Value) -> tuple[int, int]:
        """First and last step of a value."""
        return self.spans.get(self.roots.get(value, value), (-1, len(self.order)))


def peak(graph: ir.Graph, sizes: Sizes) -> int:
    """Most bytes alive at once."""
    readers = Readers(graph)
    return max(Lives(execution(graph, readers), sizes, readers).bytes(), default=0)
