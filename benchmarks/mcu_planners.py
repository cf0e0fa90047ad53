"""Memory planning of two other projects, re-stated from their published sources, and what an ONNX file asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx

from lrcompile.dataflow.planner import ALIGN, Request

CONSTANT = {"Constant", "ConstantOfShape"}


@dataclass(frozen=True)
class Buffer:
    """A computed value of a graph: the node that makes it and the last one that reads it."""

    name: str
    size: int
    first: int
    last: int

    def request(self) -> Request:
        """The same for the planner, rounded up to its alignment."""
        return Request(-(-self.size // ALIGN) * ALIGN, self.first, self.last)


def buffers(model: onnx.ModelProto) -> list[Buffer]:
    """One buffer per value that a node makes at run time; neither constants nor the graph's inputs and outputs.

    Raises:
        ValueError: a value without a static shape.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes = {info.name: _size(info) for info in graph.value_info}
    still = {tensor.name for tensor in graph.initializer}
    outputs = {info.name for info in graph.output}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, node in enumerate(graph.node):
        for name in node.input:
            last[name] = at
        if node.op_type in CONSTANT and all(name in still for name in node.input):
            still.update(node.output)
            continue
        read = [name for name in node.output if name in sizes]  # what has no type is an output that nobody asked for
        first.update((name, at) for name in read if name not in outputs)
    return [Buffer(name, sizes[name], at, max(at, last.get(name, at))) for name, at in first.items()]


def _size(info: onnx.ValueInfoProto) -> int:
    kind = info.type.tensor_type
    if any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        raise ValueError(f"{info.name} has no static shape")
    item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return item * prod(dim.dim_value for dim in kind.shape.dim)


def tflm(requests: Sequence[Request]) -> int:
    """Bytes of TensorFlow Lite Micro's ``GreedyMemoryPlanner``: by falling size, into the first gap in time."""
    placed: list[tuple[int, Request]] = []
    for each in sorted(requests, key=lambda request: -request.size):
        offset = 0
        for start, other in sorted((entry for entry in placed if entry[1].meets(each)), key=lambda entry: entry[0]):
            if start >= offset + each.size:
                break
            offset = max(offset, start + other.size)
        placed.append((offset, each))
    return max((offset + each.size for offset, each in placed), default=0)


def onnx2c(values: Sequence[Buffer]) -> list[int]:
    """Bytes of onnx2c's unions: a value takes the first union that is free, which grows to the largest of its values.

    An output gets its union before the inputs of its node give theirs back.
    """
    unions: list[int] = []
    busy: dict[int, Buffer] = {}
    for each in sorted(values, key=lambda value: value.first):
        for at in [at for at, other in busy.items() if other.last < each.first]:
            del busy[at]
        free = next((at for at in range(len(unions)) if at not in busy), len(unions))
        if free == len(unions):
            unions.append(0)
        unions[free] = max(unions[free], each.size)
        busy[free] = each
    return unions
