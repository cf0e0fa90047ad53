"""A float model with Q/DQ pairs: per-channel symmetric weights, per-tensor asymmetric activations, int8.

The result is ordinary ONNX that any runtime loads. Values are rounded between units (:mod:`units`), never inside:
a bias, an attention scale, the steps of a written-out GELU stay in real arithmetic, as they will in integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.fixedpoint import HIGH, LOW, Code, encode
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.naming import unique
from lrcompile.graphs.onnx.observe import session_with
from lrcompile.graphs.onnx.quantise.lower import infer_types
from lrcompile.graphs.onnx.quantise.units import (
    BINARY,
    MOVES,
    PRODUCTS,
    Functions,
    array,
    in_chain,
    inputs,
    is_float,
    kind,
    scalar,
    single,
)

SOFTMAX_OUTPUT = Code(np.float32(1 / 256), LOW)
NEGLIGIBLE = 17.0
"""exp of less than this below the largest is below 2^-24: softmax inputs need no wider range."""
SAME = frozenset(["MaxPool", "Concat", *MOVES])
"""Operators whose inputs and outputs share one code."""


def quantise(model: ir.Model, samples: Iterable[Inputs]) -> ir.Model:
    """A copy of the model with Q/DQ pairs, calibrated on samples (least and greatest value of every tensor).

    Raises:
        InvalidInputError: no samples, or a value that is not finite on them.
        UnsupportedError: nothing to quantise: the model holds no float product.
    """
    clone = model.clone()
    infer_types(clone)  # values of nodes that a rewrite made have no type yet
    if not any(kind(node) in PRODUCTS for node in clone.graph):
        raise UnsupportedError("nothing to quantise: there is no MatMul, Gemm or Conv", hint="deploy it as float32")
    chosen = boundaries(clone.graph)
    ranges = observe_ranges(model, [str(value.name) for value in chosen], samples)
    codes = assign(clone.graph, chosen, ranges)
    writer = _Writer(clone)
    for value in chosen:
        writer.activation(value, codes[value])
    for node in list(clone.graph):
        writer.constants(node, codes)
    clone.graph.sort()
    for name, value in list(clone.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output() and not value.is_graph_input():
            del clone.graph.initializers[name]
    return clone


def boundaries(graph: ir.Graph) -> list[ir.Value]:
    """Values that are rounded: inputs, and what a unit computes for another unit to read."""
    functions = Functions(graph)
    found = [value for value in graph.inputs if is_float(value) and list(value.uses())]
    for node in graph:
        for value in node.outputs:
            if is_float(value) and _rounded(node, value, functions):
                found.append(value)
    return found


def _rounded(node: ir.Node, value: ir.Value, functions: Functions) -> bool:
    if not list(value.uses()) or functions.inside(value) or constant(value) is not None:
        return False
    if kind(node) in MOVES | {"Constant", "DequantizeLinear", "QuantizeLinear"}:
        return False
    reader = single(value)
    return reader is None or not (in_chain(reader) and (kind(node) in PRODUCTS or in_chain(node)))


def observe_ranges(model: ir.Model, names: list[str], samples: Iterable[Inputs]) -> dict[str, tuple[float, float]]:
    """Least and greatest value of each named tensor over all samples, by running the model."""
    by_name = {value.name: value for value in model.graph.inputs}
    by_name.update((value.name, value) for node in model.graph for value in node.outputs)
    session = session_with(model, [by_name[name] for name in names])
    found: dict[str, tuple[float, float]] = {}
    for sample in samples:
        values: Mapping[str, np.ndarray] = {**sample, **session.run(sample)}
        for name in names:
            low, high = float(values[name].min()), float(values[name].max())
            old = found.get(name, (low, high))
            found[name] = min(low, old[0]), max(high, old[1])
    if not found:
        raise InvalidInputError("no calibration samples", hint="give --calib data.npz")
    bad = next((name for name, ends in found.items() if np.isnan(ends).any()), None)
    if bad is not None:
        raise InvalidInputError("is not a number on the calibration samples", where=bad)
    return found


# -- codes -----------------------------------------------------------------------------------------


def assign(graph: ir.Graph, chosen: list[ir.Value], ranges: Mapping[str, tuple[float, float]]) -> dict[ir.Value, Code]:
    """A code for every rounded value, and for what is moved from it; joined values share one."""
    groups = _Groups()
    for node in graph:
        if kind(node) in SAME:
            data = inputs(node) if kind(node) == "Concat" else inputs(node)[:1]
            for other in (*data[1:], *node.outputs):
                groups.join(data[0], other)
    limits: dict[ir.Value, tuple[float, float]] = {}
    for value in chosen:
        _widen(limits, groups.of(value), _limits(value, ranges[str(value.name)]))
    for node in graph:
        for value in inputs(node) if kind(node) in SAME else ():
            numbers = array(value)
            if numbers is not None and numbers.dtype.kind == "f" and numbers.size and groups.of(value) in limits:
                _widen(limits, groups.of(value), (float(numbers.min()), float(numbers.max())))
    fixed = {groups.of(node.outputs[0]) for node in graph if kind(node) == "Softmax"}
    known = {group: SOFTMAX_OUTPUT if group in fixed else asymmetric(*ends) for group, ends in limits.items()}
    values = [*graph.inputs, *(each for node in graph for each in (*inputs(node), *node.outputs))]
    return {value: known[groups.of(value)] for value in values if groups.of(value) in known}


def _limits(value: ir.Value, ends: tuple[float, float]) -> tuple[float, float]:
    reader = single(value)
    if kind(reader) == "Softmax":
        return max(ends[0], ends[1] - NEGLIGIBLE) if ends[0] < 0 else ends[0], ends[1]
    return ends


def _widen(limits: dict[ir.Value, tuple[float, float]], group: ir.Value, ends: tuple[float, float]) -> None:
    old = limits.get(group, ends)
    limits[group] = min(old[0], ends[0]), max(old[1], ends[1])


def asymmetric(low: float, high: float) -> Code:
    """256 codes over a range that holds zero, so that zero has a code."""
    low, high = max(min(low, 0.0), -3e38), min(max(high, 0.0), 3e38)
    scale = np.float32(max((high - low) / (HIGH - LOW), 1e-12))
    return Code(scale, int(np.clip(round(LOW - low / float(scale)), LOW, HIGH)))


def symmetric(weight: np.ndarray, axis: int | None) -> Code:
    """Codes -127..127, one scale for each position of ``axis``."""
    rest = None if axis is None else tuple(at for at in range(weight.ndim) if at != axis % weight.ndim)
    largest = np.abs(weight).max(rest)
    return Code(np.maximum(largest / HIGH, 1e-12).astype(np.float32), 0, axis)


class _Groups:
    """Sets of values with one code (union–find)."""

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def join(self, one: ir.Value, other: ir.Value) -> None:
        self._parent[self.of(other)] = self.of(one)


# -- writing ---------------------------------------------------------------------------------------


class _Writer:
    """Puts pairs of nodes into a graph."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._taken = {str(value.name) for value in (*model.graph.inputs, *model.graph.initializers.values())}
        self._taken |= {str(value.name) for node in model.graph for value in node.outputs}
        self._weights: dict[tuple[ir.Value, int | None], ir.Value] = {}

    def activation(self, value: ir.Value, code: Code) -> None:
        """``value`` → Q → DQ → all that read it."""
        uses = list(value.uses())
        scale, zero = self._parameters(str(value.name), code)
        rounded = self._node("QuantizeLinear", [value, scale, zero], f"{value.name}_codes")
        rounded.dtype, rounded.shape = ir.DataType.INT8, value.shape
        decoded = self._decode(rounded, scale, zero, value)
        for use in uses:
            use.node.replace_input_with(use.idx, decoded)

    def constants(self, node: ir.Node, codes: Mapping[ir.Value, Code]) -> None:
        """Rounds the weight of a product, and the tensors that elements are combined with or moved from."""
        name = kind(node)
        if name in PRODUCTS:
            self._replace(node, 1, lambda w: symmetric(w, weight_axis(node, w.ndim)))
            if name != "Conv":
                self._replace(node, 0, lambda w: symmetric(w, None))
        elif name in BINARY and not in_chain(node):
            for at in range(2):
                if scalar(node.inputs[at]) is None:
                    self._replace(node, at, lambda w: asymmetric(float(w.min()), float(w.max())))
        elif name in SAME:
            for at in range(len(node.inputs) if name == "Concat" else 1):
                code = codes.get(node.outputs[0])
                self._replace(node, at, lambda w, code=code: code or asymmetric(float(w.min()), float(w.max())))

    def _replace(self, node: ir.Node, at: int, choose: object) -> None:
        value = node.inputs[at]
        numbers = array(value)
        if value is None or numbers is None or numbers.dtype.kind != "f":
            return
        code = choose(numbers)  # type: ignore[operator]
        key = value, code.axis
        if key not in self._weights or name_shared(node):
            self._weights[key] = self._constant(value, numbers, code)
        node.replace_input_with(at, self._weights[key])

    def _constant(self, value: ir.Value, numbers: np.ndarray, code: Code) -> ir.Value:
        scale, zero = self._parameters(str(value.name), code)
        codes = self._initializer(f"{value.name}_codes", encode(numbers, code))
        axis = [] if code.axis is None else [ir.AttrInt64("axis", code.axis)]
        return self._decode(codes, scale, zero, value, axis)

    def _decode(
        self, codes: ir.Value, scale: ir.Value, zero: ir.Value, like: ir.Value, attributes: Iterable[ir.Attr] = ()
    ) -> ir.Value:
        decoded = self._node("DequantizeLinear", [codes, scale, zero], f"{like.name}_decoded", attributes)
        decoded.dtype, decoded.shape = ir.DataType.FLOAT, like.shape
        return decoded

    def _parameters(self, name: str, code: Code) -> tuple[ir.Value, ir.Value]:
        scale = np.asarray(code.scale, np.float32)
        zeros = np.full(scale.shape, code.zero, np.int8)
        return self._initializer(f"{name}_scale", scale), self._initializer(f"{name}_zero", zeros)

    def _initializer(self, name: str, numbers: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(numbers, name=unique(name, self._taken, "_"))
        value = ir.Value(name=tensor.name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def _node(
        self, operator: str, values: list[ir.Value | None], name: str, attributes: Iterable[ir.Attr] = ()
    ) -> ir.Value:
        label = unique(name, self._taken, "_")
        node = ir.Node("", operator, values, list(attributes), num_outputs=1, name=label)
        node.outputs[0].name = label
        self.graph.append(node)
        return node.outputs[0]


def name_shared(node: ir.Node) -> bool:
    """Whether a constant's code depends on the node that reads it, so that it is stored for each."""
    return kind(node) in SAME


def weight_axis(node: ir.Node, rank: int) -> int:
    """The axis of a weight's output channels."""
    if kind(node) == "Conv":
        return 0
    if kind(node) == "Gemm":
        return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    return rank - 1
