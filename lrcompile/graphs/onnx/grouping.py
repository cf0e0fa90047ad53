"""Which matches are one site, and what the passes are told about it."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from lrcompile.graphs.onnx.constants import constant, origin
from lrcompile.graphs.onnx.match import Match, describe, path_dtype
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import structure, tensors
from lrcompile.sites import LinearSite, Use

OLDEST = 7
"""The operator set from which on Add and Mul broadcast as they do today."""


def group_key(match: Match) -> tuple:
    """Equal for matches with the same leaves in the same structure."""
    places = tuple((tensor.data_ptr(), tensor.stride()) for _, tensor in tensors(match.operator))
    return (structure(match.operator), places, None if match.window is None else match.window.kernel)


def site_of(name: str, matches: list[Match], opset: int) -> LinearSite:
    """The site that these matches are."""
    first = matches[0]
    uses = tuple(Use(match.nodes[-1].name or str(match.root.name), _reading(match), _bias(match)) for match in matches)
    kind = describe(first)
    return LinearSite(name, first.operator, uses, first.window, kind, _frozen(matches, opset))


def _reading(match: Match) -> str:
    """What a match multiplies: a value, and which of its vectors where those are not the rows along its last axis."""
    name = str(match.source.name)
    if match.window is None:
        return name if match.axis == -1 else f"{name} (columns)"
    geometry = str(match.window)
    return f"{name} (channels, {geometry})" if geometry else f"{name} (channels)"


def _bias(match: Match) -> Tensor | None:
    """The constant vector (out,) that a match adds, where it adds one."""
    if match.bias is None:
        return None if match.offset is None else match.offset.to(path_dtype(match))
    tensor, size = constant(match.bias), match.operator.shape[0]
    if tensor is None or (tensor.size != 1 and (tensor.size != size or tensor.shape[-1] != size)):
        return None
    values = to_torch(tensor).reshape(-1).expand(size)
    values = values if match.beta == 1.0 else values * match.beta
    return values if match.offset is None else (values.double() + match.offset).to(values.dtype)


def _frozen(matches: list[Match], opset: int) -> str:
    """Why the site must stay: somebody else reads a stored matrix of it, or new nodes cannot be written."""
    refused = next((match.refused for match in matches if match.refused), "")
    if refused:
        return refused
    if opset < OLDEST:
        return f"operators of opset {opset} cannot be written, those of {OLDEST} and later can"
    nodes = {id(node) for match in matches for node in match.nodes}
    for match in matches:
        for node in match.nodes:
            for value in node.inputs[:2]:
                stored = None if value is None else origin(value)[0]
                tensor = constant(stored)
                outsider = "" if tensor is None or len(tensor.shape) < 2 else _outside_reader(stored, nodes)
                if outsider:
                    return outsider
    return ""


def _outside_reader(stored: ir.Value | None, nodes: set[int]) -> str:
    """Who else reads a stored matrix, directly or turned."""
    waiting = [] if stored is None else [stored]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return "its weight is an output of the model"
        for user, index in value.uses():
            if id(user) in nodes:
                continue
            if user.op_type in ("Transpose", "Identity") and not user.domain:
                waiting.extend(user.outputs)
            elif user.op_type == "Gather" and index == 0:
                return f"its weight is also read row by row, as an embedding, by {user.name or user.op_type}"
            else:
                return f"its weight is also read by {user.name or user.op_type}"
    return ""
