"""Linear operators as standard ONNX operators: the rule table behind the ``onnxruntime`` backend.

Weights are stored as ``(in, out)``, the way MatMul wants them; a tensor that several
expressions share is stored once, and a product that several sites share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.backends.onnx_emit import Emitter
from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.linop import (
    BlockSparse,
    Choose,
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Stack,
    Sum,
    Transposed,
    transpose,
)


def _dense(emitter: Emitter, op: Dense, source: ir.Value) -> ir.Value:
    if emitter.window is None:
        return emitter.op("MatMul", [source, emitter.floats(op.weight.mT)])
    kernel = op.weight.unflatten(-1, (-1, *emitter.window.kernel))
    return emitter.conv(source, emitter.floats(kernel))


def _identity(emitter: Emitter, op: Identity, source: ir.Value) -> ir.Value:
    return emitter.strided(source)


def _diagonal(emitter: Emitter, op: Diagonal, source: ir.Value) -> ir.Value:
    return emitter.op("Mul", [emitter.strided(source), emitter.floats(emitter.channelwise(op.values))])


def _select(emitter: Emitter, op: Select, source: ir.Value) -> ir.Value:
    whole = emitter.piece(source, op.indices)
    if whole is not None:
        return whole
    return emitter.op("Gather", [emitter.strided(source), emitter.indices(op.indices)], axis=emitter.axis)


def _product(emitter: Emitter, op: Product, source: ir.Value) -> ir.Value:
    return emitter.through(op, source)[0]


def _kron(emitter: Emitter, op: Kron, source: ir.Value) -> ir.Value:
    """One factor after the other, each on an axis of its own."""
    emitter.needs(10, "Kronecker products")
    (_, slow), (_, fast) = op.left.shape, op.right.shape
    out, source = op.shape[0], emitter.strided(source)
    plain, size = emitter.under(None), emitter.op("Shape", [source])
    if emitter.window is None:
        value = emitter.op("Reshape", [source, emitter.shape(-1, slow, fast)])
        value = emitter.op("Transpose", [plain.part("right").apply(op.right, value)], perm=[0, 2, 1])
        value = emitter.op("Transpose", [plain.part("left").apply(op.left, value)], perm=[0, 2, 1])
        rest = emitter.op("Slice", [size, emitter.shape(0), emitter.shape(-1)])
        return emitter.op("Reshape", [value, emitter.op("Concat", [rest, emitter.shape(out)], axis=0)])
    value = emitter.op("Reshape", [source, emitter.shape(0, slow, fast, -1)])
    value = emitter.op("Transpose", [value], perm=[0, 1, 3, 2])
    value = emitter.op("Transpose", [plain.part("right").apply(op.right, value)], perm=[0, 3, 2, 1])
    value = emitter.op("Transpose", [plain.part("left").apply(op.left, value)], perm=[0, 3, 1, 2])
    spatial = emitter.op("Slice", [size, emitter.shape(2), emitter.shape(2**62)])
    return emitter.op("Reshape", [value, emitter.op("Concat", [emitter.shape(0, out), spatial], axis=0)])


def _sum(emitter: Emitter, op: Sum, source: ir.Value) -> ir.Value:
    return _added(emitter, [emitter.part(f"term{i}").apply(term, source) for i, term in enumerate(op.terms)])


def _added(emitter: Emitter, values: list[ir.Value]) -> ir.Value:
    total = values[0]
    for value in values[1:]:
        total = emitter.op("Add", [total, value])
    return total


def _stack(emitter: Emitter, op: Stack, source: ir.Value) -> ir.Value:
    parts = [(part.shape[0], emitter.part(f"part{i}").apply(part, source)) for i, part in enumerate(op.parts)]
    return emitter.together(parts)


def _scaled(emitter: Emitter, op: Scaled, source: ir.Value) -> ir.Value:
    return emitter.op("Mul", [emitter.apply(op.operator, source), emitter.floats(op.scale, "scale")])


def _choose(emitter: Emitter, op: Choose, source: ir.Value) -> ir.Value:
    """A file binds the index as a constant, so the operator that it picks is the one that is stored."""
    picked = int(op.index)
    if not 0 <= picked < len(op.operators):
        raise InvalidInputError(f"index {picked} of Choose is not in 0..{len(op.operators) - 1}", where=emitter.name)
    return emitter.apply(op.operators[picked], source)


def _computed(emitter: Emitter, op: LinearOperator, source: ir.Value) -> ir.Value:
    return emitter.multiply(_matrix(emitter, op), op.shape, source, turned=False)


def _matrix(emitter: Emitter, op: LinearOperator) -> ir.Value:
    """A matrix (out, in) that the runtime computes, once for all that read it."""
    return emitter.store.once((op, emitter.dtype), lambda: MATRICES[type(op)](emitter, op))


def _transposed(emitter: Emitter, op: Transposed, source: ir.Value) -> ir.Value:
    closed = transpose(op.operator)
    if not isinstance(closed, Transposed):
        return emitter.apply(closed, source)
    if isinstance(op.operator, Stack):
        return _added(emitter, _pieces(emitter, op.operator, source))
    if type(op.operator) not in MATRICES:
        raise UnsupportedError(f"no ONNX form for the transpose of {type(op.operator).__name__}", where=emitter.name)
    return emitter.multiply(_matrix(emitter, op.operator), op.shape, source, turned=True)


def _pieces(emitter: Emitter, op: Stack, source: ir.Value) -> list[ir.Value]:
    """What the transpose of each part makes of its channels of the source."""
    emitter.needs(10, "transposed stacks")
    values, start = [], 0
    for index, part in enumerate(op.parts):
        ends = (start, start + part.shape[0])
        bounds = [emitter.shape(number) for number in (*ends, emitter.axis)]
        piece = emitter.op("Slice", [source, *bounds])
        values.append(emitter.part(f"part{index}").apply(transpose(part), piece))
        start = ends[1]
    return values


# -- matrices that the runtime computes, from less than they hold ----------------------------------


def _select_matrix(emitter: Emitter, op: Select) -> ir.Value:
    emitter.needs(11, "transposed selections")
    ones = emitter.filled(1.0, op.shape[0], 1)
    zeros = emitter.filled(0.0, *op.shape)
    return emitter.op("ScatterElements", [zeros, emitter.indices(op.indices[:, None]), ones], axis=1)


def _semi_sparse_matrix(emitter: Emitter, op: SemiSparse) -> ir.Value:
    """Entries scattered into zeros; repeated columns need the reduction that ONNX has from opset 16 on."""
    ordered = op.indices.long().sort(-1).values
    repeats = bool((ordered[:, 1:] == ordered[:, :-1]).any())
    emitter.needs(16 if repeats else 11, "sparse rows")
    return _scattered(emitter, "ScatterElements", op.shape, emitter.indices(op.indices), op.values, repeats, axis=1)


def _scattered(
    emitter: Emitter, kind: str, shape: tuple[int, ...], places: ir.Value, held: Tensor, repeats: bool, **more: int
) -> ir.Value:
    """Values scattered into zeros; ONNX Runtime adds up in 32 and 64 bits only."""
    wide = torch.float32 if repeats and emitter.dtype.itemsize < 4 else emitter.dtype
    values = emitter.cast(emitter.tensor(held, "values"), held.dtype, wide)
    attributes = {**more, **({"reduction": "add"} if repeats else {})}
    result = emitter.op(kind, [emitter.filled(0.0, *shape, dtype=wide), places, values], **attributes)
    return emitter.cast(result, wide, emitter.dtype)


def _block_sparse_matrix(emitter: Emitter, op: BlockSparse) -> ir.Value:
    """Blocks scattered on their grid, which is then folded into a matrix."""
    places = torch.stack((op.rows, op.columns), 1)
    repeats = len(places.unique(dim=0)) < len(places)
    emitter.needs(16 if repeats else 11, "sparse blocks")
    shape = (*op.grid, *op.blocks.shape[1:])
    scattered = _scattered(emitter, "ScatterND", shape, emitter.indices(places, "places"), op.blocks, repeats)
    return emitter.op("Reshape", [emitter.op("Transpose", [scattered], perm=[0, 2, 1, 3]), emitter.shape(*op.shape)])


def _quantized(emitter: Emitter, op: Quantized, source: ir.Value) -> ir.Value:
    """Codes in blocks stay packed where the model has such nodes already, else DequantizeLinear unpacks them."""
    block = op.group
    fits = op.bits in (2, 4, 8) and block >= 16 and not block & (block - 1) and op.codes.dtype == torch.uint8
    if not (emitter.store.blocks and emitter.window is None and fits and op.zero is not None):
        return _computed(emitter, op, source)
    if emitter.dtype not in (torch.float32, torch.float16):
        return _computed(emitter, op, source)
    (rows, columns), blocks = op.shape, op.scale.shape[1]
    codes = torch.nn.functional.pad(op.codes, (0, blocks * block - columns))
    packed = _packed_bytes(codes, op.bits).reshape(rows, blocks, block * op.bits // 8)
    zeros = _packed_bytes(op.zero, op.bits).flatten()
    inputs = [source, emitter.kept(op.codes, packed), emitter.floats(op.scale.flatten(), "scale")]
    inputs.append(emitter.kept(op.zero, zeros, "zero"))
    sizes = {"K": columns, "N": rows, "bits": op.bits, "block_size": block}
    return emitter.op("MatMulNBits", inputs, domain="com.microsoft", **sizes)


def _packed_bytes(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of bytes, the low bits first; the last byte is filled up with zeros."""
    share = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % share)).unflatten(-1, (-1, share))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (filled << shifts).sum(-1, dtype=torch.uint8)


