"""An ONNX graph as an ``nn.Module`` that torch can trace: weights are parameters, sizes are numbers."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import functional as F

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.graphs.onnx.torched import elementwise, layers, shapes  # noqa: F401 - each enters its rules
from lrcompile.graphs.onnx.torched.sizes import Sizes, computed, shape_of
from lrcompile.graphs.onnx.torched.table import RULES

_NUMBERS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,), "Tile": (1,),
    "Pad": (1, 2, 3), "Split": (1,), "ConstantOfShape": (0,), "TopK": (1,), "OneHot": (1,), "CumSum": (1,),
    "Trilu": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceL1": (1,),
    "ReduceL2": (1,), "ReduceSumSquare": (1,), "ReduceLogSumExp": (1,), "ReduceLogSum": (1,),
}  # fmt: skip
"""Operands that the rules take as numbers."""

_STATISTICS = {"BatchNormalization": (3, 4)}
"""Operands that are measured, not trained."""


def refusal(node: ir.Node, reason: str = "torch has no counterpart for it here") -> UnsupportedError:
    """An error that names operator and node."""
    kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    outputs = (value.name for value in node.outputs if value.name)
    return UnsupportedError(f"operator {kind}: {reason}", where=node.name or next(outputs, node.op_type))


class Traceable(nn.Module):
    """Computes a graph's outputs, by name, from its inputs in their order.

    What only depends on constants is computed once, here. A first run tells which constants are read as tensors;
    after :meth:`settle` these are buffers.

    Args:
        graph: without functions; every operator has a rule.
        titles: parameters' names by name of the value.
        measured: what Shape and Size give, where that is the same for all inputs.

    Raises:
        UnsupportedError: an operator without a rule; names operator and node.
    """

    def __init__(self, graph: ir.Graph, titles: Mapping[str, str], measured: Mapping[str, Sizes] | None = None) -> None:
        super().__init__()
        self.outputs = [str(value.name) for value in graph.outputs]
        self.inputs = [str(value.name) for value in graph.inputs if value.name not in graph.initializers]
        self.titles = dict(titles)
        self.known: dict[str, Sizes] = dict(measured or {})
        self.measured: dict[str, Sizes] = {}
        self.held: dict[str, Tensor] = {}
        self.sizes: dict[str, Sizes] = dict(self.known)
        self.read: dict[str, None] = {}
        self.nodes: list[ir.Node] = []
        self._store(graph)
        for node in graph:
            self._enter(node)
        self.forward = self._forward()

    def _store(self, graph: ir.Graph) -> None:
        statistics = {
            str(node.inputs[at].name)  # type: ignore[union-attr]
            for node in graph
            for at in _STATISTICS.get(node.op_type, ())
            if at < len(node.inputs) and node.inputs[at] is not None
        }
        for value, held in _constants(graph):
            name, tensor = str(value.name), to_torch(held).clone()
            if tensor.is_floating_point() and tensor.numel() > 1:
                _register(self, self.titles[name], tensor if name in statistics else nn.Parameter(tensor))
            else:
                self._hold(name, tensor)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.held[name] = tensor
        small = Sizes.of(tensor)
        if small is not None:
            self.sizes[name] = small

    def _enter(self, node: ir.Node) -> None:
        """Computes a node of constants now, and keeps every other one."""
        if node.op_type == "Constant" and not node.domain:
            return
        if (node.domain, node.op_type) not in RULES:
            raise refusal(node)
        if all(str(value.name) in self.known for value in node.outputs):
            return
        names = [str(value.name) for value in node.inputs if value is not None]
        if names and all(name in self.held or name in self.known for name in names):
            self.held.update({name: self.known[name].tensor() for name in names if name not in self.held})
            values = [None if value is None else self.held[str(value.name)] for value in node.inputs]
            for value, result in zip(node.outputs, _apply(node, values), strict=False):
                self._hold(str(value.name), result)
            return
        self.nodes.append(node)

    def settle(self) -> None:
        """Makes buffers of the constants that a run has read as tensors."""
        for name in self.read:
            _register(self, self.titles.get(name) or self._free(name), self.held[name])

    def _free(self, name: str) -> str:
        title = "constants." + "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name)
        while title in self.titles.values():
            title += "_"
        self.titles[name] = title
        return title

    # -- running ---------------------------------------------------------------------------

    def _forward(self) -> Any:
        def forward(*given: Tensor) -> dict[str, Tensor]:
            return self.run(dict(zip(self.inputs, given, strict=True)))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(name, kind) for name in identifiers(self.inputs)]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        return forward

    def run(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name.

        Raises:
            UnsupportedError: an operator is used in a way that is not covered; names operator and node.
        """
        sizes = dict(self.sizes)
        for node in self.nodes:
            self._run(node, values, sizes)
        return {name: self._tensor(name, values, sizes) for name in self.outputs}

    def _run(self, node: ir.Node, values: dict[str, Tensor], sizes: dict[str, Sizes]) -> None:
        names = [None if value is None else str(value.name) for value in node.inputs]
        output = str(node.outputs[0].name)
        if node.op_type in ("Shape", "Size"):
            name = str(names[0])
            sizes[output] = shape_of(node, sizes[name] if name in sizes else self._tensor(name, values, sizes))
            self.measured[output] = sizes[output]
            return
        if all(name is None or name in sizes for name in names):
            small = computed(node, [None if name is None else sizes[name] for name in names])
            if small is not None:
                sizes[output] = small
                return
        for value, result in zip(node.outputs, self._results(node, names, values, sizes), strict=False):
            values[str(value.name)] = result

    def _results(
        self, node: ir.Node, names: Sequence[str | None], values: dict[str, Tensor], sizes: dict[str, Sizes]
    ) -> tuple[Any, ...]:
        if node.op_type == "Range" and all(name in sizes for name in names):
            start, limit, step = (sizes[str(name)] for name in names)
            items = [each.items.reshape(-1)[0] for each in (start, limit, step)]
            return (torch.arange(*items, dtype=start.dtype),)
        if node.op_type == "Gather" and not node.domain:
            return (self._gathered(node, names, values, sizes),)
        numbers = _NUMBERS.get(node.op_type, ())
        operands = [
            None if name is None
            else sizes[name].items if at in numbers and name in sizes
            else self._tensor(name, values, sizes)
            for at, name in enumerate(names)
        ]  # fmt: skip
        return _apply(node, operands)

    def _gathered(
        self, node: ir.Node, names: Sequence[str | None], values: dict[str, Tensor], sizes: dict[str, Sizes]
    ) -> Tensor:
        """A lookup as an embedding, and one place as a plain selection."""
        data, which = str(names[0]), str(names[1])
        x = self._tensor(data, values, sizes)
        axis = node.attributes.get_int("axis", 0) % x.ndim
        if which in sizes and not sizes[which].items.ndim:
            return x.select(axis, sizes[which].items.item())
        indices = self._tensor(which, values, sizes)
        if data in self.titles and x.ndim == 2 and axis == 0 and x.is_floating_point():
            return F.embedding(torch.where(indices < 0, indices + x.shape[0], indices), x)
        return _apply(node, [x, indices])[0]

    def _tensor(self, name: str, values: dict[str, Tensor], sizes: dict[str, Sizes]) -> Tensor:
        if name not in values:
            if name in self.titles and (found := _find(self, self.titles[name])) is not None:
                values[name] = found
            elif name in self.held:
                self.read[name] = None
                values[name] = self.held[name]
            else:
                values[name] = sizes[name].tensor()
        return values[name]


