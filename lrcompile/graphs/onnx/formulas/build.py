"""From a loaded ONNX model to formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lrcompile.dataflow.expr import Load
from lrcompile.dataflow.index import of
from lrcompile.dataflow.program import ITEMSIZE
from lrcompile.dataflow.stage import Formulas, Part, Stage, new_axes
from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.formulas import integer, linear, moving, pointwise, reducing
from lrcompile.graphs.onnx.formulas.builder import TABLE, Builder

FOLD_MAX = 2**24  # elements that a folded constant may have
DEFAULT = ("", "ai.onnx")

__all__ = ["build"]
_TABLES = (integer, linear, moving, pointwise, reducing)  # importing them fills the table


def build(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Formulas:
    """The model as stages, in the order of its nodes.

    Args:
        shapes: static shapes of inputs that the file leaves open.

    Raises:
        UnsupportedError: an operator without a formula (named, with its node), or a dynamic shape.
        InvalidInputError: a shape for an input that does not exist, or that contradicts the file.
    """
    graph = model.graph
    builder = Builder(graph.opset_imports.get("", 0))
    for value, shape in _inputs(graph, shapes or {}):
        builder.formulas.inputs[value.name or ""] = shape, _dtype(value)
        builder.names[value.name or ""] = value.name or ""
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            _constant(builder, name, value.const_value.numpy())
    for node in graph:
        _node(builder, node, model)
    for name, (_, dtype) in builder.formulas.inputs.items():  # after the nodes: an operator is the better reason
        if dtype not in ITEMSIZE:
            raise UnsupportedError(f"inputs of type {dtype} are not supported", where=name)
    builder.formulas.outputs = tuple(_output(builder, value) for value in graph.outputs)
    return builder.formulas.used()


def _inputs(graph: ir.Graph, shapes: Mapping[str, Sequence[int]]) -> Iterable[tuple[ir.Value, tuple[int, ...]]]:
    known = [value for value in graph.inputs if value.name not in graph.initializers]
    names = {value.name for value in known}
    for name in shapes:
        if name not in names:
            raise InvalidInputError("there is no such input", where=name, hint=f"inputs: {', '.join(map(str, names))}")
    for value in known:
        yield value, _static(value, shapes.get(value.name or ""))


def _static(value: ir.Value, given: Sequence[int] | None) -> tuple[int, ...]:
    if value.shape is None and given is None:
        raise UnsupportedError("the input has no shape", where=value.name or "", hint=f"--shape {value.name}=1,…")
    dims = list(value.shape) if value.shape is not None else list(given or ())
    if given is not None and len(given) != len(dims):
        raise InvalidInputError(f"has {len(dims)} dimensions, not {len(given)}", where=value.name or "")
    shape = []
    for at, dim in enumerate(dims):
        if isinstance(dim, int):
            if given is not None and given[at] != dim:
                raise InvalidInputError(f"dimension {at} is {dim} in the file, not {given[at]}", where=value.name or "")
            shape.append(dim)
        elif given is not None:
            shape.append(int(given[at]))
        else:
            text = ",".join(str(d) if isinstance(d, int) else "N" for d in dims)
            hint = f"give one: --shape {value.name}={text} with a number for N"
            raise UnsupportedError("the input has a dynamic shape", where=value.name or "", hint=hint)
    return tuple(shape)


def _dtype(value: ir.Value) -> str:
    try:
        return value.dtype.numpy().name  # type: ignore[union-attr]
    except (TypeError, AttributeError):
        raise UnsupportedError(f"inputs of type {value.dtype} are not supported", where=value.name or "") from None


def _constant(builder: Builder, name: str | None, array: np.ndarray) -> None:
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.astype(np.float32)
    builder.constant(name, np.ascontiguousarray(array).reshape(array.shape))


def _node(builder: Builder, node: ir.Node, model: ir.Model) -> None:
    builder.begin(node)
    if not [out for out in node.outputs if out.name]:
        return
    if node.op_type == "Constant" and node.domain in DEFAULT:
        return _constant(builder, node.outputs[0].name, _constant_value(builder, node))
    if node.op_type in ("Shape", "Size") and node.domain in DEFAULT:
        return _constant(builder, node.outputs[0].name, _shape_value(builder, node))
    if _fold(builder, node, model):
        return
    name = node.op_type if node.domain in DEFAULT else f"{node.domain}::{node.op_type}"
    handler = TABLE.get(name)
    if handler is not None:
        return handler(builder, node)
    body = _function(builder, node)
    if body is None:
        raise UnsupportedError(f"operator {name}: no formula", where=node.name or builder._node)
    _expand(builder, node, body, model)


def _constant_value(builder: Builder, node: ir.Node) -> np.ndarray:
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name.startswith("value_float"):
            return np.array(attribute.value, np.float32)
        if name.startswith("value_int"):
            return np.array(attribute.value, np.int64)
    raise builder.refuse(node, "only numbers are supported")


def _shape_value(builder: Builder, node: ir.Node) -> np.ndarray:
    shape = builder.shape(builder.need(node, 0))
    if node.op_type == "Size":
        return np.array(int(np.prod(shape)), np.int64)
    first = node.attributes["start"].as_int() if "start" in node.attributes else 0
    last = node.attributes["end"].as_int() if "end" in node.attributes else len(shape)
    return np.array(shape[first:last], np.int64)


def _fold(builder: Builder, node: ir.Node, model: ir.Model) -> bool:
    """Computes a node whose inputs are all constant."""
    if any(each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for each in node.attributes.values()):
        return False
    if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial", "Dropout"):
        return False
    arrays = [None if each is None else builder.array(each) for each in builder.inputs(node)]
    given = [value for value in node.inputs if value is not None and value.name]
    if len([each for each in arrays if each is not None]) != len(given):
        return False
    values = _evaluate(node, [each for each in arrays if each is not None], model)
    if values is None or any(each.size > FOLD_MAX for each in values):
        return False
    for out, array in zip((out for out in node.outputs if out.name), values, strict=False):
        _constant(builder, out.name, array)
    return True


def _evaluate(node: ir.Node, arrays: list[np.ndarray], model: ir.Model) -> list[np.ndarray] | None:
    """The node's outputs by ONNX's reference implementation, None where that fails."""
    from onnx.reference import ReferenceEvaluator

    proto = ir.serde.serialize_node(node)
    names = [name for name in dict.fromkeys(proto.input) if name]
    feeds = dict(zip([name for name in proto.input if name], arrays, strict=True))
    inputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names]
    outputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in proto.output if name]
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()]
    graph = onnx.helper.make_graph([proto], "fold", inputs, outputs)
    try:
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
        with np.errstate(all="ignore"):
            found: Any = evaluator.run(None, feeds)
    except Exception:  # whatever it cannot do is left to the formulas
        return None
    return list(found) if all(isinstance(each, np.ndarray) for each in found) else None


# -- operators that the standard defines by others -------------------------------------------------


def _function(builder: Builder, node: ir.Node) -> onnx.FunctionProto | None:
    """The standard's own definition of an operator, where it has one."""
    if node.domain not in DEFAULT:
        return None
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, builder.opset, "")
    except Exception:
        return None
    if schema.has_function:
        return schema.function_body
    if not schema.has_context_dependent_function:
        return None
    types = []
    for each in builder.inputs(node):
        if each is None:
            types.append(onnx.TypeProto().SerializeToString())
            continue
        code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(builder.dtype(each)))
        proto = onnx.helper.make_tensor_type_proto(code, builder.shape(each))
        types.append(proto.SerializeToString())
    version = max(schema.context_dependent_function_opset_versions)
    for candidate in sorted(schema.context_dependent_function_opset_versions, reverse=True):
        if candidate <= builder.opset:
            version = candidate
            break
    proto = ir.serde.serialize_node(node)
    data = schema.get_context_dependent_function_with_opset_version(version, proto.SerializeToString(), types)
    body = onnx.FunctionProto()
    body.ParseFromString(data)
    return body


