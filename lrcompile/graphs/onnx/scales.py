"""Constant scales before linear layers, multiplied into the weights that read them, on a copy of the model."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.constants import FLOATS, constant
from lrcompile.graphs.onnx.tensors import VAST, from_torch, to_torch


def folded_scales(model: ir.Model) -> tuple[ir.Model | None, list[str], str]:
    """A copy without the scales that only linear layers read, the names of their nodes; else None, and why.

    The scaled weights are new ones, so a model of :data:`VAST` bytes or more is left alone.
    """
    weights = [constant(value) for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in weights if tensor is not None) >= VAST:
        return None, [], "the model is too large to hold new weights in memory"
    clone = model.clone()
    done = [str(node.name) for node in list(clone.graph) if _fold(clone.graph, node)]
    if not done:
        return None, [], "no scale is read by linear layers alone"
    for name, value in list(clone.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del clone.graph.initializers[name]
    return clone, done, ""


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    """Takes a Mul out of the graph where its scale can go into every weight that reads the product."""
    if (node.domain, node.op_type) != ("", "Mul") or node.outputs[0].is_graph_output():
        return False
    source, scale = _parts(node)
    users = [(user, index) for user, index in node.outputs[0].uses()]
    if source is None or scale is None or not users or not all(index == 0 for _, index in users):
        return False
    if not _covers(source, scale):
        return False
    scaled: dict[int, tuple[ir.Value, Tensor]] = {}
    for user, _ in users:
        found = _weight(graph, user, {id(other) for other, _ in users})
        new = None if found is None else _scaled(*found, scale)
        if found is None or new is None:
            return False
        scaled[id(found[0])] = (found[0], new)
    for value, new in scaled.values():
        value.const_value = from_torch(new, value.name)
    for user, index in users:
        user.replace_input_with(index, source)
    graph.remove(node, safe=True)
    return True


def _parts(node: ir.Node) -> tuple[ir.Value | None, Tensor | None]:
    """The value and the constant that a Mul multiplies."""
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        tensor = constant(other)
        if tensor is not None and tensor.dtype in FLOATS and constant(value) is None:
            return value, to_torch(tensor)
    return None, None


def _covers(source: ir.Value, scale: Tensor) -> bool:
    """Whether the scale is one number, or one for each channel of a value that has so many."""
    if scale.ndim == 0 or tuple(scale.shape) == (1,):
        return True
    return scale.ndim == 1 and source.shape is not None and len(source.shape) > 0 and source.shape[-1] == len(scale)


def _weight(graph: ir.Graph, user: ir.Node, readers: set[int]) -> tuple[ir.Value, bool] | None:
    """The stored matrix that a node multiplies with, and whether it is (out, in); None where others read it."""
    attributes = user.attributes
    plain = (user.domain, user.op_type) == ("", "MatMul")
    gemm = (user.domain, user.op_type) == ("", "Gemm") and not attributes.get_int("transA", 0)
    value = user.inputs[1] if (plain or gemm) and user.graph is graph and len(user.inputs) > 1 else None
    tensor = constant(value)
    if value is None or tensor is None or str(value.name) not in graph.initializers or value.is_graph_output():
        return None
    alone = all(id(other) in readers and index == 1 for other, index in value.uses())
    if not alone or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        return None
    return value, bool(gemm and attributes.get_int("transB", 0))


def _scaled(value: ir.Value, turned: bool, scale: Tensor) -> Tensor | None:
    """The weight with its inputs scaled; None where its type cannot hold that."""
    tensor = constant(value)
    if tensor is None:
        return None
    weight, factors = to_torch(tensor), scale.double().reshape(-1)
    if len(factors) not in (1, weight.shape[1 if turned else 0]):
        return None
    exact = weight.double() * (factors if turned else factors[:, None])
    found = exact.to(weight.dtype)
    noise = 2 * torch.finfo(weight.dtype).eps * float(exact.norm())
    return found if bool(found.isfinite().all()) and float((found.double() - exact).norm()) <= noise else None