def _quantized_matrix(emitter: Emitter, op: Quantized) -> ir.Value:
    """DequantizeLinear, from opset 13 on per row and from opset 21 on in groups; plain arithmetic before."""
    grouped = op.scale.shape[1] > 1
    opset = emitter.store.opset
    if opset < (21 if grouped else 13):
        return _dequantized(emitter, op)
    # float64 never was a type of scales, half precision is one from opset 19 on
    wide = torch.float32 if emitter.dtype == torch.float64 or opset < 19 else emitter.dtype
    bits = 4 if op.bits == 4 and opset >= 21 else 0

    def shaped(value: Tensor) -> Tensor:
        return value if grouped else value.reshape(-1)

    codes = emitter.store.tensor(emitter.tape, op.codes, f"{emitter.name}.codes", bits)
    inputs = [codes, emitter.cast(emitter.tensor(shaped(op.scale), "scale"), op.scale.dtype, wide)]
    if op.zero is not None:
        inputs.append(emitter.store.tensor(emitter.tape, shaped(op.zero), f"{emitter.name}.zero", bits))
    attributes = {"axis": 1, "block_size": op.group} if grouped else {"axis": 0}
    value = emitter.cast(emitter.op("DequantizeLinear", inputs, **attributes), wide, emitter.dtype)
    if emitter.window is not None:
        return value
    # ONNX Runtime rounds the activations to 8 bits where a MatMul reads DequantizeLinear, but not through a Reshape
    return emitter.op("Reshape", [value, emitter.shape(*op.shape)])