def _expand(builder: Builder, node: ir.Node, body: onnx.FunctionProto, model: ir.Model) -> None:
    """Walks the nodes of a definition in place of the node."""
    made = {*body.input, *(name for each in body.node for name in each.output)}
    outputs = list(body.output)  # some definitions name outputs that they make only where they are asked for
    del body.output[:]
    body.output.extend(name for name in outputs if name in made)
    function = ir.serde.deserialize_function(body)
    inner = Builder(function.opset_imports.get("", builder.opset))
    inner.formulas = builder.formulas
    for value, tensor in zip(function.inputs, builder.inputs(node), strict=False):
        if tensor is not None:
            inner.names[value.name or ""] = tensor
    label = builder._node
    for each in function:
        _bind(each, node, function)
        for at, value in enumerate(each.inputs):
            if value is not None and value.name and value.name not in inner.names:
                each.replace_input_with(at, None)
        _node(inner, each, model)
        inner._node = label
    for name, out in zip(outputs, node.outputs, strict=False):
        if out.name and name in inner.names:
            builder.alias(out.name, inner.names[name])


def _bind(inner: ir.Node, outer: ir.Node, function: ir.Function) -> None:
    """Puts the values of the outer node's attributes in place of references to them."""
    for name, attribute in list(inner.attributes.items()):
        if attribute.is_ref():
            found = outer.attributes.get(attribute.ref_attr_name or "")
            if found is None:
                del inner.attributes[name]
            else:
                inner.attributes[name] = ir.Attr(name, found.type, found.value)


def _output(builder: Builder, value: ir.Value) -> str:
    """The stage of a graph output; an output that is an input or a constant becomes a copy."""
    tensor = builder.names.get(value.name or "")
    if tensor is None:
        raise UnsupportedError("the output is never computed", where=value.name or "")
    formulas = builder.formulas
    if tensor in formulas.stages and tensor == value.name:
        return tensor
    shape = formulas.shape(tensor)
    axes = new_axes(shape)
    index = tuple(map(of, axes))
    name = builder.fresh(value.name or "output")
    part = Part(axes, index, Load(tensor, index, formulas.dtype(tensor)), nodes=(name,))
    formulas.stages[name] = Stage(name, shape, formulas.dtype(tensor), (part,))
    builder.names[value.name or ""] = name
    return name
