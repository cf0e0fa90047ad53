"""Linear operators as standard ONNX operators: the rule table behind the ``onnxruntime`` backend.

Weights are stored as ``(in, out)``, the way MatMul wants them; a tensor that several
expressions share is stored once, and a product that several sites share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.onnx.splice import Tape
from lrcompile.graphs.onnx.tensors import from_torch
from lrcompile.linop import (
    BlockSparse,
    Choose,
    Dense,
    Diagonal,
    Identity,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    Transposed,
)
from lrcompile.sites import Window


@dataclass(eq=False)
class Store:
    """Initializers of one model, each stored once, and values computed once."""

    opset: int
    constants: dict[tuple, tuple[ir.Value, tuple[int, ...]]] = field(default_factory=dict)
    products: dict[tuple[int, int], ir.Value] = field(default_factory=dict)
    alive: list[object] = field(default_factory=list)

    def transposed(self, tape: Tape, matrix: Tensor, name: str) -> ir.Value:
        """A value that holds ``matrix.T``; the opposite orientation of a stored matrix costs a Transpose."""
        key = (matrix.untyped_storage().data_ptr(), matrix.storage_offset(), matrix.dtype, *sorted(matrix.shape))
        turned = matrix.T
        if key not in self.constants:
            self.alive.append(matrix)
            value = tape.constant(from_torch(turned.contiguous(), name), name)
            self.constants[key] = (value, turned.stride())
            return value
        value, stride = self.constants[key]
        same_way = stride == turned.stride() and tuple(value.shape or ()) == tuple(turned.shape)
        return value if same_way else tape.op("Transpose", [value], [ir.AttrInt64s("perm", [1, 0])])

    def tensor(self, tape: Tape, tensor: Tensor, name: str) -> ir.Value:
        """A value that holds the tensor as it is."""
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), "as is")
        if key not in self.constants:
            self.alive.append(tensor)
            self.constants[key] = (tape.constant(from_torch(tensor.contiguous(), name), name), ())
        return self.constants[key][0]


@dataclass(frozen=True, eq=False)
class Emitter:
    """Emits one site into a tape.

    Args:
        window: of the convolution that the site is; only the right-most factor meets its strides.
    """

    store: Store
    tape: Tape
    name: str
    window: Window | None = None

    def apply(self, operator: LinearOperator, source: ir.Value) -> ir.Value:
        """``source @ W.T`` along the channel axis.

        Raises:
            UnsupportedError: the operator has no rule.
        """
        key = (id(operator), id(source))
        if key not in self.store.products:
            rule = RULES.get(type(operator))
            if rule is None:
                raise UnsupportedError(f"no ONNX form for {type(operator).__name__}", where=self.name)
            self.store.alive.extend((operator, source))
            self.store.products[key] = rule(self, operator, source)
        return self.store.products[key]

    @property
    def axis(self) -> int:
        """The channel axis."""
        return -1 if self.window is None else 1

    def inner(self, part: str) -> Emitter:
        """The emitter of a factor whose name gets a suffix."""
        return Emitter(self.store, self.tape, f"{self.name}.{part}", self.window)

    def later(self, part: str) -> Emitter:
        """The emitter of a factor that does not meet the input: its strides are 1."""
        window = None if self.window is None else Window(self.window.kernel, (1,) * self.window.rank)
        return Emitter(self.store, self.tape, f"{self.name}.{part}", window)

    def strided(self, source: ir.Value) -> ir.Value:
        """The source at the positions that the window keeps."""
        if self.window is None or all(step == 1 for step in self.window.strides):
            return source
        rank = self.window.rank
        bounds = {"starts": [0] * rank, "ends": [2**62] * rank, "axes": list(range(2, 2 + rank))}
        bounds["steps"] = list(self.window.strides)
        values = [self.store.tensor(self.tape, torch.tensor(v), f"{self.name}.{k}") for k, v in bounds.items()]
        return self.tape.op("Slice", [source, *values])

    def channelwise(self, vector: Tensor) -> Tensor:
        """A vector shaped to scale the channel axis."""
        return vector if self.window is None else vector.reshape(-1, *[1] * self.window.rank)

    def multiply(self, matrix: ir.Value, source: ir.Value) -> ir.Value:
        """Applies a computed matrix, given as the value of ``W.T`` (in, out)."""
        if self.window is None:
            return self.tape.op("MatMul", [source, matrix])
        turned = self.tape.op("Transpose", [matrix], [ir.AttrInt64s("perm", [1, 0])])
        axes = self.store.tensor(self.tape, torch.arange(2, 2 + self.window.rank), f"{self.name}.axes")
        kernel = self.tape.op("Unsqueeze", [turned, axes])
        return self.tape.op("Conv", [source, kernel], [ir.AttrInt64s("strides", self.window.strides)])


def _dense(emitter: Emitter, op: Dense, source: ir.Value) -> ir.Value:
    if emitter.window is None:
        return emitter.tape.op("MatMul", [source, emitter.store.transposed(emitter.tape, op.weight, emitter.name)])
    kernel = op.weight.reshape(*op.weight.shape, *emitter.window.kernel)
    value = emitter.store.tensor(emitter.tape, kernel, emitter.name)
    return emitter.tape.op("Conv", [source, value], [ir.AttrInt64s("strides", emitter.window.strides)])


def _identity(emitter: Emitter, op: Identity, source: ir.Value) -> ir.Value:
    return emitter.tape.op("Identity", [emitter.strided(source)])


def _diagonal(emitter: Emitter, op: Diagonal, source: ir.Value) -> ir.Value:
    scale = emitter.store.tensor(emitter.tape, emitter.channelwise(op.values), emitter.name)
    return emitter.tape.op("Mul", [emitter.strided(source), scale])


def _select(emitter: Emitter, op: Select, source: ir.Value) -> ir.Value:
    indices = emitter.store.tensor(emitter.tape, op.indices.long(), f"{emitter.name}.indices")
    return emitter.tape.op("Gather", [emitter.strided(source), indices], [ir.AttrInt64("axis", emitter.axis)])


def _product(emitter: Emitter, op: Product, source: ir.Value) -> ir.Value:
    inner = emitter.inner("right").apply(op.right, source)
    return emitter.later("left").apply(op.left, inner)


def _sum(emitter: Emitter, op: Sum, source: ir.Value) -> ir.Value:
    terms = [emitter.inner(f"term{index}").apply(term, source) for index, term in enumerate(op.terms)]
    total = terms[0]
    for term in terms[1:]:
        total = emitter.tape.op("Add", [total, term])
    return total


def _stack(emitter: Emitter, op: Stack, source: ir.Value) -> ir.Value:
    parts = [emitter.inner(f"part{index}").apply(part, source) for index, part in enumerate(op.parts)]
    return emitter.tape.op("Concat", parts, [ir.AttrInt64("axis", emitter.axis)])


def _scaled(emitter: Emitter, op: Scaled, source: ir.Value) -> ir.Value:
    value = emitter.apply(op.operator, source)
    return emitter.tape.op("Mul", [value, emitter.store.tensor(emitter.tape, op.scale, f"{emitter.name}.scale")])


def _choose(emitter: Emitter, op: Choose, source: ir.Value) -> ir.Value:
    """A file binds the index as a constant, so the operator that it picks is the one that is stored."""
    return emitter.apply(op.operators[int(op.index)], source)


def _computed(emitter: Emitter, op: LinearOperator, source: ir.Value) -> ir.Value:
    matrix = MATRICES[type(op)](emitter, op)  # (out, in)
    turned = emitter.tape.op("Transpose", [matrix], [ir.AttrInt64s("perm", [1, 0])])
    return emitter.multiply(turned, source)


def _transposed(emitter: Emitter, op: Transposed, source: ir.Value) -> ir.Value:
    rule = MATRICES.get(type(op.operator))
    if rule is None:
        raise UnsupportedError(f"no ONNX form for the transpose of {type(op.operator).__name__}", where=emitter.name)
    return emitter.multiply(rule(emitter, op.operator), source)


# -- matrices that the runtime computes once, from less than they hold ------------------------


def _zeros(emitter: Emitter, shape: tuple[int, ...], dtype: torch.dtype) -> ir.Value:
    extent = emitter.store.tensor(emitter.tape, torch.tensor(shape), f"{emitter.name}.shape")
    fill = from_torch(torch.zeros(1, dtype=dtype), "zero")
    value = emitter.tape.op("ConstantOfShape", [extent], [ir.AttrTensor("value", fill)])
    value.shape = ir.Shape(shape)
    value.type = ir.TensorType(fill.dtype)
    return value


def _select_matrix(emitter: Emitter, op: Select) -> ir.Value:
    ones = torch.ones(op.shape[0], 1)
    return _semi_sparse_matrix(emitter, SemiSparse(ones, op.indices[:, None], op.size))


def _semi_sparse_matrix(emitter: Emitter, op: SemiSparse) -> ir.Value:
    zeros = _zeros(emitter, op.shape, op.values.dtype)
    indices = emitter.store.tensor(emitter.tape, op.indices.to(torch.int32), f"{emitter.name}.indices")
    values = emitter.store.tensor(emitter.tape, op.values, f"{emitter.name}.values")
    attributes: list[ir.Attr] = [ir.AttrInt64("axis", 1), ir.AttrString("reduction", "add")]
    return emitter.tape.op("ScatterElements", [zeros, indices, values], attributes)


def _block_sparse_matrix(emitter: Emitter, op: BlockSparse) -> ir.Value:
    """Blocks scattered on their grid, which is then folded into a matrix."""
    zeros = _zeros(emitter, (*op.grid, *op.blocks.shape[1:]), op.blocks.dtype)
    places = emitter.store.tensor(emitter.tape, torch.stack((op.rows, op.columns), 1).long(), f"{emitter.name}.places")
    blocks = emitter.store.tensor(emitter.tape, op.blocks, f"{emitter.name}.blocks")
    scattered = emitter.tape.op("ScatterND", [zeros, places, blocks], [ir.AttrString("reduction", "add")])
    swapped = emitter.tape.op("Transpose", [scattered], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
    shape = emitter.store.tensor(emitter.tape, torch.tensor(op.shape), f"{emitter.name}.shape")
    return emitter.tape.op("Reshape", [swapped, shape])


def _quantized_matrix(emitter: Emitter, op: Quantized) -> ir.Value:
    """DequantizeLinear per row, or per block of columns, which standard ONNX has from opset 21 on.

    Raises:
        UnsupportedError: groups of columns in a model of an older opset, or that do not divide the columns.
    """
    grouped = op.scale.shape[1] > 1
    if grouped and (emitter.store.opset < 21 or op.shape[1] % op.group):
        raise UnsupportedError(
            f"scales for groups of {op.group} columns need opset 21 and whole groups, not opset {emitter.store.opset}",
            where=emitter.name,
            hint="convert the model to opset 21, or quantise per row",
        )
    shape = (lambda t: t) if grouped else (lambda t: t.reshape(-1))
    inputs = [emitter.store.tensor(emitter.tape, op.codes, f"{emitter.name}.codes")]
    inputs.append(emitter.store.tensor(emitter.tape, shape(op.scale), f"{emitter.name}.scale"))
    if op.zero is not None:
        inputs.append(emitter.store.tensor(emitter.tape, shape(op.zero).to(op.codes.dtype), f"{emitter.name}.zero"))
    attributes = [ir.AttrInt64("axis", 1), ir.AttrInt64("block_size", op.group)] if grouped else [ir.AttrInt64("axis", 0)]
    return emitter.tape.op("DequantizeLinear", inputs, attributes)


RULES: dict[type[LinearOperator], Callable[..., ir.Value]] = {
    Dense: _dense,
    Identity: _identity,
    Diagonal: _diagonal,
    Select: _select,
    Product: _product,
    Sum: _sum,
    Stack: _stack,
    Scaled: _scaled,
    Choose: _choose,
    SemiSparse: _computed,
    BlockSparse: _computed,
    Quantized: _computed,
    Transposed: _transposed,
}

MATRICES: dict[type[LinearOperator], Callable[..., ir.Value]] = {
    Select: _select_matrix,
    SemiSparse: _semi_sparse_matrix,
    BlockSparse: _block_sparse_matrix,
    Quantized: _quantized_matrix,
}