def identifiers(names: Sequence[str]) -> list[str]:
    """Names of inputs as Python takes them, which most are."""
    found: list[str] = []
    for name in names:
        plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in name)
        plain = plain if plain[:1].isidentifier() else f"_{plain}"
        plain = f"{plain}_" if keyword.iskeyword(plain) or plain == "self" else plain
        while plain in found:
            plain += "_"
        found.append(plain)
    return found


def stored(graph: ir.Graph) -> list[str]:
    """Names of a graph's constants."""
    return [str(value.name) for value, _ in _constants(graph)]


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants, and inputs that have a default: a program has no optional inputs."""
    for value in graph.initializers.values():
        if value.const_value is not None and (value.uses() or value.is_graph_output()):
            yield value, value.const_value
    for node in graph:
        if (node.domain, node.op_type) == ("", "Constant"):
            held = constant(node.outputs[0])
            if held is None:
                raise refusal(node, "neither numbers nor a tensor")
            yield node.outputs[0], held


def _apply(node: ir.Node, given: Sequence[Any]) -> tuple[Any, ...]:
    while given and given[-1] is None:
        given = given[:-1]
    try:
        result = RULES[node.domain, node.op_type](node, *given)
    except GuardOnDataDependentSymNode as error:
        raise refusal(node, "a size depends on values, not on sizes") from error
    except (NotImplementedError, RuntimeError, TypeError, IndexError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise refusal(node, reason) from error
    results = result if isinstance(result, tuple | list) else (result,)
    if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
        raise refusal(node, f"{len(node.outputs)} outputs")
    return tuple(results)


def _register(root: nn.Module, title: str, tensor: Tensor) -> None:
    *path, last = title.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root._parameters[last] = tensor
    else:
        root.register_buffer(last, tensor)


def _find(root: nn.Module, title: str) -> Tensor | None:
    *path, last = title.split(".")
    for part in path:
        if part not in root._modules:
            return None
        root = root._modules[part]  # type: ignore[assignment]
    found = root._parameters.get(last)
    return root._buffers.get(last) if found is None else found
