"""Fusion of stages: views and cheap formulas vanish into their readers, a reduction takes its elementwise reader in.

All rewrites here are exact: every element is computed by the same formula as before, perhaps more than once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from lrcompile.dataflow.expr import Call, Const, Expr, Load, Position, cost, rewrite, walk, with_vars
from lrcompile.dataflow.index import Var, of, substitute
from lrcompile.dataflow.restrict import restrict
from lrcompile.dataflow.stage import Formulas, Part, Stage, unique

CHEAP = 4  # instructions that may be spent twice rather than a buffer on their result
ROUNDS = 200
VIEWED = 8  # times that an element may be looked up anew
LARGE = 150  # nodes of an expression that takes no more in


def fuse(formulas: Formulas) -> Formulas:
    """Fuses until nothing changes; what nobody reads goes first, so that costs are those of what remains."""
    formulas = _settled(formulas, _only_needed)
    return _settled(formulas, lambda each: _inline(_finish_reductions(_settled(each, _only_needed)).used()))


def _only_needed(formulas: Formulas) -> Formulas:
    return restrict(_split_concatenated(_inline(formulas.used(), moves_only=True).used()))


def _settled(formulas: Formulas, change: Callable[[Formulas], Formulas]) -> Formulas:
    for _ in range(ROUNDS):
        before = _signature(formulas)
        formulas = change(formulas).used()
        if _signature(formulas) == before:
            break
    return formulas


def _signature(formulas: Formulas) -> list[tuple]:
    return [(name, stage.shape, len(stage.parts), len(stage.reads())) for name, stage in formulas.stages.items()]


# -- views and elementwise stages into their readers -----------------------------------------------


def _inline(formulas: Formulas, *, moves_only: bool = False) -> Formulas:
    demand = _demand(formulas)
    done: dict[str, Stage] = {}
    gone: set[str] = set()
    for name, stage in formulas.stages.items():
        done[name] = replace(stage, parts=tuple(_inline_part(part, done, gone) for part in stage.parts))
        if _vanishes(done[name], demand, moves_only):
            gone.add(name)
    return replace(formulas, stages=done)


def _inline_part(part: Part, done: dict[str, Stage], gone: set[str]) -> Part:
    def new(value: Expr) -> Expr | None:
        if not isinstance(value, Load) or value.tensor not in gone:
            return None
        source = done[value.tensor]
        inner = source.parts[0]
        return with_vars(inner.finish, dict(zip(inner.axes, value.index, strict=True)))

    nodes = part.nodes
    for load in part.loads():
        if load.tensor in gone:
            nodes = _joined(done[load.tensor].parts[0].nodes, nodes)
    body = None if part.body is None else rewrite(part.body, new)
    return replace(part, body=body, finish=rewrite(part.finish, new), nodes=nodes)


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(first + second))


def _vanishes(stage: Stage, demand: Counter[str], moves_only: bool) -> bool:
    part = stage.parts[0] if stage.parts else None
    if part is None or len(stage.parts) > 1 or part.inner or not part.identity:
        return False
    loaded = demand[stage.name] / max(part.size, 1)
    if isinstance(part.finish, (Load, Const, Position)) and (loaded <= VIEWED or not _indirect(part.finish)):
        return True
    if moves_only:
        return False
    if len(list(walk(part.finish))) > LARGE:
        return False
    return loaded <= 1 or (cost(part.finish) <= CHEAP and loaded <= 3) or (_view(part.finish) and loaded <= VIEWED)


def _indirect(value: Expr) -> bool:
    """Whether data decide what is loaded, as in a table: that is work, and hides a product of neighbours."""
    return sum(1 for _ in walk(value)) > 1


def _view(value: Expr) -> bool:
    """Only moves elements, perhaps with a constant around them."""
    if isinstance(value, Call):
        return value.op in ("guard", "select") and all(_view(arg) for arg in value.args[1:])
    return isinstance(value, (Load, Const, Position))


def _demand(formulas: Formulas) -> Counter[str]:
    """How many loads of elements of each tensor a run makes."""
    found: Counter[str] = Counter(dict.fromkeys(formulas.outputs, 0))
    for stage in formulas.stages.values():
        for part in stage.parts:
            for load in part.loads():
                found[load.tensor] += part.size
            if part.body is not None:
                for each in walk(part.body):
                    if isinstance(each, Load):
                        found[each.tensor] += part.size * (part.reach - 1)
    return found


# -- concatenations --------------------------------------------------------------------------------


def _split_concatenated(formulas: Formulas) -> Formulas:
    """An elementwise reader of a concatenation becomes a concatenation itself."""
    readers = formulas.readers()
    stages = {}
    for name, stage in formulas.stages.items():
        parts: list[Part] = []
        for part in stage.parts:
            parts += _split_part(part, formulas, readers)
        stages[name] = replace(stage, parts=tuple(parts))
    return replace(formulas, stages=stages)


def _split_part(part: Part, formulas: Formulas, readers: dict[str, list[str]]) -> Iterator[Part]:
    for load in [] if part.inner else list(part.loads()):
        source = formulas.stages.get(load.tensor)
        if source is None or len(source.parts) == 1 or len(readers[source.name]) > 1 or source.name in formulas.outputs:
            continue
        if source.parts[0].size and sum(each.size for each in source.parts) != part.size:
            continue
        pieces = _pieces(part, load, source)
        if pieces is not None:
            yield from pieces
            return
    yield part


def _pieces(part: Part, load: Load, source: Stage) -> list[Part] | None:
    axis = _cut_axis(source)
    var = None if axis is None else load.index[axis].variable
    if axis is None or var is None or len([each for each in part.loads() if each.tensor == source.name]) > 1:
        return None
    result = []
    for inner in source.parts:
        first = inner.store[axis].constant
        piece = Var.new(inner.axes[axis].extent)
        table = {var: of(piece) + first}
        moved = replace(
            part,
            axes=tuple(piece if each == var else each for each in part.axes),
            store=tuple(substitute(index, table.get) for index in part.store),
            finish=with_vars(part.finish, table),
            nodes=_joined(inner.nodes, part.nodes),
        )
        result.append(unique(_take_in(moved, source.name, unique(inner), axis, first)))
    return result


def _cut_axis(source: Stage) -> int | None:
    """The only axis along which the parts of a concatenation differ."""
    axes = set()
    for part in source.parts:
        for axis, (index, var) in enumerate(zip(part.store, part.axes, strict=True)):
            if (index - of(var)).terms:
                return None
            if index.constant or var.extent != source.shape[axis]:
                axes.add(axis)
    return axes.pop() if len(axes) == 1 else None


def _take_in(part: Part, name: str, inner: Part, axis: int, first: int) -> Part:
    """Replaces the one load of ``name`` by the formula of a part of it."""
    load = next(each for each in part.loads() if each.tensor == name)
    index = [each - first if at == axis else each for at, each in enumerate(load.index)]
    table = dict(zip(inner.axes, index, strict=True))
    finish = with_vars(inner.finish, table)
    whole = rewrite(part.finish, lambda each: finish if isinstance(each, Load) and each.tensor == name else None)
    body = None if inner.body is None else with_vars(inner.body, table)
    return replace(part, finish=whole, inner=inner.inner, combine=inner.combine, body=body)


# -- reductions ------------------------------------------------------------------------------------


def _finish_reductions(formulas: Formulas) -> Formulas:
    """A reduction that only one elementwise part reads is computed there."""
    every = [part for stage in formulas.stages.values() for part in stage.parts]
    readers = Counter(name for part in every for name in {load.tensor for load in part.loads()})
    stages = dict(formulas.stages)
    for name, stage in formulas.stages.items():
        stages[name] = replace(
            stage, parts=tuple(_with_reduction(part, stages, readers, formulas) for part in stage.parts)
        )
    return replace(formulas, stages=stages)


def _with_reduction(part: Part, stages: dict[str, Stage], readers: Counter[str], formulas: Formulas) -> Part:
    if part.inner:
        return part
    for load in part.loads():
        source = stages.get(load.tensor)
        if source is None or len(source.parts) != 1 or source.name in formulas.outputs:
            continue
        inner = source.parts[0]
        if not inner.inner or not inner.identity or readers[source.name] > 1:
            continue
        if part.size > inner.size or _guarded(part.finish, source.name):
            continue
        if len({each for each in part.loads() if each.tensor == source.name}) > 1:
            continue
        inner = unique(inner)
        table = dict(zip(inner.axes, load.index, strict=True))
        finish, name = with_vars(inner.finish, table), source.name
        whole = rewrite(part.finish, lambda each: finish if isinstance(each, Load) and each.tensor == name else None)  # noqa: B023
        body = None if inner.body is None else with_vars(inner.body, table)
        return replace(
            part,
            finish=whole,
            inner=inner.inner,
            combine=inner.combine,
            body=body,
            nodes=_joined(inner.nodes, part.nodes),
        )
    return part


def _guarded(value: Expr, name: str) -> bool:
    """Whether a tensor is loaded only under a condition: outside of it the index may be out of range."""
    for each in walk(value):
        if isinstance(each, Call) and each.op == "guard":
            for arg in each.args[1:]:
                if any(isinstance(inner, Load) and inner.tensor == name for inner in walk(arg)):
                    return True
    return False
