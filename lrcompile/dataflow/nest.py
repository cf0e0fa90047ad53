"""One loop nest: a stage that is written to memory, and stages that live only inside its loops.

A stage inside is computed for the piece that its readers need at that moment: a row of a normalisation, the keys of
one head, the scores of a few tokens. Where in the nest it stands follows from the accesses of its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lrcompile.dataflow.blocking import work
from lrcompile.dataflow.expr import Load, with_vars
from lrcompile.dataflow.index import Sum, Var, of, substitute
from lrcompile.dataflow.region import Region, contains, reach, read, union, whole
from lrcompile.dataflow.stage import Formulas, Part, Stage, unique

TOLERANCE = 1.3
"""Extra work that still counts as none: a last piece that overlaps the one before."""

Mode = Literal["once", "again"]
"""``once``: where it costs no extra work. ``again``: as small as possible, for each reader anew."""


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop over pieces of one axis: ``axis = var + rest`` with ``var`` in steps of ``tile``.

    Where the tile does not divide the axis, the last piece overlaps the one before and computes some elements again.
    """

    axis: int
    tile: int
    var: Var

    @property
    def turns(self) -> int:
        return -(-(self.var.extent - 1) // self.tile) + 1

    @property
    def exact(self) -> bool:
        """Whether no element is computed twice."""
        return (self.var.extent - 1) % self.tile == 0


@dataclass(eq=False)
class Node:
    """A stage in a nest.

    Args:
        name: of its buffer; unique in the nest.
        part: its formula for one piece: axes run over the piece, outer loop variables appear in indices.
        region: the box of the tensor that its buffer holds; of the outermost stage, all.
        loops: its own loops around the formula.
        children: stages that it contains, with the number of its own loops around each, in order.
        sources: tensor → the stage in the nest that it reads it from.
    """

    name: str
    stage: Stage
    part: Part
    region: Region
    loops: tuple[Loop, ...]
    children: list[tuple[int, Node]] = field(default_factory=list)
    sources: dict[str, Node] = field(default_factory=dict)
    path: tuple[Position, ...] = ()
    work: float = 0.0
    plain: Part | None = None

    def drop_loops(self) -> None:
        """Undoes loops that nothing is computed in."""
        if self.plain is not None and self.loops and all(level == 0 for level, _ in self.children):
            self.work = work(self.plain) * self.path[-1 - len(self.loops)].turns
            self.part, self.loops = self.plain, ()

    def nodes(self) -> Iterator[Node]:
        """Itself and everything inside, in order of execution."""
        for _, child in self.children:
            yield from child.nodes()
        yield self


@dataclass(frozen=True, eq=False)
class Position:
    """A place in a nest: inside the first ``level`` loops of a node."""

    node: Node
    level: int
    fixed: frozenset[Var]
    turns: int


def tile(part: Part, loops: Sequence[tuple[int, int]]) -> tuple[Part, tuple[Loop, ...]]:
    """Splits axes of a part into pieces: (axis, size) each."""
    made, table = [], {}
    axes = list(part.axes)
    for axis, size in loops:
        old = part.axes[axis]
        size = min(size, old.extent)
        outer, inner = Var.new(old.extent - size + 1), Var.new(size)
        axes[axis] = inner
        table[old] = of(outer) + of(inner) if size > 1 else of(outer)
        made.append(Loop(axis, size, outer))
    return _changed(part, tuple(axes), table), tuple(made)


def _changed(part: Part, axes: tuple[Var, ...], table: Mapping[Var, Sum]) -> Part:
    return replace(
        part,
        axes=axes,
        store=tuple(substitute(index, table.get) for index in part.store),
        finish=with_vars(part.finish, table),
        body=None if part.body is None else with_vars(part.body, table),
    )


def piece(part: Part, region: Region) -> Part | None:
    """The part restricted to a box of its tensor, over fresh variables; None where the box does not fit its axes."""
    table: dict[Var, Sum] = {}
    axes: dict[Var, Var] = {}
    for index, start, extent in zip(part.store, region.starts, region.extents, strict=True):
        if not _restrict_axis(index, start, extent, table, axes):
            return None
    for var in (*part.axes, *part.inner):
        if var not in axes:
            axes[var] = Var.new(var.extent)
            table[var] = of(axes[var])
    made = _changed(part, tuple(axes[var] for var in part.axes), table)
    return replace(made, inner=tuple(axes[var] for var in part.inner))


def _restrict_axis(index: Sum, start: Sum, extent: int, table: dict[Var, Sum], axes: dict[Var, Var]) -> bool:
    """One axis of the tensor, which one or several variables make up, the last of them the fastest."""
    if index.constant or any(not isinstance(var, Var) for var, _ in index.terms):
        return False
    for var, factor in sorted(index.terms, key=lambda term: -term[1]):
        if extent >= factor:
            if extent % factor or (start % factor).terms or (start % factor).constant:
                return False
            first, reach, extent = start // factor, extent // factor, factor
        else:
            first, reach = start // factor, 1
        start = start % factor
        if reach == var.extent:
            continue
        if reach > var.extent:
            return False
        axes[var] = Var.new(reach)
        table[var] = first + of(axes[var])
    return True


class Nest:
    """Arranges stages inside the loops of one part that is written to memory.

    Args:
        part: of the stage ``target``.
        inside: stages that are computed in here → how.
        loops: (axis, size) of the loops around everything, the outermost first.
        size: of the pieces that stages inside are computed in.

    Raises:
        ValueError: a stage inside cannot be computed in pieces.
    """

    def __init__(
        self,
        formulas: Formulas,
        target: Stage,
        part: Part,
        inside: Mapping[str, Mode],
        loops: Sequence[tuple[int, int]],
        size: int,
    ) -> None:
        self.formulas, self.inside, self.size = formulas, inside, size
        part, made = tile(unique(part), loops)
        self.root = Node(target.name, target, part, whole(target.shape), made)
        self.root.path = _path((), self.root)
        self._readers: dict[str, list[Node]] = {}
        self._names: dict[str, int] = {}
        self._register(self.root)
        for name in sorted(inside, key=formulas.places.__getitem__, reverse=True):
            readers = self._readers.get(name, [])
            if readers and inside[name] == "once":
                self._place(formulas.stages[name], readers, *self._spot(formulas.stages[name], readers))
            elif readers:
                self._again(formulas.stages[name], readers)
        for node in self.root.nodes():
            node.drop_loops()
        self.work = sum(node.work for node in self.root.nodes())

    def _register(self, node: Node) -> None:
        for name in dict.fromkeys(load.tensor for load in node.part.loads()):
            if name in self.inside:
                self._readers.setdefault(name, []).append(node)
        node.work = work(node.part) * node.path[-1].turns

    def _again(self, stage: Stage, readers: list[Node]) -> None:
        """Readers that would have it at the same place share it."""
        groups: dict[tuple[int, Region], tuple[Position, Region, list[Node]]] = {}
        for reader in readers:
            position, region = self._spot(stage, [reader])
            groups.setdefault((id(position), region), (position, region, []))[2].append(reader)
        for position, region, group in groups.values():
            self._place(stage, group, position, region)

    def _spot(self, stage: Stage, readers: list[Node]) -> tuple[Position, Region]:
        """The best position that all readers can see, and what they read there."""
        common = list(readers[0].path)
        for reader in readers[1:]:
            common = [a for a, b in zip(common, reader.path, strict=False) if a is b]
        indices = list(
            dict.fromkeys(load.index for reader in readers for load in reader.part.loads() if load.tensor == stage.name)
        )
        options = []
        for position in common:
            region = union([read(index, stage.shape, position.fixed) for index in indices], stage.shape)
            options.append((position.turns * region.size, region.size, position, region))
        least = min(total for total, *_ in options)
        if self.inside[stage.name] == "once":
            options = [each for each in options if each[0] <= least * TOLERANCE]
        return min(options, key=lambda each: (each[1], each[0]))[2:]

    def _place(self, stage: Stage, readers: list[Node], position: Position, region: Region) -> None:
        """Computes a region of a stage at a position."""
        made = piece(stage.parts[0], region)
        if made is None:
            region = whole(stage.shape)
            position = readers[0].path[0]
            made = piece(stage.parts[0], region)
            assert made is not None
        count = self._names[stage.name] = self._names.get(stage.name, 0) + 1
        name = stage.name if count == 1 else f"{stage.name}~{count}"
        plain = made
        made, loops = tile(made, self._own_loops(made, position))
        node = Node(name, stage, made, region, loops, plain=plain)
        for reader in readers:
            reader.sources[stage.name] = node
        node.path = _path(position.node.path[: position.level + 1 + _before(position)], node)
        position.node.children.insert(0, (position.level, node))
        position.node.children.sort(key=lambda each: each[0])
        self._register(node)

    def _own_loops(self, part: Part, position: Position) -> list[tuple[int, int]]:
        """The axis along which pieces make what the part reads smaller at no extra work."""
        loads = {(load.tensor, load.index) for load in part.loads() if load.tensor in self.inside}
        best: tuple[int, list[tuple[int, int]]] = (0, [])
        for axis, var in enumerate(part.axes):
            if not loads or var.extent <= self.size:
                continue
            gain, turns = 0, -(-var.extent // self.size)
            for name, index in loads:
                shape = self.formulas.shape(name)
                full = reach(index, shape, position.fixed, {})
                small = reach(index, shape, position.fixed, {var: self.size})
                gain += full - small if small * turns <= full * TOLERANCE else 0
            if gain > best[0]:
                best = gain, [(axis, self.size)]
        return best[1]


def _before(position: Position) -> int:
    """Positions of the path of a node that precede its own."""
    return len(position.node.path) - len(position.node.loops) - 1


def _path(before: tuple[Position, ...], node: Node) -> tuple[Position, ...]:
    fixed: frozenset[Var] = before[-1].fixed if before else frozenset()
    turns = before[-1].turns if before else 1
    path = [*before, Position(node, 0, fixed, turns)]
    for level, loop in enumerate(node.loops, 1):
        fixed, turns = fixed | {loop.var}, turns * loop.turns
        path.append(Position(node, level, fixed, turns))
    return tuple(path)


# -- may the result lie on an input? ---------------------------------------------------------------


def overwrites(nest: Nest, tensor: str, *, alone: bool) -> bool:
    """Whether the result may take the memory of a tensor that nobody reads afterwards.

    Every read of it must come before its elements are written, in this piece or an earlier one.

    Args:
        alone: whether this nest writes the whole result; else elements of others may be written before it starts.
    """
    root = nest.root
    if not all(loop.exact for loop in root.loops):
        return False
    shape = nest.formulas.shape(tensor)
    if shape != root.stage.shape or nest.formulas.dtype(tensor) != root.stage.dtype:
        return False
    if root.part.body is not None and any(_reads(root.part.body, tensor)):
        return False
    if any(load.index != root.part.store for load in _reads(root.part.finish, tensor)):
        return False
    return all(_in_time(nest, node, tensor, alone) for node in root.nodes() if node is not root)


def _reads(value: object, tensor: str) -> Iterator[Load]:
    from lrcompile.dataflow.expr import loads

    return (load for load in loads(value) if load.tensor == tensor)  # type: ignore[arg-type]


def _in_time(nest: Nest, node: Node, tensor: str, alone: bool) -> bool:
    level = max((each.level for each in node.path if each.node is nest.root), default=0)
    if level == 0 and alone:
        return True
    fixed = nest.root.path[level].fixed
    shape = nest.formulas.shape(tensor)
    written = read(nest.root.part.store, shape, fixed)
    indices = [load.index for load in node.part.loads() if load.tensor == tensor]
    return all(contains(written, read(index, shape, fixed)) for index in indices)
