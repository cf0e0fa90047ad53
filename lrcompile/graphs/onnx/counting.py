"""Multiply–accumulates of a whole ONNX graph for one sample, from the shapes that a run has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from lrcompile.errors import LrcompileError
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.session import Session

Shape = tuple[int, ...]


def macs(model: ir.Model, sample: Mapping[str, np.ndarray]) -> int:
    """Multiply–accumulates of all MatMul, Gemm, Conv and attention nodes on one sample.

    Args:
        sample: inputs with a leading axis of 1; they give the dynamic dimensions.

    A model that does not run is counted by inferred shapes; a node whose shapes are not known then counts
    nothing, as do element-wise operators.
    """
    try:
        shapes = _measured(model, sample)
    except LrcompileError:
        shapes = _inferred(model, {name: array.shape for name, array in sample.items()})
    total = 0
    for node in model.graph:
        rule = _RULES.get((node.domain, node.op_type))
        operands = [shapes.get(value.name or "") if value is not None else None for value in node.inputs]
        output = shapes.get(node.outputs[0].name or "")
        if rule is not None and output is not None:
            total += rule(node, operands, output)
    return total


def _measured(model: ir.Model, sample: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """Shapes of what the counted nodes read and write: a run whose outputs are shapes only."""
    graph = model.graph.clone()
    wanted: dict[str, ir.Value] = {}
    for node in graph:
        if (node.domain, node.op_type) in _RULES:
            wanted.update((str(v.name), v) for v in (*node.inputs, *node.outputs) if v is not None and v.name)
    found: dict[str, Shape] = {}
    outputs: dict[str, str] = {}
    graph.outputs.clear()
    for index, (name, value) in enumerate(wanted.items()):
        tensor = constant(value)
        if tensor is not None:
            found[name] = tuple(tensor.shape.numpy())
            continue
        shape = ir.Node("", "Shape", [value], name=f"(shape {index})")
        shape.outputs[0].name = f"(shape {index})"
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        graph.append(shape)
        graph.outputs.append(shape.outputs[0])
        outputs[f"(shape {index})"] = name
    if outputs:
        result = Session(graph, model).run(sample)
        found.update((outputs[key], tuple(int(size) for size in array)) for key, array in result.items())
    return found


def _inferred(model: ir.Model, given: Mapping[str, Shape]) -> dict[str, Shape]:
    """Static shapes of all values, by onnx's inference on a model without its large weights."""
    graph = model.graph.clone()
    for name, value in list(graph.initializers.items()):
        tensor = constant(value)
        if tensor is not None and tensor.size > 1024:
            value.type, value.shape, value.const_value = (
                ir.TensorType(tensor.dtype),
                ir.Shape(tensor.shape.numpy()),
                None,
            )
            del graph.initializers[name]
            graph.inputs.append(value)
    for value in graph.inputs:
        if value.name is not None and value.name in given:
            value.shape = ir.Shape(given[value.name])
    for node in graph:
        for value in node.outputs:
            value.shape = None  # names of dynamic dimensions would stand in the way of their values
    functions = [function.clone() for function in model.functions.values()]
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version, functions=functions))
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, Shape] = {name: tuple(tensor.shape.numpy()) for name, tensor in _constants(model).items()}
    for info in (*inferred.value_info, *inferred.input, *inferred.output):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[info.name] = tuple(dim.dim_value for dim in dims)
    return found


def _constants(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    pairs = ((str(name), constant(value)) for name, value in model.graph.initializers.items())
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _matmul(node: ir.Node, operands: list[Shape | None], output: Shape) -> int:
    left = operands[0]
    return math.prod(output) * left[-1] if left else 0


def _gemm(node: ir.Node, operands: list[Shape | None], output: Shape) -> int:
    left = operands[0]
    return math.prod(output) * left[0 if node.attributes.get_int("transA", 0) else 1] if left else 0


def _conv(node: ir.Node, operands: list[Shape | None], output: Shape) -> int:
    kernel = operands[1]
    return math.prod(output) * math.prod(kernel[1:]) if kernel else 0


def _attention(node: ir.Node, operands: list[Shape | None], output: Shape) -> int:
    """Scores and their product with the values, for 4-D (batch, heads, tokens, width) or packed 3-D inputs."""
    query, key, value = operands[:3]
    if not query or not key or not value:
        return 0
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _packed(node: ir.Node, operands: list[Shape | None], output: Shape) -> int:
    return math.prod(output) * (node.attributes.get_int("K", 0) or 0)


_RULES: dict[tuple[str, str], Callable[[ir.Node, list[Shape | None], Shape], int]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Attention"): _attention,
    ("com.microsoft", "MatMulNBits"): _packed,
}
