"""Stages: every tensor of a model as a formula over the elements of others, with at most one reduction.

An ONNX operator becomes one stage or a few (a softmax: maximum, exponential, sum, quotient). Nothing here says in
which order or in which pieces elements are computed, nor where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np

from lrcompile.dataflow.expr import Call, Const, Expr, Load, Result, loads
from lrcompile.dataflow.index import Sum, Var, of
from lrcompile.dataflow.program import ITEMSIZE


@dataclass(frozen=True, eq=False)
class Part:
    """Elements of a stage that follow one formula.

    ``out[store] = finish(reduce over inner of body)``; without ``inner`` it is ``out[store] = finish`` alone.

    Args:
        axes: variables of the elements; distinct values reach distinct elements.
        store: index in the tensor.
        finish: value of an element; :class:`Result` in it is what was reduced.
        inner: variables of the reduction.
        combine: ``add``, ``mul``, ``max`` or ``min``.
        body: what is combined, in the type of the accumulator.
        nodes: names of the nodes of the model that it computes.
    """

    axes: tuple[Var, ...]
    store: tuple[Sum, ...]
    finish: Expr
    inner: tuple[Var, ...] = ()
    combine: str = ""
    body: Expr | None = None
    nodes: tuple[str, ...] = ()

    def loads(self) -> tuple[Load, ...]:
        """All loads, of the reduction first."""
        return self._loads

    @cached_property
    def _loads(self) -> tuple[Load, ...]:
        return (*(() if self.body is None else loads(self.body)), *loads(self.finish))

    @property
    def identity(self) -> bool:
        """Whether the elements are the whole tensor, in its own order."""
        return all(index.variable == var for index, var in zip(self.store, self.axes, strict=False))

    @property
    def size(self) -> int:
        return prod(var.extent for var in self.axes)

    @property
    def reach(self) -> int:
        """Elements that are combined to one."""
        return prod(var.extent for var in self.inner)


@dataclass(frozen=True, eq=False)
class Stage:
    """A tensor and its formula. More than one part is a concatenation: parts do not overlap and leave no gap."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def reads(self) -> set[str]:
        """Names of all tensors that it loads from."""
        return {load.tensor for part in self.parts for load in part.loads()}


@dataclass(eq=False)
class Formulas:
    """A model as stages, in topological order.

    Args:
        inputs: name → (shape, dtype).
        constants: name → array, in flash.
        stages: by name.
        outputs: names of stages.
    """

    inputs: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def shape(self, tensor: str) -> tuple[int, ...]:
        if tensor in self.stages:
            return self.stages[tensor].shape
        return self.inputs[tensor][0] if tensor in self.inputs else self.constants[tensor].shape

    def dtype(self, tensor: str) -> str:
        if tensor in self.stages:
            return self.stages[tensor].dtype
        return self.inputs[tensor][1] if tensor in self.inputs else self.constants[tensor].dtype.name

    @cached_property
    def places(self) -> dict[str, int]:
        """Stage → its place in the order. Only for formulas that do not change any more."""
        return {name: at for at, name in enumerate(self.stages)}

    def readers(self) -> dict[str, list[str]]:
        """Stage → stages that load from it, in order."""
        found: dict[str, list[str]] = {name: [] for name in self.stages}
        for name, stage in self.stages.items():
            for source in stage.reads():
                if source in found:
                    found[source].append(name)
        return found

    def used(self) -> Formulas:
        """Without stages and constants that no output needs."""
        needed = set(self.outputs)
        for name in reversed(self.stages):
            if name in needed:
                needed |= self.stages[name].reads()
        return Formulas(
            dict(self.inputs),
            {name: array for name, array in self.constants.items() if name in needed},
            {name: stage for name, stage in self.stages.items() if name in needed},
            self.outputs,
        )


def elementwise(name: str, shape: tuple[int, ...], axes: tuple[Var, ...], value: Expr, node: str) -> Stage:
    """A stage without a reduction; ``axes`` are its own variables, one for each dimension."""
    return Stage(name, shape, value.dtype, (Part(axes, tuple(map(of, axes)), value, nodes=(node,)),))


def new_axes(shape: tuple[int, ...]) -> tuple[Var, ...]:
    """Fresh variables over a shape."""
    return tuple(Var.new(extent) for extent in shape)


def unique(part: Part) -> Part:
    """The same part over fresh variables, so that two copies can stand side by side."""
    from lrcompile.dataflow.expr import with_vars

    table: Mapping[Var, Sum] = {var: of(Var.new(var.extent)) for var in (*part.axes, *part.inner)}
    return rename(part, table, lambda value: with_vars(value, table))


def rename(part: Part, table: Mapping[Var, Sum], value: object) -> Part:
    """A part with its variables replaced one for one."""
    from lrcompile.dataflow.index import substitute

    def var(each: Var) -> Var:
        found = table[each].variable
        assert found is not None
        return found

    change = value
    return replace(
        part,
        axes=tuple(map(var, part.axes)),
        inner=tuple(map(var, part.inner)),
        store=tuple(substitute(index, table.get) for index in part.store),
        finish=change(part.finish),  # type: ignore[operator]
        body=None if part.body is None else change(part.body),  # type: ignore[operator]
    )


START = {"add": 0, "mul": 1}


def start(combine: str, dtype: str) -> Const:
    """What a reduction begins with."""
    if combine in START:
        return Const(START[combine], dtype)
    if dtype == "bool":
        return Const(combine == "min", dtype)
    if dtype.startswith("float"):
        return Const(float("-inf") if combine == "max" else float("inf"), dtype)
    info = np.iinfo(dtype)
    return Const(int(info.min if combine == "max" else info.max), dtype)


__all__ = ["Call", "Formulas", "Part", "Result", "Stage", "elementwise", "new_axes", "rename", "start", "unique"]
