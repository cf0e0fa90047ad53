"""Parts of a graph that can be computed in row tiles: grown from one value over its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from lrcompile.graphs.onnx.tiling.memory import Lives
from lrcompile.graphs.onnx.tiling.rows import Axes, rows
from lrcompile.graphs.onnx.tiling.sizes import Size, Sizes

MOST_NODES = 64
HEAVY = ("MatMul", "Gemm", "Conv", "Gather", "Einsum")
"""Operators whose constants are weights, which are never cut."""


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that are computed in row tiles together.

    Args:
        nodes: in order of execution.
        axes: value → axis of its rows, of what the nodes make and of the inputs that are cut.
        cut: inputs of which a tile needs the same rows.
        whole: computed inputs of which every tile needs all.
        outputs: what others read; put together from the tiles.
        rows: number of rows, in every run.
    """

    nodes: tuple[ir.Node, ...]
    axes: Mapping[ir.Value, int]
    cut: tuple[ir.Value, ...]
    whole: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    rows: Size

    @cached_property
    def members(self) -> frozenset[ir.Node]:
        return frozenset(self.nodes)


@dataclass(eq=False)
class Grower:
    """Grows regions in a graph of known sizes and order.

    Attributes:
        taken: nodes that other regions have.
        refusals: name of a value → why the nodes around it were not taken in.
    """

    lives: Lives
    sizes: Sizes

    def __post_init__(self) -> None:
        self.taken: set[ir.Node] = set()
        self.refusals: dict[str, str] = {}
        self._rules: dict[tuple[ir.Node, int], Axes | None] = {}

    def seeds(self, value: ir.Value) -> Iterator[Region]:
        """Regions of the one node that makes a value, for every axis along which that is possible."""
        node, shape = value.producer(), self.sizes.of(value)
        if node is None or shape is None or node not in self.lives.at:
            return
        for axis, size in enumerate(shape):
            if size[0] > 1:
                region = self._closed({node}, {value: axis})
                if region is not None:
                    yield region

    def steps(self, region: Region) -> Iterator[Region]:
        """The region, and ever larger ones: what is next is what saves the largest boundary."""
        while True:
            yield region
            found = self._larger(region, set())  # what does not fit now may fit once a path around it is in
            if found is None or len(found.nodes) > MOST_NODES:
                return
            region = found

    def _larger(self, region: Region, refused: set[ir.Node]) -> Region | None:
        for _, node, axes in sorted(self._neighbours(region, refused), key=lambda each: -each[0]):
            found = self._closed(set(region.nodes) | {node}, axes) if axes is not None else None
            if found is not None:
                return found
            refused.add(node)
        return None

    def _neighbours(
        self, region: Region, refused: set[ir.Node]
    ) -> Iterator[tuple[int, ir.Node, Mapping[ir.Value, int] | None]]:
        for value in region.cut:
            node = value.producer()
            if node is not None and node in self.lives.at and node not in refused:
                yield self.sizes.nbytes(value), node, {**region.axes, value: region.axes[value]}
        for value in region.outputs:
            for node in self.lives.readers.of(value):
                if node not in refused and node not in region.members:
                    yield self.sizes.nbytes(value), node, self._forward(node, value, region)

    def _forward(self, node: ir.Node, value: ir.Value, region: Region) -> Mapping[ir.Value, int] | None:
        """The axes with those of a reader's outputs, such that it reads the value row by row."""
        for axis in range(self.sizes.rank(node.outputs[0]) or 0):
            found = self._rule(node, axis)
            if found is not None and all(
                each == region.axes[value] for at, each in enumerate(found) if node.inputs[at] is value
            ):
                return {**region.axes, **dict.fromkeys(node.outputs, axis)}
        return None

    def _rule(self, node: ir.Node, axis: int) -> Axes | None:
        if (node, axis) not in self._rules:
            self._rules[node, axis] = rows(node, axis, self.sizes)
        return self._rules[node, axis]

    def _closed(self, nodes: set[ir.Node], axes: Mapping[ir.Value, int]) -> Region | None:
        """A region of these nodes where it is one; else the reason is kept."""
        if nodes & self.taken:
            return None
        order = sorted(nodes, key=self.lives.at.__getitem__)
        made = {value for node in order for value in node.outputs}
        axes, cut, whole = dict(axes), {}, {}
        for node in reversed(order):
            known = [axes[value] for value in node.outputs if value in axes]
            found = self._rule(node, known[0]) if known else None
            if found is None:
                return self._refused(node, f"{node.op_type} does not work row by row along this axis")
            axes.update(dict.fromkeys(node.outputs, known[0]))
            reason = self._inputs(node, found, made, axes, cut, whole)
            if reason:
                return self._refused(node, reason)
        if not self._convex(order, made):
            return self._refused(order[0], "a part of what it reads depends on all of its rows")
        outputs = tuple(value for value in _ordered(order) if self._escapes(value, nodes))
        size = (self.sizes.of(order[0].outputs[0]) or ())[axes[order[0].outputs[0]]]
        computed = tuple(value for value in whole if not self.sizes.constant(value))
        return Region(tuple(order), axes, tuple(cut), computed, outputs, size) if outputs else None

    def _inputs(
        self,
        node: ir.Node,
        found: Axes,
        made: set[ir.Value],
        axes: dict[ir.Value, int],
        cut: dict[ir.Value, None],
        whole: dict[ir.Value, None],
    ) -> str:
        """Files the inputs of a node; says why one cannot be what it must be."""
        for value, axis in zip(node.inputs, found, strict=True):
            if value is None:
                continue
            if axis is None:
                if value in made:
                    return f"{node.op_type} reads all rows of {value.name}"
                whole[value] = None
                continue
            if axes.setdefault(value, axis) != axis:
                return f"{value.name} would be cut along two axes"
            if value not in made:
                if self.sizes.constant(value) and node.op_type in HEAVY:
                    return f"the weights of {node.op_type} would be cut"
                cut[value] = None
        return ""

    def _escapes(self, value: ir.Value, nodes: set[ir.Node]) -> bool:
        return value.is_graph_output() or any(user not in nodes for user in self.lives.readers.of(value))

    def _convex(self, order: list[ir.Node], made: set[ir.Value]) -> bool:
        """Whether nothing that the region reads depends on what it makes."""
        last, nodes = self.lives.at[order[-1]], set(order)
        stack = [user for value in made for user in self.lives.readers.of(value) if user not in nodes]
        seen: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if node in nodes:
                return False
            if node in seen or self.lives.at.get(node, last + 1) > last:
                continue
            seen.add(node)
            stack.extend(user for value in node.outputs for user in self.lives.readers.of(value))
        return True

    def _refused(self, node: ir.Node, reason: str) -> None:
        self.refusals.setdefault(str(node.outputs[0].name), reason)


def _ordered(nodes: list[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]
