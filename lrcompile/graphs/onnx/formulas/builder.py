"""What an operator needs to write itself down as stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from lrcompile.dataflow.expr import Const, Expr, Load, Result
from lrcompile.dataflow.index import Sum, constant, of
from lrcompile.dataflow.program import ITEMSIZE
from lrcompile.dataflow.stage import Formulas, Part, Stage, new_axes
from lrcompile.errors import UnsupportedError

Index = tuple[Sum, ...]
Shape = tuple[int, ...]
Handler = Callable[["Builder", ir.Node], None]
TABLE: dict[str, Handler] = {}
MAX_RANK = 12


def op(*names: str) -> Callable[[Handler], Handler]:
    """Registers the formula of operators of the default domain."""

    def register(handler: Handler) -> Handler:
        TABLE.update(dict.fromkeys(names, handler))
        return handler

    return register


class Builder:
    """Formulas under construction.

    ``names`` maps a value of the graph to a tensor of the formulas; views of constants stay constants.
    """

    def __init__(self, opset: int) -> None:
        self.formulas = Formulas()
        self.names: dict[str, str] = {}
        self.opset = opset
        self.trusted_indices = False  # whether indices at run time are known to be non-negative
        self._node = ""

    # -- reading ------------------------------------------------------------------------------

    def inputs(self, node: ir.Node) -> list[str | None]:
        """Tensors that a node reads; None for an input that is left out."""
        found = [None if value is None or not value.name else self.names[value.name] for value in node.inputs]
        while found and found[-1] is None:
            found.pop()
        return found

    def given(self, node: ir.Node, at: int) -> str | None:
        """The tensor of one input, None where it is left out."""
        found = self.inputs(node)
        return found[at] if at < len(found) else None

    def need(self, node: ir.Node, at: int) -> str:
        """The tensor of an input that must be there.

        Raises:
            UnsupportedError: it is not.
        """
        found = self.given(node, at)
        if found is None:
            raise self.refuse(node, f"input {at} is missing")
        return found

    def shape(self, tensor: str) -> Shape:
        return self.formulas.shape(tensor)

    def dtype(self, tensor: str) -> str:
        return self.formulas.dtype(tensor)

    def array(self, tensor: str | None) -> np.ndarray | None:
        """The value of a constant, None for anything else."""
        return None if tensor is None else self.formulas.constants.get(tensor)

    def known(self, node: ir.Node, at: int, what: str) -> np.ndarray | None:
        """The value of an input that must be constant if it is there at all.

        Raises:
            UnsupportedError: it is computed at run time.
        """
        tensor = self.given(node, at)
        if tensor is None:
            return None
        found = self.array(tensor)
        if found is None:
            raise self.refuse(node, f"{what} must be constant")
        return found

    def at(self, tensor: str, index: Sequence[Sum]) -> Expr:
        """An element; of a constant that is one number, the number."""
        if self.dtype(tensor) not in ITEMSIZE:
            raise UnsupportedError(f"the type {self.dtype(tensor)} has no equivalent in C99", where=self._node)
        array = self.array(tensor)
        if array is not None and array.size == 1:
            return Const(array.reshape(-1)[0].item(), array.dtype.name)
        return Load(tensor, tuple(index), self.dtype(tensor))

    def spread(self, tensor: str, index: Sequence[Sum]) -> Expr:
        """An element under the broadcasting rule: shapes are aligned at the end, an extent of 1 repeats."""
        shape = self.shape(tensor)
        own = index[len(index) - len(shape) :]
        return self.at(tensor, [constant(0) if n == 1 else each for n, each in zip(shape, own, strict=True)])

    # -- writing ------------------------------------------------------------------------------

    def refuse(self, node: ir.Node, reason: str) -> UnsupportedError:
        """An error that names operator and node."""
        return UnsupportedError(f"operator {node.op_type}: {reason}", where=node.name or self._node)

    def output(self, node: ir.Node, at: int = 0) -> str | None:
        """The name of an output that somebody may read."""
        if at >= len(node.outputs) or not node.outputs[at].name:
            return None
        return node.outputs[at].name

    def begin(self, node: ir.Node) -> None:
        self._node = node.name or f"{node.op_type} -> {next((out.name for out in node.outputs if out.name), '?')}"

    def fresh(self, hint: str) -> str:
        """A tensor name that nobody has yet."""
        taken = self.formulas.stages.keys() | self.formulas.constants.keys() | self.formulas.inputs.keys()
        name, count = hint, 0
        while name in taken:
            count += 1
            name = f"{hint}#{count}"
        return name

    def alias(self, value: str | None, tensor: str) -> None:
        """A value of the graph that is another tensor unchanged."""
        if value is not None:
            self.names[value] = tensor

    def constant(self, value: str | None, array: np.ndarray) -> str:
        """Stores a constant and lets a value of the graph name it."""
        name = self.fresh(value or f"{self._node}/constant")
        self.formulas.constants[name] = array
        self.alias(value, name)
        return name

    def define(self, value: str | None, shape: Shape, formula: Callable[[Index], Expr], hint: str = "") -> str:
        """A tensor without a reduction."""
        self._check(shape)
        axes = new_axes(shape)
        index = tuple(map(of, axes))
        found = formula(index)
        return self._add(value, hint, shape, found.dtype, (Part(axes, index, found, nodes=(self._node,)),))

    def reduce(
        self,
        value: str | None,
        shape: Shape,
        extents: Shape,
        body: Callable[[Index, Index], Expr],
        combine: str = "add",
        finish: Callable[[Expr, Index], Expr] | None = None,
        hint: str = "",
    ) -> str:
        """A tensor whose elements combine ``body(index, inner index)`` over ``extents``."""
        self._check(shape + extents)
        axes, inner = new_axes(shape), new_axes(extents)
        index = tuple(map(of, axes))
        combined = body(index, tuple(map(of, inner)))
        result: Expr = Result(combined.dtype)
        found = result if finish is None else finish(result, index)
        part = Part(axes, index, found, inner, combine, combined, (self._node,))
        return self._add(value, hint, shape, found.dtype, (part,))

    def fold(self, tensor: str) -> None:
        """Turns a stage into a constant where everything that it reads is constant."""
        from lrcompile.dataflow.interpret import stage_value

        stage = self.formulas.stages[tensor]
        if all(name in self.formulas.constants for name in stage.reads()):
            self.formulas.constants[tensor] = stage_value(stage, self.formulas.constants)
            del self.formulas.stages[tensor]

    def join(self, value: str | None, shape: Shape, axis: int, pieces: Sequence[str]) -> str:
        """A concatenation."""
        parts, first = [], 0
        for piece in pieces:
            axes = new_axes(self.shape(piece))
            index = tuple(map(of, axes))
            store = tuple(each + first if at == axis else each for at, each in enumerate(index))
            if prod(self.shape(piece)):
                parts.append(Part(axes, store, self.at(piece, index), nodes=(self._node,)))
            first += self.shape(piece)[axis]
        return self._add(value, "", shape, self.dtype(pieces[0]), tuple(parts))

    def _check(self, shape: Shape) -> None:
        if 0 in shape:
            raise UnsupportedError(f"a tensor without elements: shape {shape}", where=self._node)

    def _add(self, value: str | None, hint: str, shape: Shape, dtype: str, parts: tuple[Part, ...]) -> str:
        if dtype not in ITEMSIZE:
            raise UnsupportedError(f"the type {dtype} has no equivalent in C99", where=self._node)
        self._check(shape)
        name = self.fresh(value or hint or f"{self._node}/value")
        self.formulas.stages[name] = Stage(name, shape, dtype, parts)
        self.alias(value, name)
        return name


def broadcast(*shapes: Shape) -> Shape:
    """The common shape under the broadcasting rule."""
    return tuple(int(n) for n in np.broadcast_shapes(*shapes))


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute that is one integer."""
    return node.attributes[name].as_int() if name in node.attributes else default


def number(node: ir.Node, name: str, default: float = 0.0) -> float:
    """An attribute that is one float."""
    return node.attributes[name].as_float() if name in node.attributes else default


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that is a list of integers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else None


def text(node: ir.Node, name: str, default: str = "") -> str:
    """An attribute that is text."""
    return node.attributes[name].as_string() if name in node.attributes else default


def axis_of(node: ir.Node, rank: int, default: int) -> int:
    """The attribute ``axis``, counted from the front."""
    return integer(node, "axis", default) % max(rank, 1)
