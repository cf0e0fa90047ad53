"""Values of a graph that do not depend on its inputs: stored tensors, their views, and what is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx


class Constants:
    """The constant nodes of a flat graph, and their values.

    A stored tensor that something writes to is no constant. What is only a view of a stored tensor takes no memory.

    Args:
        module: of :func:`lrcompile.graphs.fx.flat.flat`; its own tensors are used, not copied.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._values: dict[fx.Node, Any] = {}
        self.nodes: set[fx.Node] = set()
        mutable = written(module.graph)
        for node in module.graph.nodes:
            if (node.op == "get_attr" and node not in mutable and isinstance(self._stored(node), Tensor)) or (
                node.op == "call_function"
                and node not in mutable
                and node.all_input_nodes
                and all(each in self.nodes for each in node.all_input_nodes)
                and pure(node.target)
            ):
                self.nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def value(self, node: fx.Node) -> Any:
        """What a constant node holds."""
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = self._stored(node)
            else:
                args = fx.map_arg(node.args, self.value)
                kwargs = fx.map_arg(node.kwargs, self.value)
                target: Any = node.target
                with torch.no_grad():
                    self._values[node] = target(*args, **kwargs)
        return self._values[node]

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor of a constant node; None for anything else."""
        if not isinstance(node, fx.Node) or node not in self.nodes:
            return None
        value = self.value(node)
        return value if isinstance(value, Tensor) else None

    def roots(self, node: fx.Node) -> Iterator[fx.Node]:
        """The stored tensors that a constant is made from."""
        if node.op == "get_attr":
            yield node
        for each in node.all_input_nodes:
            yield from self.roots(each)

    def _stored(self, node: fx.Node) -> Any:
        found: Any = self.module
        for name in str(node.target).split("."):
            found = getattr(found, name, None)
        return found


def pure(target: Any) -> bool:
    """Whether an operation gives the same result each time and writes nothing."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are written to, and what they are views of."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in found:
            found.update(_aliased(node, write=None))
        found.update(_aliased(node, write=True))
    return found


def _aliased(node: fx.Node, *, write: bool | None) -> Iterator[fx.Node]:
    """Operands that the result may be a view of (``write`` None), or that are written to (True)."""
    if node.target is operator.getitem:
        if write is None:
            yield from node.all_input_nodes[:1]
    elif node.target is torch.ops.aten.batch_norm.default:  # its schema does not tell
        if write and len(node.args) > 5 and node.args[5]:
            yield from (value for value in node.args[3:5] if isinstance(value, fx.Node))
    elif isinstance(node.target, torch._ops.OpOverload):
        for index, argument in enumerate(node.target._schema.arguments):
            info = argument.alias_info
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if info is not None and (write is None or info.is_write):
                yield from (value,) if isinstance(value, fx.Node) else ()
