"""What no runtime needs, taken out of a copy of the model.

Only the main graph is cleaned, and of its nodes only those of the standard operator set are merged:
what an unknown operator does, nobody knows. (onnx_ir's passes for identities and repeated expressions
may leave a body that returns an outer value, and merge two draws of a random number.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from lrcompile.graphs.onnx.constants import constant

RANDOM = frozenset(
    ["Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)
SMALL = 16
"""Constant nodes with at most this many elements are compared by value."""


def cleaned(model: ir.Model) -> tuple[ir.Model | None, str]:
    """A model without unused or repeated parts, and what went; None where nothing can go, and why.

    Names and types of inputs and outputs stay.
    """
    clone = model.clone()
    before, ends = _size(clone), signature(clone)
    _drop_identities(clone.graph)
    _merge_weights(clone.graph)
    _merge_nodes(clone.graph)
    RemoveUnusedNodesPass()(clone)
    RemoveUnusedFunctionsPass()(clone)
    after = _size(clone)
    if after == before:
        return None, "nothing is unused or repeated"
    if signature(clone) != ends:
        return None, "cleaning would change an input or output"
    parts = zip(before, after, ("nodes", "weights"), strict=True)
    return clone, "removed " + ", ".join(f"{old - new} {what}" for old, new, what in parts if old != new)


def _drop_identities(graph: ir.Graph) -> None:
    for node in list(graph):
        if (node.domain, node.op_type) != ("", "Identity") or node.inputs[0] is None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        producer = source.producer()
        if result.is_graph_output():
            if producer is None or source.is_graph_output():
                continue  # an input, a weight or another output keeps its own name
            name = result.name
            _replace(result, source)
            result.name, source.name = f"{name}/identity", name
        else:
            _replace(result, source)
        graph.remove(node, safe=True)


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.type = new.type or old.type
    if new.shape is None or (old.is_graph_output() and old.shape is not None):
        new.shape = old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _merge_weights(graph: ir.Graph) -> None:
    """Initializers with equal content become one; only those of equal type and shape are read."""
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = constant(value)
        if tensor is not None and tensor.dtype != ir.DataType.STRING and not value.is_graph_output():
            groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for group in groups.values():
        _merge_equal(graph, group)


def _merge_equal(graph: ir.Graph, group: Iterable[ir.Value]) -> None:
    group = list(group)
    if len(group) < 2:
        return
    known: dict[bytes, ir.Value] = {}
    for value in group:
        tensor = constant(value)
        first = value if tensor is None else known.setdefault(hashlib.sha256(tensor.tobytes()).digest(), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[str(value.name)]


def _merge_nodes(graph: ir.Graph) -> None:
    """Nodes that compute the same from the same become one."""
    known: dict[Hashable, ir.Node] = {}
    for node in list(graph):
        key = _computation(node)
        first = node if key is None else known.setdefault(key, node)
        if first is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            _replace(old, new)
        graph.remove(node, safe=True)


def _computation(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None where that cannot be said."""
    if node.domain or node.op_type in RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        content = _content(attribute)
        if content is None:
            return None
        attributes.append((name, attribute.type, content))
    named = tuple(bool(value.name) for value in node.outputs)
    return node.op_type, tuple(node.inputs), named, tuple(attributes)


def _content(attribute: ir.Attr) -> Hashable | None:
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
        return attribute.value
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return tuple(attribute.value)
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype != ir.DataType.STRING and tensor.size <= SMALL:
            return tensor.dtype, tuple(tensor.shape), tensor.tobytes()
    return None


def _size(model: ir.Model) -> tuple[int, int]:
    return sum(1 for _ in model.graph.all_nodes()), len(model.graph.initializers)


def signature(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    """Names, types and shapes of a model's inputs and outputs."""
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
