"""Putting other nodes in the place of a match, in a clone of the graph that it was found in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.match import Match, bodies, path_dtype, private, together
from lrcompile.graphs.onnx.naming import unique
from lrcompile.graphs.onnx.tensors import from_torch, to_torch

Emit = Callable[["Tape", Match, ir.Value], ir.Value]
"""Computes the match's root (bias of the last node included) from its source in the clone."""


SOURCE = "pkg.torch.onnx.fx_node"
"""Metadata that quotes the whole line that a node was exported from: untrue of the nodes that take its place."""


@dataclass(eq=False)
class Tape:
    """New nodes for one place of a graph; they are inserted when all are recorded.

    Args:
        taken: every name of the graph; no new value or node gets one of them.
        metadata: of the new nodes.
    """

    graph: ir.Graph
    prefix: str
    taken: set[str]
    metadata: dict[str, str] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr] = (), *, domain: str = ""
    ) -> ir.Value:
        """Appends an operator with one output and returns that."""
        label = unique(f"{self.prefix}/{op_type}", self.taken, "_")
        metadata = dict(self.metadata)
        node = ir.Node(domain, op_type, inputs, list(attributes), name=label, metadata_props=metadata)
        node.outputs[0].name = unique(f"{label}_output", self.taken, "_")
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer; the name is made unique in the graph."""
        label = unique(name, self.taken, "_")
        value = ir.Value(name=label, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in."""
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name} stands in no graph")
    return node.graph


def _names(graph: ir.Graph) -> set[str]:
    """Every name of a value or node, those of bodies included."""
    names: set[str] = set()
    for each in (graph, *graph.subgraphs()):
        names.update(str(value.name) for value in (*each.inputs, *each.initializers.values()))
    for node in graph.all_nodes():
        names.update((str(node.name), *(str(value.name) for value in node.outputs)))
    return names


