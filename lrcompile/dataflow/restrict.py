"""Only what is read is computed: the demands of readers cut stages smaller, or apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrcompile.dataflow.expr import Expr, Load, rewrite, with_vars
from lrcompile.dataflow.index import Var, bounds, of
from lrcompile.dataflow.stage import Formulas, Part, Stage, unique

Box = tuple[tuple[int, int], ...]


def restrict(formulas: Formulas) -> Formulas:
    """Cuts away elements that nobody reads, and separates elements that different readers read.

    A joint projection to queries, keys and values becomes three, the last block of a classifier that reads one
    token computes one token.
    """
    stages = dict(formulas.stages)
    boxes: dict[str, set[Box]] = {}
    cuts: dict[str, tuple[int, list[tuple[int, int]], tuple[int, ...]]] = {}
    for name in reversed(formulas.stages):
        stage = stages[name]
        cut = None if name in formulas.outputs else _cut(stage, boxes.get(name, set()))
        if cut is not None:
            cuts[name] = cut
            if len(cut[1]) == 1:  # shrunk: its own demands shrink, too
                stages[name] = stage = _window(stage, cut[0], cut[1][0], name)
        for part in stage.parts:
            for load in part.loads():
                if load.tensor in stages:
                    boxes.setdefault(load.tensor, set()).add(_box(load, stages[load.tensor].shape))
    return _apply_cuts(replace(formulas, stages=stages), cuts, formulas) if cuts else formulas


def _box(load: Load, shape: tuple[int, ...]) -> Box:
    box = []
    for index, extent in zip(load.index, shape, strict=True):
        low, high = bounds(index) or (0, extent - 1)
        box.append((max(low, 0), min(high, extent - 1) + 1))
    return tuple(box)


def _cut(stage: Stage, boxes: set[Box]) -> tuple[int, list[tuple[int, int]], tuple[int, ...]] | None:
    """(axis, intervals to keep, old shape), where that is less than all, or more than one."""
    if len(stage.parts) != 1 or not stage.parts[0].identity or not boxes:
        return None
    for axis, extent in enumerate(stage.shape):
        merged: list[list[int]] = []
        for low, high in sorted({box[axis] for box in boxes}):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        intervals = [(low, high) for low, high in merged if high > low]
        if intervals and len(intervals) <= 8 and intervals != [(0, extent)]:
            return axis, intervals, stage.shape
    return None


def _window(stage: Stage, axis: int, interval: tuple[int, int], name: str) -> Stage:
    """The stage restricted to an interval of one axis."""
    part = unique(stage.parts[0])
    var = Var.new(interval[1] - interval[0])
    table = {part.axes[axis]: of(var) + interval[0]}
    axes = tuple(var if at == axis else each for at, each in enumerate(part.axes))
    shape = tuple(var.extent if at == axis else each for at, each in enumerate(stage.shape))
    body = None if part.body is None else with_vars(part.body, table)
    part = replace(part, axes=axes, store=tuple(map(of, axes)), finish=with_vars(part.finish, table), body=body)
    return Stage(name, shape, stage.dtype, (part,))


def _apply_cuts(formulas: Formulas, cuts: dict, old: Formulas) -> Formulas:
    stages: dict[str, Stage] = {}

    def new(value: Expr) -> Expr | None:
        if not isinstance(value, Load) or value.tensor not in cuts:
            return None
        axis, intervals, shape = cuts[value.tensor]
        low = _box(value, shape)[axis][0]
        at = next(i for i, (first, last) in enumerate(intervals) if first <= low < last)
        index = tuple(each - intervals[at][0] if k == axis else each for k, each in enumerate(value.index))
        return replace(value, tensor=_piece(value.tensor, at, intervals), index=index)

    for name, stage in formulas.stages.items():
        fixed = replace(stage, parts=tuple(_rewritten(part, new) for part in stage.parts))
        if name in cuts and len(cuts[name][1]) > 1:
            axis, intervals, _ = cuts[name]
            for at, interval in enumerate(intervals):
                piece = _piece(name, at, intervals)
                stages[piece] = _window(fixed, axis, interval, piece)
        else:
            stages[name] = fixed
    return replace(formulas, stages=stages)


def _piece(name: str, at: int, intervals: list[tuple[int, int]]) -> str:
    return name if len(intervals) == 1 else f"{name}.{at}"


def _rewritten(part: Part, new: Callable[[Expr], Expr | None]) -> Part:
    body = None if part.body is None else rewrite(part.body, new)
    return replace(part, body=body, finish=rewrite(part.finish, new))
