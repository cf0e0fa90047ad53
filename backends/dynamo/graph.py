"""The captured graph: which placeholders are weights of linear maps, and the graph with expressions in their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.graphs.fx.match import call_of, linear
from lrcompile.graphs.structured import affine, strided
from lrcompile.linop import Dense, Identity, LinearOperator, Product, Scaled, Stack, Sum, rebuild, structure, tensors
from lrcompile.sites import Window
from lrcompile.windows import convolve


@dataclass(frozen=True, eq=False)
class Use:
    """One node that multiplies by a weight; ``kind`` says how that is stored (see :class:`lrcompile.plan.Entry`)."""

    node: fx.Node
    kind: str
    input: Any
    bias: Any = None
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class Marked:
    """A placeholder that is the weight of linear maps of one kind.

    Attributes:
        index: among the placeholders.
        whole: nothing else reads it, so that it is not needed where all uses are rewritten.
        source: what torch calls it.
    """

    index: int
    name: str
    kind: str
    whole: bool
    source: str


def mark(graph: fx.Graph, inputs: Sequence[Any]) -> list[Marked]:
    """The placeholders that hold weights of linear maps."""
    found = []
    for index, (node, value) in enumerate(zip(graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if not is_weight(value):
            continue
        uses = [use_of(user, node) for user in node.users]
        kinds = {use.kind for use in uses if use is not None}
        if len(kinds) == 1:
            source = getattr(node, "_dynamo_source", None)
            title = source.name if source is not None else node.name
            found.append(Marked(index, node.name, kinds.pop(), None not in uses, title))
    return found


def is_weight(value: Any) -> bool:
    """A tensor that the module holds, as opposed to one that a caller passes."""
    held = isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None
    return held and isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point()


def use_of(node: fx.Node, weight: fx.Node) -> Use | None:
    """How a node uses a weight as a linear map; None where it does something else with it."""
    call = call_of(node) if sum(arg is weight for arg in node.all_input_nodes) == 1 else None
    if call is None or call.weight is not weight:
        return None
    if call.kind == "Linear":
        return Use(node, call.kind, call.input, call.bias)
    if call.kind == "Conv1D":
        fits = _is_matrix(weight) and (call.bias is None or _is_vector(call.bias))
        return Use(node, call.kind, call.input, call.bias) if fits else None
    value, geometry = _example(weight), call.geometry
    if value is None or geometry is None or geometry.groups != 1:
        return None
    window = geometry.window(value.shape[2:])
    return None if window is None else Use(node, call.kind, call.input, call.bias, window)


def _example(node: Any) -> Any:
    meta = getattr(node, "meta", {})
    return meta.get("example_value", meta.get("val"))


def _is_matrix(node: fx.Node) -> bool:
    value = _example(node)
    return value is not None and value.ndim == 2


def _is_vector(node: Any) -> bool:
    value = _example(node)
    return value is not None and value.ndim == 1


# -- rewriting ---------------------------------------------------------------------------------


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy without what torch keeps for itself in the nodes, real tensors above all."""
    new = fx.Graph()
    result = new.graph_copy(graph, {})
    new.output(result)
    for node in new.nodes:
        for key in ("grapharg", "tensor_dict"):
            node.meta.pop(key, None)
    return new


@dataclass(frozen=True)
class Form:
    """What stands for one weight in a variant: no tensors, so that equal forms share compiled code.

    Attributes:
        text: structure of the expression, as JSON.
        paths: of its tensors.
        leaves: for each of them, which of the variant's leaves it is.
        shift: which leaf the bias gains; None without.
    """

    text: str
    paths: tuple[str, ...]
    leaves: tuple[int, ...]
    shift: int | None


