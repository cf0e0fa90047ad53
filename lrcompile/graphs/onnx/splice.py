"""Putting other nodes in the place of a match, in a clone of the graph that it was found in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.raising import Match
from lrcompile.graphs.onnx.tensors import from_torch, to_torch, torch_dtype

Emit = Callable[["Tape", Match, ir.Value], ir.Value]
"""Computes the match's root (bias of the last node included) from its source in the clone."""


@dataclass(eq=False)
class Tape:
    """New nodes for one place of a graph; they are inserted when all are recorded."""

    graph: ir.Graph
    prefix: str
    nodes: list[ir.Node]
    count: int = 0

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr] = (), *, name: str = ""
    ) -> ir.Value:
        """Appends a standard operator with one output and returns the output."""
        self.count += 1
        label = f"{self.prefix}/{name or op_type}_{self.count}"
        node = ir.Node("", op_type, inputs, list(attributes), name=label)
        node.outputs[0].name = label
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer; the name is made unique in the graph."""
        label, count = name, 1
        while label in self.graph.initializers:
            count += 1
            label = f"{name}_{count}"
        value = ir.Value(name=label, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


class Splicer:
    """Maps a graph to its clone, node by node.

    The two must have the same nodes in the same order, which is what ``Graph.clone`` gives.
    """

    def __init__(self, original: ir.Graph, clone: ir.Graph) -> None:
        self.graph = clone
        self._nodes = {id(a): b for a, b in zip(original, clone, strict=True)}
        self._values: dict[int, ir.Value] = {}
        for a, b in zip(original.inputs, clone.inputs, strict=True):
            self._values[id(a)] = b
        for a, b in zip(original, clone, strict=True):
            for old, new in zip(a.outputs, b.outputs, strict=True):
                self._values[id(old)] = new
        for name, value in original.initializers.items():
            self._values[id(value)] = clone.initializers[name]

    def node(self, node: ir.Node) -> ir.Node:
        """The clone of a node."""
        return self._nodes[id(node)]

    def value(self, value: ir.Value) -> ir.Value:
        """What stands for a value in the clone now."""
        return self._values[id(value)]

    def replace(self, match: Match, emit: Emit, prefix: str) -> None:
        """Replaces the nodes of a match by what ``emit`` records."""
        tape = Tape(self.graph, prefix, [])
        old = self.value(match.root)
        last = self.node(match.nodes[-1])
        new = emit(tape, match, self.value(match.source))
        self.graph.insert_before(last, tape.nodes)
        new.type, new.shape = old.type, old.shape
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._values[id(match.root)] = new
        for node in reversed(match.nodes):
            clone = self.node(node)
            if clone.graph is not None and not any(output.uses() for output in clone.outputs):
                self.graph.remove(clone, safe=True)
        old.name = f"{name}/replaced"
        new.name = name

    def shift_adder(self, match: Match, shift: Tensor, prefix: str) -> None:
        """Adds a constant to the bias of the Add that follows a match."""
        if match.adder is None or match.bias is None:
            raise ValueError("the match is followed by no bias")
        bias = to_torch(match.bias.const_value or constant(match.bias))  # type: ignore[arg-type]
        clone = self.node(match.adder)
        index = 1 if match.adder.inputs[1] is match.bias else 0
        tape = Tape(self.graph, prefix, [])
        total = from_torch((bias + shift.to(bias.dtype)).contiguous(), f"{prefix}.bias")
        clone.replace_input_with(index, tape.constant(total, f"{prefix}.bias"))

    def drop_unused(self) -> None:
        """Removes nodes and initializers that nobody reads any more."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        model = ir.Model(self.graph, ir_version=10)
        RemoveUnusedNodesPass()(model)


def add_bias(tape: Tape, match: Match, result: ir.Value, shift: Tensor | None, splicer: Splicer) -> ir.Value:
    """Adds what the replaced nodes added themselves (Gemm's ``beta * C``, Conv's ``B``), and the shift.

    The bias of a following Add stays in its node. A constant bias and the shift become one constant.
    """
    inside = match.bias if match.adder is None else None
    tensor = constant(inside)
    if inside is not None and tensor is None:
        bias = splicer.value(inside)
        if match.beta != 1.0:
            factor = torch.tensor(match.beta, dtype=torch_dtype(match.root.dtype))
            bias = tape.op("Mul", [bias, tape.constant(from_torch(factor, "beta"), f"{tape.prefix}.beta")])
        result = tape.op("Add", [result, bias])
    total = None if tensor is None else to_torch(tensor) * match.beta
    if shift is not None:
        total = shift if total is None else total + shift.to(total.dtype)
    if total is None:
        return result
    if match.window is not None:
        total = total.reshape(-1, *[1] * match.window.rank)
    stored = tape.constant(from_torch(total.contiguous(), f"{tape.prefix}.bias"), f"{tape.prefix}.bias")
    return tape.op("Add", [result, stored])
