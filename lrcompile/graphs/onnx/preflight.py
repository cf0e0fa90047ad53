"""Cheap checks of a parsed model, made before any tool that such a model could hang, crash or mislead.

Nothing is expanded, inferred or read: the work is linear in the size of the file.
"""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.storage import Limits, Storage, check_dims

Key = tuple[str, str, str]
Nodes = Sequence[onnx.NodeProto]


def preflight(proto: onnx.ModelProto, folder: Path, limits: Limits) -> bool:
    """Checks a model; returns whether all its nodes stand in topological order.

    Args:
        proto: the parsed model, data still external.
        folder: where the model lies; external data must lie there, too.
        limits: what a model may declare.

    Raises:
        InvalidInputError: corrupt, unsafe, cyclic or not in single static assignment form.
        UnsupportedError: above the limits, or of a later version of ONNX.
    """
    _check_versions(proto)
    functions = _functions(proto)
    _check_expansion(proto, functions, limits)
    walk = _Walk(Storage(folder, limits), limits)
    walk.graph(proto.graph, (), 0, "")
    for function in functions.values():
        walk.function(function)
    return walk.sorted


def node_label(node: onnx.NodeProto) -> str:
    """What to call a node in a message: its name, or what it computes."""
    return node.name or f"{node.op_type} -> {next((name for name in node.output if name), '?')}"


def _check_versions(proto: onnx.ModelProto) -> None:
    if proto.ir_version <= 0 or not proto.HasField("graph"):
        raise InvalidInputError("not an ONNX model: no version or no graph", hint="the file may be truncated")
    if proto.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"ONNX IR version {proto.ir_version}, at most {onnx.IR_VERSION} is known", hint="update the package onnx"
        )
    if proto.ir_version >= 3 and not proto.opset_import:
        raise InvalidInputError("the model imports no operator set", hint="the file may be truncated")
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise UnsupportedError(f"opset {opset.version}, at most {newest} is known", hint="update the package onnx")


def _key(domain: str, name: str, overload: str) -> Key:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _functions(proto: onnx.ModelProto) -> dict[Key, onnx.FunctionProto]:
    found: dict[Key, onnx.FunctionProto] = {}
    for function in proto.functions:
        key = _key(function.domain, function.name, function.overload)
        if key in found:
            raise InvalidInputError("function is defined twice", where=f"{key[0]}::{key[1]}")
        found[key] = function
    return found


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nested(nodes: Iterable[onnx.NodeProto], limits: Limits, depth: int = 0) -> Iterator[onnx.NodeProto]:
    if depth > limits.depth:
        raise UnsupportedError(f"subgraphs are nested more than {limits.depth} deep")
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _nested(graph.node, limits, depth + 1)


def _check_expansion(proto: onnx.ModelProto, functions: dict[Key, onnx.FunctionProto], limits: Limits) -> None:
    """Counts nodes as if every function call were inlined: from the leaves up, each function once."""
    calls: dict[Key, Counter[Key]] = {}
    size: dict[Key, int] = {}
    main: Key = ("", "", "")
    for key, body in [(main, proto.graph.node), *((key, function.node) for key, function in functions.items())]:
        operators = Counter(_key(node.domain, node.op_type, node.overload) for node in _nested(body, limits))
        calls[key] = Counter({name: count for name, count in operators.items() if name in functions})
        size[key] = operators.total()
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        names = " -> ".join(key[1] for key in error.args[1])
        raise InvalidInputError(f"function calls itself: {names}", where=error.args[1][0][1]) from None
    for key in order:
        size[key] += sum(count * size[callee] for callee, count in calls[key].items())
        if size[key] > limits.nodes:
            raise UnsupportedError(
                f"more than {limits.nodes} nodes once functions are expanded", where=key[1] or proto.graph.name
            )


@dataclass
class _Scope:
    """The names of one graph: all that it ever defines, and those defined so far."""

    every: set[str]
    seen: set[str]
    forward: bool = False  # something is used before it is defined