class Splicer:
    """Maps a graph to its clone, node by node.

    The two must have the same nodes in the same order, which is what ``Graph.clone`` gives. New constants
    stand in the outermost graph, where bodies read them as well.
    """

    def __init__(self, original: ir.Graph, clone: ir.Graph) -> None:
        self.graph = clone
        self.taken = _names(clone)
        self._biases: dict[tuple, ir.Value] = {}
        self._shifts: dict[tuple, Tensor] = {}
        self._added: list[ir.Node] = []
        self._nodes: dict[int, ir.Node] = {}
        self._values: dict[int, ir.Value] = {}
        self._pair(original, clone)

    def _pair(self, original: ir.Graph, clone: ir.Graph) -> None:
        """Maps what stands in a graph, and in the bodies of its nodes."""
        for a, b in zip(original.inputs, clone.inputs, strict=True):
            self._values[id(a)] = b
        for name, value in original.initializers.items():
            self._values[id(value)] = clone.initializers[name]
        for a, b in zip(original, clone, strict=True):
            self._nodes[id(a)] = b
            for old, new in zip(a.outputs, b.outputs, strict=True):
                self._values[id(old)] = new
            for inner, twin in zip(bodies(a), bodies(b), strict=True):
                self._pair(inner, twin)

    def node(self, node: ir.Node) -> ir.Node:
        """The clone of a node."""
        return self._nodes[id(node)]

    def value(self, value: ir.Value) -> ir.Value:
        """What stands for a value in the clone now."""
        return self._values[id(value)]

    def replace(self, match: Match, emit: Emit, prefix: str) -> None:
        """Replaces the nodes of a match by what ``emit`` records."""
        last = self.node(match.nodes[-1])
        metadata = {key: text for key, text in last.metadata_props.items() if key != SOURCE}
        tape = Tape(self.graph, prefix, self.taken, metadata)
        old = self.value(match.root)
        new = emit(tape, match, self.value(match.source))
        if not tape.nodes or new is not tape.nodes[-1].outputs[0]:
            new = tape.op("Identity", [new])  # computed elsewhere already, under a name of its own
        graph_of(last).insert_before(last, tape.nodes)
        self._added.extend(tape.nodes)
        new.type, new.shape = old.type, old.shape
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._values[id(match.root)] = new
        for node in reversed(match.nodes):
            clone = self.node(node)
            if clone.graph is not None and not any(output.uses() for output in clone.outputs):
                graph_of(clone).remove(clone, safe=True)
        old.name = f"{name}/replaced"
        new.name = name

    def shift_adder(self, match: Match, shift: Tensor, prefix: str) -> None:
        """Adds a constant to the bias of the Add that follows a match."""
        if match.adder is None or match.bias is None:
            raise ValueError("the match is followed by no bias")
        clone = self.node(match.adder)
        index = 1 if match.adder.inputs[1] is match.bias else 0
        tape = Tape(self.graph, prefix, self.taken)
        clone.replace_input_with(index, self.bias(tape, match, shift))

    def shift(self, match: Match, shift: Tensor | None) -> Tensor | None:
        """What a match adds besides its bias: constants further inside, and the shift of its replacement."""
        if match.offset is None:
            return shift
        key = (id(match.offset), None if shift is None else id(shift))
        if key not in self._shifts:
            self._shifts[key] = together(match.offset, shift)  # type: ignore[assignment]
        return self._shifts[key]

    def bias(self, tape: Tape, match: Match, shift: Tensor | None) -> ir.Value:
        """A constant that holds what the match adds (Gemm's ``beta`` included) and the shift, stored once.

        A shift without a bias is stored as it is; for a convolution the channels come before the window.
        """
        rank = 0 if match.window is None else match.window.rank
        if match.bias is not None and shift is None and match.beta == 1.0 and not rank:
            return self.value(match.bias)
        beta = match.beta if match.adder is None else 1.0
        key = (match.bias, beta, None if shift is None else id(shift), rank)
        if key not in self._biases:
            stored = constant(match.bias)
            total = torch.zeros((), dtype=torch.float64) if stored is None else to_torch(stored).double() * beta
            total = (total if shift is None else total + shift.double()).to(path_dtype(match))
            shaped = total.reshape(-1, *[1] * rank) if rank else total
            self._biases[key] = tape.constant(from_torch(shaped.contiguous()), f"{tape.prefix}.bias")
        return self._biases[key]

    def inline_biases(self) -> None:
        """Gives convolutions that were added the bias that an Add behind them brings."""
        for node in self._added:
            add = node if (node.domain, node.op_type) == ("", "Add") and node.graph is not None else None
            conv = None if add is None or add.inputs[0] is None else add.inputs[0].producer()
            if add is None or conv is None or conv.op_type != "Conv" or len(conv.inputs) != 2:
                continue
            held = None if add.inputs[1] is None else constant(add.inputs[1])
            kernel = conv.inputs[1].shape if conv.inputs[1] is not None else None
            if held is None or kernel is None or not private(conv.outputs[0]) or held.size != kernel[0]:
                continue
            vector = from_torch(to_torch(held).reshape(-1))
            tape = Tape(self.graph, str(add.inputs[1].name), self.taken)  # type: ignore[union-attr]
            conv.resize_inputs(3)
            conv.replace_input_with(2, tape.constant(vector, tape.prefix))
            old, new = add.outputs[0], conv.outputs[0]
            name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph_of(add).remove(add, safe=True)
            old.name, new.name = f"{name}/replaced", name

    def drop_unused(self) -> None:
        """Removes nodes and initializers that nobody reads any more."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        model = ir.Model(self.graph, ir_version=10)
        RemoveUnusedNodesPass()(model)
        for body in self.graph.subgraphs():  # the pass leaves what bodies hold
            for name, value in list(body.initializers.items()):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    del body.initializers[name]


def add_bias(tape: Tape, match: Match, result: ir.Value, shift: Tensor | None, splicer: Splicer) -> ir.Value:
    """Adds what the replaced nodes added themselves (Gemm's ``beta * C``, Conv's ``B``), and the shift.

    The bias of a following Add stays in its node. A constant bias and the shift become one constant.
    """
    inside = replace(match, bias=match.bias if match.adder is None else None)
    if inside.bias is not None and constant(inside.bias) is None:
        bias = splicer.value(inside.bias)
        if match.beta != 1.0:
            factor = torch.tensor(match.beta, dtype=path_dtype(match))
            bias = tape.op("Mul", [bias, tape.constant(from_torch(factor), f"{tape.prefix}.beta")])
        result = tape.op("Add", [result, bias])
        inside = replace(inside, bias=None)
    if inside.bias is None and shift is None:
        return result
    return tape.op("Add", [result, splicer.bias(tape, inside, shift)])