class Leaves:
    """Tensors in order, each object once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int:
        """Which one it is; a new one is added."""
        found = self._numbers.setdefault(id(tensor), len(self.tensors))
        if found == len(self.tensors):
            self.tensors.append(tensor)
        return found

    def form(self, operator: LinearOperator, shift: Tensor | None) -> Form:
        """The form of an expression over these leaves."""
        found = list(tensors(operator))
        numbers = tuple(self.number(tensor) for _, tensor in found)
        last = None if shift is None else self.number(shift)
        return Form(json.dumps(structure(operator)), tuple(path for path, _ in found), numbers, last)


def rewrite(graph: fx.Graph, marked: Sequence[Marked], forms: Sequence[Form | None], leaves: Sequence[Tensor]) -> None:
    """Puts expressions in the place of weights; leaves become placeholders behind the others."""
    holders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(anchor):
        inputs = [graph.placeholder(f"lrcompile_leaf_{index}") for index in range(len(leaves))]
    for each, one in zip(marked, forms, strict=True):
        if one is None:
            continue
        weight = holders[each.name]
        for use in [use_of(user, weight) for user in list(weight.users)]:
            if use is not None:
                _replace(graph, use, one, inputs, leaves)
        if not weight.users:
            graph.erase_node(weight)


def _replace(graph: fx.Graph, use: Use, one: Form, inputs: list[fx.Node], leaves: Sequence[Tensor]) -> None:
    operator = rebuilt(one.text, one.paths, tuple(leaves[index] for index in one.leaves))
    nodes = {id(leaves[index]): inputs[index] for index in one.leaves}
    with graph.inserting_before(use.node):
        bias = use.bias
        if one.shift is not None:
            shift = inputs[one.shift]
            bias = shift if bias is None else graph.call_function(torch.add, (bias, shift))
        if use.window is not None:
            at = use.window
            geometry = (at.kernel, at.strides, at.pads, at.dilations)
            args = (use.input, bias, geometry, one.text, one.paths, *(inputs[index] for index in one.leaves))
            out = graph.call_function(along_window, args)
        else:
            out = emit(graph, operator, use.input, bias, nodes)
    use.node.replace_all_uses_with(out)
    graph.erase_node(use.node)


def emit(graph: fx.Graph, op: LinearOperator, x: Any, bias: Any, nodes: dict[int, fx.Node]) -> fx.Node:
    """Nodes for ``x @ W.T + bias``; an operator without a rule becomes one call that torch traces through."""
    match op:
        case Dense(weight=weight):
            return graph.call_function(linear, (x, nodes[id(weight)], bias))
        case Product(left=left, right=right):
            return emit(graph, left, emit(graph, right, x, None, nodes), bias, nodes)
        case Sum(terms=terms):
            out = emit(graph, terms[0], x, bias, nodes)
            for term in terms[1:]:
                out = graph.call_function(torch.add, (out, emit(graph, term, x, None, nodes)))
            return out
        case Scaled(scale=scale, operator=below):
            out = graph.call_function(torch.mul, (emit(graph, below, x, None, nodes), nodes[id(scale)]))
            return out if bias is None else graph.call_function(torch.add, (out, bias))
        case Identity():
            return x if bias is None else graph.call_function(torch.add, (x, bias))
        case Stack(parts=parts):
            out = graph.call_function(torch.cat, ([emit(graph, part, x, None, nodes) for part in parts], -1))
            return out if bias is None else graph.call_function(torch.add, (out, bias))
        case _:
            own = list(tensors(op))
            paths = tuple(path for path, _ in own)
            args = (x, bias, json.dumps(structure(op)), paths, *(nodes[id(tensor)] for _, tensor in own))
            return graph.call_function(along_last, args)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return json.loads(text)


def rebuilt(text: str, paths: Sequence[str], values: Sequence[Tensor]) -> LinearOperator:
    """An expression from its structure, as JSON, and its tensors."""
    return rebuild(_parsed(text), dict(zip(paths, values, strict=True)))


def along_last(x: Tensor, bias: Tensor | None, text: str, paths: Sequence[str], *values: Tensor) -> Tensor:
    """Any operator on the last axis."""
    return affine(rebuilt(text, paths, values), x, bias)


def along_window(
    x: Tensor, bias: Tensor | None, geometry: Sequence[Sequence[int]], text: str, paths: Sequence[str], *values: Tensor
) -> Tensor:
    """Any operator as the kernel of a convolution; ``geometry`` is kernel, strides, pads and dilations."""
    operator, window = rebuilt(text, paths, values), Window(*(tuple(numbers) for numbers in geometry))
    if window.pointwise:
        axis = -window.rank - 1
        moved = strided(x, window.strides).movedim(axis, -1)
        return affine(operator, moved, bias).movedim(-1, axis).contiguous()
    batched = x if x.ndim == window.rank + 2 else x.unsqueeze(0)
    out = convolve(operator, batched, window)
    if bias is not None:
        out = out + bias.to(out.dtype).reshape(-1, *[1] * window.rank)
    return out if batched is x else out.squeeze(0)