@dataclass
class _Walk:
    storage: Storage
    limits: Limits
    sorted: bool = field(default=True)

    def graph(self, graph: onnx.GraphProto, outer: tuple[_Scope, ...], depth: int, where: str) -> None:
        if depth > self.limits.depth:
            raise UnsupportedError(f"subgraphs are nested more than {self.limits.depth} deep", where=where)
        if graph.sparse_initializer:
            raise UnsupportedError("sparse initializers are not supported", where=where or graph.name)
        for info in [*graph.input, *graph.output, *graph.value_info]:
            self._type(info.type, info.name)
        for tensor in graph.initializer:
            if not tensor.name:
                raise InvalidInputError("initializer without a name", where=where or graph.name)
            self.storage.check(tensor, tensor.name)
        inputs = [info.name for info in graph.input]
        initializers = [tensor.name for tensor in graph.initializer]
        outputs = [info.name for info in graph.output]
        for names, kind in ((inputs, "input"), (initializers, "initializer"), (outputs, "output")):
            _unique(names, kind, where)
        self._body(graph.node, {*inputs, *initializers}, outputs, outer, depth)

    def function(self, function: onnx.FunctionProto) -> None:
        where = f"{function.domain}::{function.name}"
        _unique(function.input, "input", where)
        _unique(function.output, "output", where)
        for info in function.value_info:
            self._type(info.type, info.name)
        for attribute in function.attribute_proto:
            self._attribute(attribute, (), 0, where)
        self._body(function.node, set(function.input), function.output, (), 0)

    def _body(
        self, nodes: Nodes, given: set[str], outputs: Sequence[str], outer: tuple[_Scope, ...], depth: int
    ) -> None:
        makers = _makers(nodes, given, outer)
        scope = _Scope(given | makers.keys(), set(given))
        scopes = (*outer, scope)
        for node in nodes:
            for name in node.input:
                _look_up(name, scopes, node)
            for attribute in node.attribute:
                self._attribute(attribute, scopes, depth, node_label(node))
            scope.seen.update(node.output)
        for name in outputs:
            if name not in scope.every:
                raise InvalidInputError("graph output is computed by no node of its graph", where=name)
        if scope.forward:
            self.sorted = False
            _check_acyclic(nodes, makers)

    def _attribute(self, attribute: onnx.AttributeProto, scopes: tuple[_Scope, ...], depth: int, where: str) -> None:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise UnsupportedError("sparse tensors are not supported", where=where)
        for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
            self.storage.check(tensor, tensor.name or where)
        for type_ in [*([attribute.tp] if attribute.HasField("tp") else []), *attribute.type_protos]:
            self._type(type_, where)
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            self.graph(graph, scopes, depth + 1, where)

    def _type(self, type_: onnx.TypeProto, where: str) -> None:
        kind = type_.WhichOneof("value")
        if kind in ("tensor_type", "sparse_tensor_type"):
            dims = [dim.dim_value for dim in getattr(type_, kind).shape.dim if dim.HasField("dim_value")]
            check_dims(dims, self.limits, where)
        elif kind in ("sequence_type", "optional_type"):
            self._type(getattr(type_, kind).elem_type, where)
        elif kind == "map_type":
            self._type(type_.map_type.value_type, where)


def _unique(names: Iterable[str], kind: str, where: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidInputError(f"{kind} name occurs {count} times", where=f"{where}: {name}" if where else name)


def _makers(nodes: Nodes, given: set[str], outer: tuple[_Scope, ...]) -> dict[str, int]:
    """Which node makes which value; every value is made once, and hides none that stands outside."""
    makers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if not name:
                continue
            if name in makers or name in given or any(name in scope.seen for scope in outer):
                raise InvalidInputError(f"value '{name}' is defined twice", where=node_label(node))
            makers[name] = index
    return makers


def _look_up(name: str, scopes: tuple[_Scope, ...], node: onnx.NodeProto) -> None:
    if not name:
        return
    for scope in reversed(scopes):
        if name in scope.every:
            scope.forward |= name not in scope.seen
            return
    raise InvalidInputError(f"input '{name}' is defined nowhere", where=node_label(node))


def _uses(node: onnx.NodeProto) -> set[str]:
    """The values a node reads, those read only inside its subgraphs too."""
    names = set(node.input)
    for graph in _subgraphs(node):
        own = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
        own.update(name for inner in graph.node for name in inner.output)
        names |= {name for inner in graph.node for name in _uses(inner)} - own
    return names


def _check_acyclic(nodes: Nodes, makers: dict[str, int]) -> None:
    edges = {index: {makers[name] for name in _uses(node) if name in makers} for index, node in enumerate(nodes)}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        names = " -> ".join(node_label(nodes[index]) for index in error.args[1][:8])
        raise InvalidInputError(f"the graph has a cycle: {names}", where=names.split(" -> ")[0]) from None
