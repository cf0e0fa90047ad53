"""Units in integers: one rule for each kind; a rule answers with the value of the codes, or None."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.fixedpoint import BIAS_BITS, Addition, Code, LayerNorm, Scaling, Softmax, table
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.quantise.lower import Coded, Lowering, Rule, code_of, codes_of, extent
from lrcompile.graphs.onnx.quantise.units import BINARY, UNARY, Chain, array, chain, inputs, kind, scalar

BIAS_MOST = 2**30
CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def lower(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    """The codes of a real value, computed with integers; None where no rule can."""
    for rule in RULES:
        found = rule(low, value, out)
        if found is not None:
            found.shape = value.shape
            return found
    return None


def real(low: Lowering, value: ir.Value) -> ir.Value | None:
    """A real output that a product with a weight computes: its sum in integers, then one multiplication."""
    found = chain(value)
    return None if found is None else _linear(low, found, None)


def _known(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    """What is known in codes already."""
    found = low.coded.get(value)
    if found is None:
        return None
    if found.code.step == out.step and found.code.zero == out.zero:
        return found.value
    numbers = low.constant(table(lambda x: x, found.code, out), "recode")
    return low.node("Lookup", [found.value, numbers])


# -- products --------------------------------------------------------------------------------------


def _chain(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    found = chain(value)
    if found is None or found.factor <= 0:
        return None
    return _linear(low, found, out) or _product(low, found, out)


def _linear(low: Lowering, found: Chain, out: Code | None) -> ir.Value | None:
    """A product with a constant weight; real numbers come out where there is no code for them."""
    node = found.node
    source = low.coded.get(node.inputs[0])  # type: ignore[arg-type]
    weight = _weight(node)
    if source is None or weight is None or found.factor <= 0:
        return None
    numbers, scales = weight
    factor = found.factor * _alpha(node)
    ratio = scales.astype(np.float64) * source.code.step * factor
    if not np.all(ratio >= 0) or not ratio.any():
        return None
    sums = numbers.reshape(len(numbers), -1).astype(np.int64).sum(1) * source.code.zero
    bias = np.zeros(len(numbers)) if found.bias is None else np.broadcast_to(found.bias, (len(numbers),))
    scaled = np.divide(bias, ratio, out=np.zeros(len(ratio)), where=ratio > 0)
    most = 128 * np.abs(numbers.reshape(len(numbers), -1).astype(np.int64)).sum(1) + np.abs(scaled - sums)
    fraction = next((bits for bits in BIAS_BITS if float(most.max()) < 2.0 ** (30 - bits)), 0)
    total = np.clip(np.rint(np.ldexp(scaled - sums, fraction)), -BIAS_MOST, BIAS_MOST).astype(np.int32)
    return _write_linear(low, node, source, numbers, total, np.ldexp(ratio, -fraction), fraction, out)


def _write_linear(
    low: Lowering,
    node: ir.Node,
    source: Coded,
    numbers: np.ndarray,
    bias: np.ndarray,
    ratio: np.ndarray,
    fraction: int,
    out: Code | None,
) -> ir.Value:
    attributes: dict[str, Any] = {"fraction": fraction}
    if out is None:
        scale = ratio.astype(np.float32)
    else:
        scaling = Scaling.of(ratio / out.step, out.zero)
        scale, attributes = scaling.multiplier, attributes | _placed(scaling)
    name = "Linear"
    if kind(node) == "Conv":
        name = "Convolution"
        attributes |= {key: node.attributes[key].value for key in CONV if key in node.attributes}
        attributes["zero"] = source.code.zero
    weight = node.inputs[1]
    assert weight is not None
    constants = [(numbers, f"{weight.name}_rows"), (bias, f"{weight.name}_bias"), (scale, f"{weight.name}_factor")]
    value = low.node(name, [source.value, *(low.constant(*each) for each in constants)], **attributes)
    if out is None:
        value.dtype = ir.DataType.FLOAT
    return value


def _weight(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(out, …) codes and one scale per output."""
    decode = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if kind(decode) != "DequantizeLinear" or decode is None:
        return None
    code, numbers = code_of(decode), codes_of(decode)
    if code is None or numbers is None or code.zero:
        return None
    axis, rank = 0, numbers.ndim
    if kind(node) == "MatMul":
        if rank < 2 or any(n != 1 for n in numbers.shape[:-2]):
            return None
        numbers, axis = numbers.reshape(numbers.shape[-2:]).T, rank - 1
    elif kind(node) == "Gemm":
        if _flag(node, "transA"):
            return None
        numbers, axis = (numbers, 0) if _flag(node, "transB") else (numbers.T, 1)
    if code.axis is not None and code.axis % rank != axis:
        return None
    return np.ascontiguousarray(numbers), np.broadcast_to(code.scale, (len(numbers),))


