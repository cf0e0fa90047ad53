"""Writes a region in row tiles: slices of what is cut, the nodes once for each tile, concatenations for the readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from lrcompile.graphs.onnx.tiling.grow import Region
from lrcompile.graphs.onnx.tiling.rows import rows
from lrcompile.graphs.onnx.tiling.sizes import Sizes, static


@dataclass(eq=False)
class Writer:
    """Rewrites a graph in place, region by region.

    Sizes that are not fixed are computed where the graph runs: a tile has ``ceil(rows / count)`` rows, the last ones
    fewer or none, so the result is the same for every size.
    """

    graph: ir.Graph
    sizes: Sizes
    _constants: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)
    _bounds: dict[tuple, list[ir.Value]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _joined: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {str(value.name) for node in self.graph.all_nodes() for value in node.outputs}
        self._names |= {str(value.name) for value in (*self.graph.inputs, *self.graph.initializers.values())}

    def tile(self, region: Region, count: int) -> None:
        """Puts the tiles in the place of the region's nodes."""
        self._nodes, region = [], self._current(region)
        bounds = self._starts(region, count)
        shapes = {node: self._shape(node, region) for node in region.nodes if node.op_type == "Reshape"}
        parts: dict[ir.Value, list[ir.Value]] = {value: [] for value in region.outputs}
        for at in range(count):
            made: dict[ir.Value, ir.Value] = {}
            for node in region.nodes:
                for value in node.inputs:
                    if value in region.cut and value not in made:
                        made[value] = self._slice(value, bounds[at], bounds[at + 1], region.axes[value])
                self._copy(node, region, made, shapes, at)
            for value in region.outputs:
                parts[value].append(made[value])
        for value in region.outputs:
            joined = self._op("Concat", parts[value], f"{value.name}", axis=region.axes[value])
            self._take_over(value, joined)
        self._insert(region)

    def _current(self, region: Region) -> Region:
        """The region with concatenations in the place of what earlier regions made."""
        axes = {self._joined.get(value, value): axis for value, axis in region.axes.items()}
        return replace(region, axes=axes, cut=tuple(self._joined.get(value, value) for value in region.cut))

    # -- pieces ---------------------------------------------------------------------------------

    def _copy(
        self,
        node: ir.Node,
        region: Region,
        made: dict[ir.Value, ir.Value],
        shapes: dict[ir.Node, ir.Value],
        at: int,
    ) -> None:
        found = rows(node, region.axes[node.outputs[0]], self.sizes) or ()
        inputs = [
            value if value is None or axis is None else made[value]
            for value, axis in zip(node.inputs, found, strict=True)
        ]
        attributes = list(node.attributes.values())
        if node in shapes:
            inputs[1] = shapes[node]
            attributes = []  # zeros copy a dimension
        outputs = [ir.Value(name=self._name(f"{value.name}/{at}") if value.name else "") for value in node.outputs]
        made.update(zip(node.outputs, outputs, strict=True))
        copy = ir.Node(
            node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs, version=node.version
        )
        self._nodes.append(copy)

    def _slice(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        axes = self._vector([axis])
        return self._op("Slice", [value, start, end, axes], f"{value.name}/rows")

    def _starts(self, region: Region, count: int) -> list[ir.Value]:
        """Where every tile begins, and where the last one ends."""
        if static(region.rows):
            total = region.rows[0]
            step = -(-total // count)  # tiles of one size share their memory
            return [self._vector([min(step * at, total)]) for at in range(count + 1)]
        key = (region.rows, count)
        if key not in self._bounds:
            source = next(value for value in region.cut if self._full(value, region))
            step = self._per_tile(source, region.axes[source], count)
            starts = [self._vector([0]), step]
            starts += [self._op("Mul", [step, self._vector([at])], f"tile/{at}") for at in range(2, count + 1)]
            self._bounds[key] = starts
        return self._bounds[key]

    def _full(self, value: ir.Value, region: Region) -> bool:
        shape = self.sizes.of(value)
        return shape is not None and shape[region.axes[value]] == region.rows

    def _per_tile(self, source: ir.Value, axis: int, count: int) -> ir.Value:
        shape = self._op("Shape", [source], "tile/shape")
        total = self._op("Gather", [shape, self._vector([axis])], "tile/total")
        more = self._op("Add", [total, self._vector([count - 1])], "tile/more")
        return self._op("Div", [more, self._vector([count])], "tile/rows")

    def _shape(self, node: ir.Node, region: Region) -> ir.Value:
        """The target of a Reshape of any number of rows."""
        before, after = self.sizes.of(node.inputs[0]) or (), self.sizes.of(node.outputs[0]) or ()
        along, own = region.axes[node.outputs[0]], region.axes[node.inputs[0]]  # type: ignore[index]
        found: list[int | None] = []
        for at, size in enumerate(after):
            if at == along:
                found.append(-1)
            elif static(size):
                found.append(size[0])
            else:
                found.append(0 if at < len(before) and before[at] == size and at != own else None)
        if None not in found:
            return self._vector([each or 0 for each in found])
        parts = [
            self._op("Gather", [node.inputs[1], self._vector([at])], "tile/size")
            if each is None
            else self._vector([each])
            for at, each in enumerate(found)
        ]
        return self._op("Concat", parts, "tile/target", axis=0)

    # -- the graph ------------------------------------------------------------------------------

    def _op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: int) -> ir.Value:
        output = ir.Value(name=self._name(name))
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=[output])
        self._nodes.append(node)
        return output

    def _vector(self, numbers: Sequence[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self._constants:
            name = self._name("tile/" + "x".join(map(str, numbers)))
            value = ir.Value(
                name=name,
                const_value=ir.tensor(list(numbers), ir.DataType.INT64, name=name),
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape([len(numbers)]),
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _name(self, wanted: str) -> str:
        name, at = wanted, 0
        while name in self._names:
            at += 1
            name = f"{wanted}.{at}"
        self._names.add(name)
        return name

    def _take_over(self, value: ir.Value, joined: ir.Value) -> None:
        """The concatenation gets the name, type, shape and readers of what it stands for."""
        name, joined.type, joined.shape = value.name, value.type, value.shape
        value.name = self._name(f"{name}/whole")
        value.replace_all_uses_with(joined, replace_graph_outputs=True)
        joined.name = name
        self._joined[value] = joined

    def _insert(self, region: Region) -> None:
        self.graph.insert_after(region.nodes[-1], self._nodes)
        self.graph.remove(region.nodes, safe=True)