def _dequantized(emitter: Emitter, op: Quantized) -> ir.Value:
    """``scale * (codes - zero)`` written out; scale and zero are spread over their groups."""
    emitter.needs(10, "quantised groups")
    value = emitter.floats(op.codes, "codes")
    if op.zero is not None:
        value = emitter.op("Sub", [value, _spread(emitter, emitter.floats(op.zero, "zero"), op)])
    return emitter.op("Mul", [value, _spread(emitter, emitter.floats(op.scale, "scale"), op)])


def _spread(emitter: Emitter, value: ir.Value, op: Quantized) -> ir.Value:
    """(out, groups) repeated to (out, in); the last group may be shorter than the others."""
    rows, groups = op.scale.shape
    column = emitter.op("Reshape", [value, emitter.shape(rows, groups, 1)])
    wide = emitter.op("Expand", [column, emitter.shape(rows, groups, op.group)])
    flat = emitter.op("Reshape", [wide, emitter.shape(rows, groups * op.group)])
    return emitter.op("Slice", [flat, emitter.shape(0), emitter.shape(op.shape[1]), emitter.shape(1)])


RULES: dict[type[LinearOperator], Callable[..., ir.Value]] = {
    Dense: _dense,
    Identity: _identity,
    Diagonal: _diagonal,
    Select: _select,
    Product: _product,
    Kron: _kron,
    Sum: _sum,
    Stack: _stack,
    Scaled: _scaled,
    Choose: _choose,
    SemiSparse: _computed,
    BlockSparse: _computed,
    Quantized: _quantized,
    Transposed: _transposed,
}

MATRICES: dict[type[LinearOperator], Callable[..., ir.Value]] = {
    Select: _select_matrix,
    SemiSparse: _semi_sparse_matrix,
    BlockSparse: _block_sparse_matrix,
    Quantized: _quantized_matrix,
}
