"""A model with Q/DQ pairs in integers: every unit between them becomes one integer operator of the private domain.

A unit that has none (an operator without integer form, scales that do not allow it) stays in float between the pairs
that stand around it, and computes what it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.errors import UnsupportedError
from lrcompile.fixedpoint import Code
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.naming import unique
from lrcompile.graphs.onnx.quantise.units import MOVES, array, behind, kind

DOMAIN = "lrcompile.integer"


@dataclass(frozen=True, eq=False)
class Coded:
    """A real value that is known as int8 codes."""

    value: ir.Value
    code: Code


def is_quantised(model: ir.Model) -> bool:
    """Whether a model holds Q/DQ pairs."""
    return any(kind(node) == "DequantizeLinear" for node in model.graph)


def integer_model(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> ir.Model:
    """A copy that computes with integers. It holds private operators: it is meant for formulas, not for a file.

    Args:
        shapes: static shapes of inputs that the model leaves open.
    """
    clone = model.clone()
    for value in clone.graph.inputs:
        if shapes and value.name in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
    infer_types(clone)
    clone.opset_imports.setdefault(DOMAIN, 1)
    Lowering(clone).run()
    return clone


def infer_types(model: ir.Model) -> None:
    """Fills in the types and shapes that the file does not state, in place."""
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


class Lowering:
    """Rewrites a model in place; :mod:`rules` has one function per kind of unit."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.coded: dict[ir.Value, Coded] = {}
        self._taken = {str(value.name) for value in (*self.graph.inputs, *self.graph.initializers.values())}
        self._taken |= {str(value.name) for node in self.graph for value in node.outputs}
        self._at: ir.Node | None = None
        self._named: set[ir.Value] = set()

    def run(self) -> None:
        """Walks the nodes in order."""
        for node in list(self.graph):
            self._at = node
            if kind(node) == "QuantizeLinear":
                self._quantize(node)
            elif kind(node) == "DequantizeLinear":
                self._dequantize(node)
            elif kind(node) in MOVES or kind(node) == "MaxPool":
                self._move(node)
        self._outputs()
        self._drop_unused()

    def _outputs(self) -> None:
        from lrcompile.graphs.onnx.quantise.rules import real

        for value in list(self.graph.outputs):
            self._at = value.producer()
            found = None if self._at is None else real(self, value)
            if found is not None:
                name = value.name
                value.name = unique(f"{name}_real", self._taken, "_")
                found.name, found.type, found.shape = name, value.type, value.shape
                value.replace_all_uses_with(found, replace_graph_outputs=True)

    def _drop_unused(self) -> None:
        for node in reversed(self.graph):
            if not any(list(value.uses()) or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not list(value.uses()) and not value.is_graph_output():
                del self.graph.initializers[name]

    # -- pairs --------------------------------------------------------------------------------

    def _quantize(self, node: ir.Node) -> None:
        from lrcompile.graphs.onnx.quantise.rules import lower

        code = code_of(node)
        source = node.inputs[0]
        if code is None or code.axis is not None or source is None:
            return
        found = lower(self, source, code)
        if found is None:
            found = self._float(node, code)
        if found not in self._named:  # the codes keep their name, so that they can be compared with the float model's
            self._named.add(found)
            name = node.outputs[0].name
            node.outputs[0].name = unique(f"{name}_real", self._taken, "_")
            found.name = name
        self.coded[node.outputs[0]] = Coded(found, code)

    def _float(self, node: ir.Node, code: Code) -> ir.Value:
        """The same rounding with int8 codes."""
        zero = self.constant(np.array(code.zero, np.int8), "zero")
        return self.node("QuantizeLinear", [node.inputs[0], node.inputs[1], zero], domain="")

    def _dequantize(self, node: ir.Node) -> None:
        code, source = code_of(node), node.inputs[0]
        if code is None or source is None:
            return
        if source in self.coded:
            self.coded[node.outputs[0]] = Coded(self.coded[source].value, code)
            self._real_readers(node, code)
        elif constant(source) is not None and code.axis is None:
            numbers = codes_of(node)
            if numbers is not None:
                self.coded[node.outputs[0]] = Coded(self.constant(numbers, str(source.name)), code)

    def _real_readers(self, node: ir.Node, code: Code) -> None:
        """What still reads real numbers gets them from the new codes."""
        zero = self.constant(np.array(code.zero, np.int8), "zero")
        node.replace_input_with(0, self.coded[node.outputs[0]].value)
        if len(node.inputs) > 2:
            node.replace_input_with(2, zero)
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, zero)

    def _move(self, node: ir.Node) -> None:
        """Moves codes instead of numbers where all that is moved has one code."""
        data = list(node.inputs) if kind(node) == "Concat" else list(node.inputs[:1])
        found = [self.coded.get(value) for value in data if value is not None]
        if not found or any(each is None for each in found):
            return
        codes = [each.code for each in found if each is not None]
        if any(code.step != codes[0].step or code.zero != codes[0].zero for code in codes):
            return
        values = [each.value for each in found if each is not None]
        moved = self.copy(node, [*values, *node.inputs[len(values) :]])
        for old, new in zip(node.outputs, moved, strict=True):
            new.dtype, new.shape = ir.DataType.INT8, old.shape
            self.coded[old] = Coded(new, codes[0])

    # -- writing ------------------------------------------------------------------------------

    def node(self, name: str, values: Sequence[ir.Value | None], domain: str = DOMAIN, **attributes: Any) -> ir.Value:
        """A new node in front of the one that is looked at; its only output holds int8 unless set otherwise."""
        given = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        made = ir.Node(domain, name, list(values), given, num_outputs=1)
        self._insert(made)
        made.outputs[0].dtype = ir.DataType.INT8
        return made.outputs[0]

    def copy(self, node: ir.Node, values: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """The same operator on other inputs."""
        attributes = list(node.attributes.values())
        made = ir.Node(node.domain, node.op_type, list(values), attributes, num_outputs=len(node.outputs))
        self._insert(made)
        return made.outputs

    def _insert(self, made: ir.Node) -> None:
        assert self._at is not None
        base = self._at.name or str(self._at.outputs[0].name)
        made.name = unique(f"{base}/integer", self._taken, "_")
        for value in made.outputs:
            value.name = unique(f"{made.name}_codes", self._taken, "_")
        self.graph.insert_before(self._at, made)

    def constant(self, numbers: np.ndarray, name: str) -> ir.Value:
        """A new constant."""
        tensor = ir.Tensor(np.ascontiguousarray(numbers).reshape(numbers.shape), name=unique(name, self._taken, "_"))
        value = ir.Value(name=tensor.name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


# -- parameters of a pair --------------------------------------------------------------------------


def code_of(node: ir.Node) -> Code | None:
    """What a Q or DQ node says about its codes, as int8; None where they are not eight bits or not constant."""
    scale, zero = array(node.inputs[1]), array(node.inputs[2]) if len(node.inputs) > 2 else np.array(0, np.uint8)
    if scale is None or zero is None or zero.dtype not in (np.int8, np.uint8):
        return None
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        return None
    if np.unique(zero).size != 1:
        return None
    base = 128 if zero.dtype == np.uint8 else 0
    if scale.size == 1:
        return Code(np.float32(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) - base)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return Code(scale.astype(np.float32), int(zero.reshape(-1)[0]) - base, axis)


def codes_of(node: ir.Node) -> np.ndarray | None:
    """The constant that a DQ node decodes, as int8."""
    numbers = array(behind(node.outputs[0]))
    if numbers is None or numbers.dtype not in (np.int8, np.uint8):
        return None
    return numbers if numbers.dtype == np.int8 else (numbers.astype(np.int16) - 128).astype(np.int8)


def extent(value: ir.Value, axis: int) -> int:
    """A static extent.

    Raises:
        UnsupportedError: it is not known.
    """
    found = None if value.shape is None else value.shape[axis]
    if not isinstance(found, int):
        raise UnsupportedError("the extent of an axis is not known", where=str(value.name), hint="give --shape")
    return found


Rule = Callable[[Lowering, ir.Value, Code], "ir.Value | None"]
