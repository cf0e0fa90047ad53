"""Memory planning of others, stated again: TensorFlow Lite Micro's greedy planner and onnx2c's unions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from lrcompile.dataflow.planner import Request


@dataclass(frozen=True)
class Tensor:
    """A computed tensor: bytes, the node that makes it and the last one that reads it."""

    name: str
    size: int
    first: int
    last: int


def tensors(model: onnx.ModelProto) -> list[Tensor]:
    """What the nodes of a model compute, in their order; outputs of the model belong to the caller."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {value.name: _bytes(value) for value in (*graph.value_info, *graph.output)}
    constants = {each.name for each in graph.initializer}
    outputs = {value.name for value in graph.output}
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    last = {name: at for at, node in enumerate(nodes) for name in node.input}
    return [
        Tensor(name, sizes[name], at, last[name])
        for at, node in enumerate(nodes)
        for name in node.output
        if name in last and name not in outputs and name not in constants
    ]


def _bytes(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    dims = [each.dim_value for each in kind.shape.dim]
    return int(np.prod(dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize


def requests(found: Sequence[Tensor]) -> list[Request]:
    """The same as requests of a planner."""
    return [Request(each.size, each.first, each.last) for each in found]


def tflm(found: Sequence[Request]) -> int:
    """Bytes of the arena: by descending size, each at the first gap among those alive at the same time."""
    placed: list[tuple[int, Request]] = []
    for each in sorted(found, key=lambda request: -request.size):
        offset = 0
        for start, other in sorted((pair for pair in placed if pair[1].meets(each)), key=lambda pair: pair[0]):
            if start - offset >= each.size:
                break
            offset = max(offset, start + other.size)
        placed.append((offset, each))
    return max((offset + each.size for offset, each in placed), default=0)


def onnx2c(found: Sequence[Tensor]) -> int:
    """Bytes of all unions: a tensor goes to the first free one, which grows to its largest member."""
    unions: list[int] = []
    until: list[int] = []  # the last step at which each union is taken
    for each in found:
        free = next((at for at, last in enumerate(until) if last < each.first), None)
        if free is None:
            unions.append(0)
            until.append(0)
            free = len(unions) - 1
        unions[free], until[free] = max(unions[free], each.size), each.last
    return sum(unions)
