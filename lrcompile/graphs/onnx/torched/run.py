"""Runs an ONNX graph with torch, node by node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.observe import tensor_of
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.graphs.onnx.torched import elementwise, layers, shapes  # noqa: F401 - each enters its rules
from lrcompile.graphs.onnx.torched.table import RULES, wide

FLAT_SOFTMAX = 13
"""Before this version of the operator set a softmax took all axes from its own on as one."""


class Tap(NamedTuple):
    """A place that gradients reach; the value there is free as soon as nothing reads it."""

    edge: GradientEdge
    shape: torch.Size

    @classmethod
    def of(cls, value: Tensor) -> Tap:
        """The place of a value that has a gradient."""
        return cls(get_gradient_edge(value), value.shape)


class TorchRun:
    """A model that torch can differentiate; floats of less than 32 bits are computed in float32.

    Raises:
        UnsupportedError: an operator that is not in the table; it is named.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = InlinePass()(model.clone()).model if model.functions else model
        graph = self.model.graph
        missing = sorted({_name(node) for node in graph if not _known(node, self.model)})
        if missing:
            raise UnsupportedError(f"gradients of {', '.join(missing)} are not available")
        self._outputs = [str(value.name) for value in graph.outputs]
        self._constants: dict[str, Tensor] = {}
        for name, value in graph.initializers.items():
            tensor = constant(value)
            if tensor is not None:
                self._constants[name] = wide(to_torch(tensor))
        self._last = _last_uses(graph, set(self._outputs) | self._constants.keys())

    def __call__(self, feeds: Inputs, taps: Sequence[str] = ()) -> tuple[dict, dict[str, Tap]]:
        """Outputs, and the places to differentiate by, both by name.

        Args:
            taps: names of values.

        Raises:
            UnsupportedError: an operator is used in a way that is not covered; names the node.
        """
        wanted = set(taps)
        found: dict[str, Tap] = {}
        odd = next((name for name, array in feeds.items() if array.dtype.kind not in "fiub"), None)
        if odd is not None:
            raise UnsupportedError("torch computes nothing with this type", where=odd)
        values: dict[str, Any] = {**self._constants, **{name: wide(tensor_of(array)) for name, array in feeds.items()}}
        for node in self.model.graph:
            given = [None if value is None else values[str(value.name)] for value in node.inputs]
            results = _apply(node, given)
            if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
                raise UnsupportedError(
                    f"gradients of {_name(node)} with {len(node.outputs)} outputs", where=str(node.name)
                )
            for value, result in zip(node.outputs, results, strict=False):
                name = str(value.name)
                if name in wanted:
                    result = result if result.requires_grad else result.detach().requires_grad_()
                    found[name] = Tap.of(result)
                values[name] = result
            for name in self._last.get(node, ()):
                values.pop(name, None)
        return {name: values[name] for name in self._outputs}, found


def _name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _known(node: ir.Node, model: ir.Model) -> bool:
    old = (model.opset_imports.get("") or 0) < FLAT_SOFTMAX and node.op_type in ("Softmax", "LogSoftmax")
    return (node.domain, node.op_type) in RULES and not old


def _apply(node: ir.Node, given: Sequence[Any]) -> tuple[Any, ...]:
    while given and given[-1] is None:
        given = given[:-1]
    try:
        result = RULES[node.domain, node.op_type](node, *given)
    except (NotImplementedError, RuntimeError, TypeError, IndexError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnsupportedError(f"gradients of {_name(node)}: {reason}", where=str(node.name or node.op_type)) from error
    return result if isinstance(result, tuple) else (result,)


def _last_uses(graph: ir.Graph, kept: Iterable[str]) -> dict[ir.Node, list[str]]:
    """For every node: the values that nothing reads after it."""
    keep = set(kept)
    seen: set[str] = set()
    last: dict[ir.Node, list[str]] = {}
    for node in reversed(graph):
        names = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        for name in dict.fromkeys(names):
            if name not in seen and name not in keep:
                last.setdefault(node, []).append(name)
            seen.add(name)
    return last
