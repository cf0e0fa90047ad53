"""Ways to compute one stage together with others inside its loops."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lrcompile.dataflow.blocking import work
from lrcompile.dataflow.expr import Call, Const, Datum, Expr, Load, Position, with_vars
from lrcompile.dataflow.index import Quotient, Remainder, Sum, Var, of, substitute, variables
from lrcompile.dataflow.nest import Mode, Nest, overwrites
from lrcompile.dataflow.scratch import Scratch
from lrcompile.dataflow.stage import Formulas, Part, Stage

Inside = Mapping[str, Mode]
Loops = tuple[tuple[int, int], ...]
CHEAP = 0.1
"""Of the work of the costliest stage: what costs no more than this may be computed again for several nests."""
SMALL = 1024  # bytes of pieces for which one loop is enough
TILES = (4,)
"""Sizes of pieces that the search compares; the chosen nests are refined afterwards."""


@dataclass(frozen=True)
class Shape:
    """What tells one nest from another: how inner stages are computed, loops of each part, the size of pieces."""

    inside: Inside
    loops: tuple[Loops, ...]
    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Option:
    """One way to compute a stage: its nests, the memory of their pieces, the work.

    Args:
        exact: whether its outermost loops compute no element twice.
        make: builds the nests, which is costly.
        like: the option of a stage of the same structure, and that stage's name of each tensor.
    """

    shape: Shape
    scratch: int
    work: float
    exact: bool
    make: Callable[[], tuple[Nest, ...]]
    like: tuple[Option, Mapping[str, str]] | None = None
    _answers: dict[str, bool] = field(default_factory=dict)

    @cached_property
    def nests(self) -> tuple[Nest, ...]:
        """The loops."""
        return self.make()

    def overwrites(self, tensor: str) -> bool:
        """Whether the stage may take the memory of a tensor that nobody needs later."""
        if self.like is not None and tensor in self.like[1]:
            return self.like[0].overwrites(self.like[1][tensor])
        if tensor not in self._answers:
            alone = len(self.nests) == 1
            self._answers[tensor] = all(overwrites(nest, tensor, alone=alone) for nest in self.nests)
        return self._answers[tensor]


class Options:
    """Finds and remembers options. Equal structures, as in repeated blocks, are looked at once."""

    def __init__(self, formulas: Formulas, tiles: Sequence[int] = TILES) -> None:
        self.formulas, self.tiles = formulas, tuple(tiles)
        self._known: dict[tuple, tuple[str, list[str], list[Option]]] = {}
        self._made: dict[tuple[str, frozenset[str]], list[Option]] = {}
        self._keys = {name: _structure(stage, formulas) for name, stage in formulas.stages.items()}
        base = {name: sum(work(part) for part in stage.parts) for name, stage in formulas.stages.items()}
        self.cheap = {name for name, each in base.items() if each <= CHEAP * max(base.values())}

    def of(self, name: str, inside: frozenset[str]) -> list[Option]:
        """Options that no other one beats in both memory and work, the least work first."""
        exact = (name, inside)
        if exact in self._made:
            return self._made[exact]
        order = sorted(inside, key=self.formulas.places.__getitem__)
        key = self._signature(name, order)
        if key in self._known:
            self._made[exact] = self._again(name, order, *self._known[key])
        else:
            self._made[exact] = _best([each for modes in self._modes(order) for each in self._search(name, modes)])
            self._known[key] = name, order, self._made[exact]
        return self._made[exact]

    def _modes(self, inside: Sequence[str]) -> Iterator[Inside]:
        """Nothing twice; what is cheap twice; everything as small as possible."""
        yield dict.fromkeys(inside, "once")
        if any(each in self.cheap for each in inside):
            yield {each: "again" if each in self.cheap else "once" for each in inside}
        if any(each not in self.cheap for each in inside):
            yield dict.fromkeys(inside, "again")

    def refined(self, name: str, option: Option, tiles: Sequence[int]) -> Iterator[Option]:
        """The same loops in pieces of other sizes."""
        inside = option.shape.inside
        for size in tiles:
            loops = tuple(
                tuple(
                    (axis, _piece(part, axis, size) if at == len(each) - 1 else tile)
                    for at, (axis, tile) in enumerate(each)
                )
                for each, part in zip(option.shape.loops, self.formulas.stages[name].parts, strict=False)
            )
            yield self._build(name, inside, loops, size)
            split = self._split(name, inside, loops, size)
            if split is not None:
                yield split

    # -- search ---------------------------------------------------------------------------------

    def _search(self, name: str, inside: Inside) -> Iterator[Option]:
        stage = self.formulas.stages[name]
        bare = self._build(name, inside, tuple(() for _ in stage.parts), self.tiles[0])
        yield bare
        if not inside:
            return
        for size in self.tiles:
            each_part = [self._axes(part, inside) for part in stage.parts]
            if len(each_part) > 1:
                loops = tuple(
                    tuple((at, _piece(part, at, size)) for at in axes[:1])
                    for part, axes in zip(stage.parts, each_part, strict=True)
                )
                yield self._build(name, inside, loops, size)
                continue
            part = stage.parts[0]
            for axis in each_part[0]:
                yield self._exactly(name, inside, ((axis, _piece(part, axis, size)),), size)
            for first, last in itertools.permutations(each_part[0], 2):
                if bare.scratch > SMALL:
                    yield self._exactly(name, inside, ((first, 1), (last, _piece(part, last, size))), size)

    def _axes(self, part: Part, inside: Inside) -> list[int]:
        """Axes that what is computed inside depends on."""
        used = {
            var for load in part.loads() if load.tensor in inside for index in load.index for var in variables(index)
        }
        return [at for at, var in enumerate(part.axes) if var.extent > 1 and var in used]

    def _exactly(self, name: str, inside: Inside, loops: Loops, size: int) -> Option:
        """With the remainder of the last loop as a nest of its own, where that repeats no other work."""
        found = self._build(name, inside, (loops,), size)
        if all(level == len(loops) for level, _ in found.nests[0].root.children):
            return self._split(name, inside, (loops,), size) or found
        return found

    def _build(
        self, name: str, inside: Inside, loops: Sequence[Loops], size: int, parts: tuple[Part, ...] | None = None
    ) -> Option:
        stage = self.formulas.stages[name]
        chosen = parts or stage.parts
        nests = []
        for part, each in zip(chosen, loops, strict=True):
            nests.append(Nest(self.formulas, stage, part, inside, each, size))
        scratch = max(Scratch(nest).size for nest in nests)
        shape, total = Shape(inside, tuple(loops), size, chosen), sum(nest.work for nest in nests)
        exact = all(loop.exact for nest in nests for loop in nest.root.loops)
        return Option(shape, scratch, total, exact, lambda made=tuple(nests): made)

    def _again(self, name: str, order: list[str], other: str, its: list[str], options: list[Option]) -> list[Option]:
        """Options that were found for another stage of the same structure; nests are built where they are used."""
        ours, theirs = (
            [tensor for each in (*inside, stage) for tensor in (*self._keys[each][1], each)]
            for inside, stage in ((order, name), (its, other))
        )
        same, found = dict(zip(ours, theirs, strict=True)), []
        for option in options:
            inside = {mine: option.shape.inside[yours] for mine, yours in zip(order, its, strict=True)}
            shape = replace(option.shape, inside=inside)
            make = functools.partial(self._nests, name, shape)
            found.append(Option(shape, option.scratch, option.work, option.exact, make, (option, same)))
        return found

    def _nests(self, name: str, shape: Shape) -> tuple[Nest, ...]:
        if len(shape.parts) > len(self.formulas.stages[name].parts):
            found = self._split(name, shape.inside, shape.loops[:1], shape.size)
            assert found is not None
            return found.nests
        return self._build(name, shape.inside, shape.loops, shape.size).nests

    def _split(self, name: str, inside: Inside, loops: Sequence[Loops], size: int) -> Option | None:
        """With the remainder of the last loop as a nest of its own, so that nothing is computed twice."""
        stage = self.formulas.stages[name]
        if len(stage.parts) != 1 or not loops[0]:
            return None
        (axis, tile), part = loops[0][-1], stage.parts[0]
        rest = part.axes[axis].extent % tile
        if not rest:
            return None
        parts = _halves(part, axis, part.axes[axis].extent - rest)
        tail = (*loops[0][:-1], (axis, rest))
        return self._build(name, inside, (loops[0], tail), size, parts)

    # -- equal structures ------------------------------------------------------------------------

    def _signature(self, name: str, inside: Sequence[str]) -> tuple:
        """Equal for stages of the same structure: names of tensors are numbered."""
        numbers = {each: at for at, each in enumerate(inside)}
        return tuple(
            (self._keys[each][0], each in self.cheap, tuple(numbers.get(tensor, -1) for tensor in self._keys[each][1]))
            for each in (*inside, name)
        )


def _piece(part: Part, axis: int, size: int) -> int:
    return min(size, part.axes[axis].extent)


def _halves(part: Part, axis: int, at: int) -> tuple[Part, ...]:
    old = part.axes[axis]
    made = []
    for first, extent in ((0, at), (at, old.extent - at)):
        var = Var.new(extent)
        table = {old: of(var) + first}
        made.append(
            replace(
                part,
                axes=tuple(var if each == old else each for each in part.axes),
                store=tuple(substitute(index, table.get) for index in part.store),
                finish=with_vars(part.finish, table),
                body=None if part.body is None else with_vars(part.body, table),
            )
        )
    return tuple(made)


def _best(options: list[Option]) -> list[Option]:
    """Those that no other one beats; of equals the first. What can be written in place counts apart."""
    kept: list[Option] = []
    for each in sorted(options, key=lambda option: (option.work, option.scratch)):
        if not any(
            other.scratch <= each.scratch and other.work <= each.work and (other.exact or not each.exact)
            for other in kept
        ):
            kept.append(each)
    return kept


# -- structure as a value ----------------------------------------------------------------------------


class _Numbering:
    def __init__(self, formulas: Formulas) -> None:
        self.formulas = formulas
        self.vars: dict[Var, int] = {}
        self.tensors: dict[str, int] = {}

    def index(self, index: Sum) -> tuple:
        rows = []
        for atom, factor in index.terms:
            if isinstance(atom, Var):
                rows.append((self.vars.setdefault(atom, len(self.vars)), atom.extent, factor))
            elif isinstance(atom, (Quotient, Remainder)):
                rows.append((type(atom).__name__, self.index(atom.value), atom.divisor, factor))
            elif isinstance(atom, Datum):
                rows.append(("data", self.value(atom.value), factor))
        return (*rows, index.constant)

    def value(self, value: Expr) -> tuple:
        match value:
            case Const():
                return ("const", value.value, value.dtype)
            case Position():
                return ("position", self.index(value.index))
            case Load():
                number = self.tensors.setdefault(value.tensor, len(self.tensors))
                return ("load", number, self.formulas.shape(value.tensor), tuple(map(self.index, value.index)))
            case Call():
                return (value.op, value.dtype, *map(self.value, value.args))
        return ("result",)


def _structure(stage: Stage, formulas: Formulas) -> tuple[tuple, tuple[str, ...]]:
    numbering = _Numbering(formulas)
    rows = []
    for part in stage.parts:
        axes = tuple(
            (numbering.vars.setdefault(var, len(numbering.vars)), var.extent) for var in (*part.axes, *part.inner)
        )
        body = None if part.body is None else numbering.value(part.body)
        rows.append(
            (
                axes,
                len(part.axes),
                tuple(map(numbering.index, part.store)),
                part.combine,
                body,
                numbering.value(part.finish),
            )
        )
    return (stage.shape, stage.dtype, tuple(rows)), tuple(numbering.tensors)