def _alpha(node: ir.Node) -> float:
    if kind(node) != "Gemm":
        return 1.0
    return node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0


def _flag(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _product(low: Lowering, found: Chain, out: Code) -> ir.Value | None:
    """A product of two tensors of codes."""
    sides = [low.coded.get(value) for value in found.node.inputs[:2] if value is not None]
    if kind(found.node) != "MatMul" or found.bias is not None or len(sides) != 2:
        return None
    a, b = sides
    if a is None or b is None:
        return None
    scaling = Scaling.of(a.code.step * b.code.step * found.factor / out.step, out.zero)
    return low.node("Product", [a.value, b.value], zeros=[a.code.zero, b.code.zero], **_fixed(scaling))


def _fixed(scaling: Scaling) -> dict[str, Any]:
    return {"multiplier": int(scaling.multiplier), **_placed(scaling)}


def _placed(scaling: Scaling) -> dict[str, int]:
    return {"shift": scaling.shift, "offset": scaling.offset}


# -- elements --------------------------------------------------------------------------------------


def _pair(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    """A sum, difference or product of two tensors, element by element."""
    node = value.producer()
    if node is None or kind(node) not in ("Add", "Sub", "Mul"):
        return None
    sides = [low.coded.get(each) for each in inputs(node)]
    if len(sides) != 2 or sides[0] is None or sides[1] is None or sides[0].value is sides[1].value:
        return None
    a, b = sides[0], sides[1]
    if kind(node) == "Mul":
        scaling = Scaling.of(a.code.step * b.code.step / out.step, out.zero)
        return low.node("Multiply", [a.value, b.value], zeros=[a.code.zero, b.code.zero], **_fixed(scaling))
    how = Addition.of(a.code, b.code, out, -1 if kind(node) == "Sub" else 1)
    numbers: dict[str, Any] = {"left": how.left, "right": how.right, "offset": how.offset, "shift": how.shift}
    return low.node("Add", [a.value, b.value], **numbers)


def _function(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    """A function of one tensor, however it is written, as a table."""
    nodes: list[ir.Node] = []
    source = _trace(low, value, nodes, 32)
    if source is None or not nodes:
        return None
    found = low.coded[source]

    def evaluate(x: np.ndarray) -> np.ndarray:
        return _run(nodes, source, value, x, low.model)

    return low.node("Lookup", [found.value, low.constant(table(evaluate, found.code, out), "table")])


def _trace(low: Lowering, value: ir.Value, nodes: list[ir.Node], depth: int) -> ir.Value | None:
    """The one value in codes that elementwise nodes compute ``value`` from; they are appended in order."""
    if value in low.coded:
        return value
    node = value.producer()
    if node is None or depth == 0 or kind(node) not in UNARY | BINARY:
        return None
    if node in nodes:
        return next(iter({_trace(low, each, [], depth - 1) for each in inputs(node) if scalar(each) is None}))
    sources = {_trace(low, each, nodes, depth - 1) for each in inputs(node) if scalar(each) is None}
    if len(sources) != 1 or None in sources:
        return None
    if node not in nodes:
        nodes.append(node)
    return sources.pop()


def _run(nodes: list[ir.Node], source: ir.Value, value: ir.Value, x: np.ndarray, model: ir.Model) -> np.ndarray:
    """Evaluates a few nodes in ONNX Runtime."""
    from lrcompile.graphs.onnx.session import create, options

    kind_of = ir.TensorType(ir.DataType.FLOAT)
    new: dict[ir.Value, ir.Value] = {source: ir.Value(name="x", shape=ir.Shape(x.shape), type=kind_of)}
    made, constants = [], []
    for node in nodes:
        for each in inputs(node):
            tensor = constant(each)
            if tensor is not None and each not in new:
                numbers = tensor.numpy().reshape(())
                copy = ir.Value(name=f"c{len(constants)}", shape=ir.Shape(()), type=ir.TensorType(tensor.dtype))
                copy.const_value = ir.Tensor(numbers, name=copy.name)
                constants.append(copy)
                new[each] = copy
        values = [None if each is None else new[each] for each in node.inputs]
        twin = ir.Node(node.domain, node.op_type, values, list(node.attributes.values()), num_outputs=1)
        twin.outputs[0].name, twin.outputs[0].type = f"v{len(made)}", kind_of
        new[node.outputs[0]] = twin.outputs[0]
        made.append(twin)
    new[value].shape = ir.Shape(x.shape)
    opsets = {"": model.graph.opset_imports.get("", 18)}
    graph = ir.Graph(
        [new[source]], [new[value]], nodes=made, initializers=constants, opset_imports=opsets, name="function"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    (found,) = create(proto.SerializeToString(), options(1)).run(None, {"x": x.astype(np.float32)})
    return np.asarray(found, np.float64)


# -- along an axis ---------------------------------------------------------------------------------


def _softmax(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    node = value.producer()
    source = low.coded.get(node.inputs[0]) if node is not None and kind(node) == "Softmax" else None  # type: ignore[arg-type]
    if node is None or source is None or value.shape is None:
        return None
    rank = len(value.shape)
    old = low.graph.opset_imports.get("", 18) < 13
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else (1 if old else -1)) % rank
    if old and axis != rank - 1:
        return None
    how = Softmax.of(source.code, out, extent(value, axis))
    numbers: dict[str, Any] = {key: getattr(how, key) for key in ("bits", "drop", "factor", "shift", "offset")}
    return low.node("Softmax", [source.value, low.constant(how.powers, "powers")], axis=axis, **numbers)


def _layer_norm(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    node = value.producer()
    if node is None or kind(node) != "LayerNormalization" or value.shape is None:
        return None
    source, gain = low.coded.get(node.inputs[0]), array(node.inputs[1])  # type: ignore[arg-type]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros_like(gain) if given is None and gain is not None else array(given)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    last = axis in (-1, len(value.shape) - 1)
    if source is None or gain is None or bias is None or gain.ndim != 1 or not last:
        return None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    how = LayerNorm.of(source.code, out, gain, bias, epsilon)
    numbers: dict[str, Any] = {
        key: getattr(how, key) for key in ("count", "epsilon", "root_shift", "product_shift", "shift")
    }
    constants = [low.constant(how.gain, f"{value.name}_gain"), low.constant(how.offset, f"{value.name}_offset")]
    return low.node("LayerNorm", [source.value, *constants], **numbers)


def _mean(low: Lowering, value: ir.Value, out: Code) -> ir.Value | None:
    node = value.producer()
    if node is None or kind(node) not in ("ReduceMean", "GlobalAveragePool"):
        return None
    source = low.coded.get(node.inputs[0])  # type: ignore[arg-type]
    if source is None or source.value.shape is None:
        return None
    rank = len(source.value.shape)
    axes = list(range(2, rank)) if kind(node) == "GlobalAveragePool" else _axes(node, rank)
    if not axes:
        return None
    count = int(np.prod([extent(source.value, axis) for axis in axes]))
    scaling = Scaling.of(source.code.step / (count * out.step), out.zero)
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    shift = -count * source.code.zero
    return low.node("Mean", [source.value], axes=axes, keepdims=keep, correction=shift, **_fixed(scaling))


def _axes(node: ir.Node, rank: int) -> list[int]:
    if "axes" in node.attributes:
        found = list(node.attributes["axes"].as_ints())
    else:
        given = array(node.inputs[1]) if len(node.inputs) > 1 else None
        found = list(range(rank)) if given is None else [int(each) for each in given]
    return sorted(each % rank for each in found)


RULES: tuple[Rule, ...] = (_known, _chain, _softmax, _layer_norm, _mean, _pair, _function)
