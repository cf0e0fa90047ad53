"""Memory inside one nest: the pieces that live only within its loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from lrcompile.dataflow.index import Sum, flatten
from lrcompile.dataflow.nest import Nest, Node
from lrcompile.dataflow.planner import Layout, Request, exact
from lrcompile.dataflow.program import ITEMSIZE

ALIGN = 8


@dataclass(frozen=True)
class Pieces:
    """Where the buffers of a nest lie: some in a block of the arena, the smallest ones in a block on the stack."""

    arena: int
    stack: int
    arena_offsets: Mapping[str, int]
    stack_offsets: Mapping[str, int]


class Scratch:
    """Sizes and lifetimes of the buffers of a nest, in the order of one turn of its loops."""

    def __init__(self, nest: Nest) -> None:
        self.root = nest.root
        self._time = 0
        self.first: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.parent: dict[str, tuple[Node, int]] = {}
        self.nodes: dict[str, Node] = {}
        self._visit(self.root)
        for node in self.nodes.values():
            for source in node.sources.values():
                self.last[source.name] = max(self.last.get(source.name, 0), self._end(source, node))
        del self.nodes[self.root.name]
        self.groups = self._shared()

    def _visit(self, node: Node) -> None:
        begin = self._time
        for level, child in node.children:
            self.parent[child.name] = node, level
            self._visit(child)
        self.nodes[node.name] = node
        self.first[node.name] = begin if node.loops else self._time
        self.done[node.name] = self._time
        self._time += 1

    def _end(self, source: Node, reader: Node) -> int:
        """When a buffer is last needed by a reader: loops around the reader but not the buffer repeat the read."""
        owner, level = self.parent[source.name]
        branch = reader
        while branch is not owner:
            above, at = self.parent[branch.name]
            if above is owner:
                return self.done[owner.name] if at > level else self.done[branch.name]
            branch = above
        return self.done[owner.name]

    # -- elementwise stages over their input ---------------------------------------------------

    def _shared(self) -> dict[str, str]:
        """Node → the node whose buffer it takes over."""
        found: dict[str, str] = {}
        taken: set[str] = set()
        for name, node in self.nodes.items():
            for source in node.sources.values():
                if source.name not in taken and self._fits(node, source):
                    found[name] = found.get(source.name, source.name)
                    taken.add(source.name)
                    break
        return found

    def _fits(self, node: Node, source: Node) -> bool:
        if node.part.inner or node.loops or self.parent[node.name] != self.parent[source.name]:
            return False
        if self.last[source.name] != self.done[node.name] or node.region.extents != source.region.extents:
            return False
        if ITEMSIZE[node.stage.dtype] != ITEMSIZE[source.stage.dtype]:
            return False
        own = _position(node.part.store, node)
        return all(
            _position(load.index, source) == own for load in node.part.loads() if load.tensor == source.stage.name
        )

    # -- layout --------------------------------------------------------------------------------

    @cached_property
    def buffers(self) -> dict[str, Request]:
        """Buffer → size and lifetime; what shares a buffer counts once."""
        found: dict[str, Request] = {}
        for name, node in self.nodes.items():
            leader = self.groups.get(name, name)
            size = -(-prod(node.region.extents) * ITEMSIZE[node.stage.dtype] // ALIGN) * ALIGN
            old = found.get(leader)
            first, last = self.first[name], self.last.get(name, self.done[name])
            if old is not None:
                first, last, size = min(first, old.first), max(last, old.last), max(size, old.size)
            found[leader] = Request(size, first, last)
        return found

    @cached_property
    def size(self) -> int:
        """Bytes of all pieces, packed."""
        return _pack(self.buffers, list(self.buffers))[0].size

    def pieces(self, stack: int) -> Pieces:
        """Puts the smallest buffers on the stack, up to ``stack`` bytes, the others into the arena."""
        order = sorted(self.buffers, key=lambda name: self.buffers[name].size)
        count = 0
        while count < len(order) and _pack(self.buffers, order[: count + 1])[0].size <= stack:
            count += 1
        on_stack, (block, names) = _pack(self.buffers, order[:count]), _pack(self.buffers, order[count:])
        stack_at = dict(zip(on_stack[1], on_stack[0].offsets, strict=True))
        arena_at = dict(zip(names, block.offsets, strict=True))
        for name, leader in self.groups.items():
            table = stack_at if leader in stack_at else arena_at
            table[name] = table[leader]
        return Pieces(block.size, on_stack[0].size, arena_at, stack_at)


def _position(index: tuple[Sum, ...], node: Node) -> Sum:
    relative = tuple(each - start for each, start in zip(index, node.region.starts, strict=True))
    return flatten(relative, node.region.extents)


def _pack(buffers: Mapping[str, Request], names: list[str]) -> tuple[Layout, list[str]]:
    return exact([buffers[name] for name in names], effort=300), names
