"""Weights that the graph computes from less than they hold: codes with scales, sparse rows, sparse blocks."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.graphs.onnx.constants import FLOATS, constant, integers
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import BlockSparse, LinearOperator, Quantized, Select, SemiSparse, transpose

_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


def _codes(node: ir.Node) -> tuple[Tensor, Tensor, Tensor | None, int] | None:
    """Codes, scale, zero and bits of a DequantizeLinear whose inputs are all constant."""
    values = [tensor for tensor in map(constant, node.inputs) if tensor is not None]
    if len(values) < 2 or len(values) != sum(value is not None for value in node.inputs):
        return None
    codes, scale = to_torch(values[0]), to_torch(values[1])
    zero = to_torch(values[2]) if len(values) > 2 else None
    if codes.dtype not in (torch.int8, torch.uint8) or not scale.is_floating_point():
        return None
    if zero is not None and not zero.any() and codes.dtype == torch.int8:
        zero = None  # symmetric codes are often written with zeros
    return codes, scale, zero, 4 if values[0].dtype in _FOUR_BITS else 8


def _dequantize_rule(node: ir.Node) -> LinearOperator | None:
    """Codes of a matrix with one scale, a scale per row or column, or per block of either."""
    found = _codes(node)
    if found is None or found[0].ndim != 2:
        return None
    codes, scale, zero, bits = found
    axis, block = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
    if scale.numel() == 1 and not block:
        return _by_row(codes, scale, zero, bits)
    if (block and axis == 1 and scale.ndim == 2) or (not block and axis == 0 and scale.ndim == 1):
        return _by_row(codes, scale, zero, bits, block)
    if (block and axis == 0 and scale.ndim == 2) or (not block and axis == 1 and scale.ndim == 1):
        grid = None if zero is None else _turned(zero)
        return transpose(_by_row(codes.T, _turned(scale), grid, bits, block))
    return None


def _turned(grid: Tensor) -> Tensor:
    return grid.T if grid.ndim == 2 else grid


def _by_row(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block: int = 0) -> Quantized:
    """Codes (out, in); a single scale is spread over the rows without being stored more than once."""
    rows, columns = codes.shape

    def grid(value: Tensor) -> Tensor:
        if value.numel() == 1 and not block:
            return value.reshape(1, 1).expand(rows, 1) if rows > 1 else value.reshape(1, 1)
        return value if block else value.reshape(-1, 1)

    return Quantized(codes, grid(scale), None if zero is None else grid(zero), block or max(columns, 1), bits)


def quantized_kernel(node: ir.Node) -> tuple[tuple[int, ...], LinearOperator | None]:
    """Shape of a convolution's codes, and the matrix (out, in * places) that they are."""
    found = _codes(node)
    if found is None or found[0].ndim < 3:
        return (), None
    codes, scale, zero, bits = found
    axis = node.attributes.get_int("axis", 1) % codes.ndim
    if node.attributes.get_int("block_size", 0) or (scale.numel() != 1 and (axis != 0 or scale.ndim != 1)):
        return (), None
    return tuple(codes.shape), _by_row(codes.reshape(codes.shape[0], -1), scale, zero, bits)


def packed_blocks(node: ir.Node) -> LinearOperator | None:
    """The weight (N, K) of ONNX Runtime's MatMulNBits; None where its columns are shuffled or zeros are real."""
    attributes = node.attributes
    rows, columns, bits = (attributes.get_int(name, default) for name, default in (("N", 0), ("K", 0), ("bits", 4)))
    block = attributes.get_int("block_size", 0)
    if bits not in (2, 4, 8) or rows is None or columns is None or not block:
        return None
    blocks = -(-columns // block)
    given = [*node.inputs, *[None] * 5][1:5]
    packed, scale, zero = (constant(value) for value in given[:3])
    if packed is None or scale is None or given[3] is not None or (given[2] is not None and zero is None):
        return None
    if zero is not None and zero.dtype != ir.DataType.UINT8:
        return None
    codes = _unpacked(to_torch(packed).reshape(rows, -1), bits)[:, :columns].contiguous()
    zeros = torch.full((rows, blocks), 2 ** (bits - 1), dtype=torch.uint8)
    if zero is not None:
        zeros = _unpacked(to_torch(zero).reshape(rows, -1), bits)[:, :blocks].contiguous()
    return Quantized(codes, to_torch(scale).reshape(rows, blocks), zeros, block, bits)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Rows of bytes as rows of codes, the low bits first."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def _filled(value: ir.Value | None) -> tuple[tuple[int, ...], float] | None:
    """Shape and number of a tensor that holds one number everywhere."""
    node = value.producer() if value is not None else None
    if node is not None and (node.domain, node.op_type) == ("", "ConstantOfShape"):
        shape, fill = integers(node.inputs[0]), node.attributes.get("value")
        if shape is None:
            return None
        return tuple(shape.tolist()), 0.0 if fill is None else float(to_torch(fill.as_tensor()).reshape(()))
    tensor = constant(value)
    if tensor is None or tensor.dtype not in FLOATS or tensor.size == 0:
        return None
    first = to_torch(tensor).reshape(-1)
    return (tuple(tensor.shape.numpy()), float(first[0])) if bool((first == first[0]).all()) else None


def _within(index: Tensor, size: int) -> bool:
    return index.numel() == 0 or (int(index.min()) >= 0 and int(index.max()) < size)


def _scatter_elements_rule(node: ir.Node) -> LinearOperator | None:
    """A fixed number of entries in each row, scattered into zeros; a single one in each row picks."""
    zeros, index, ones = _filled(node.inputs[0]), integers(node.inputs[1]), _filled(node.inputs[2])
    if zeros is None or zeros[1] != 0 or len(zeros[0]) != 2 or node.attributes.get_int("axis", 0) not in (1, -1):
        return None
    (rows, columns), _ = zeros
    if index is None or index.ndim != 2 or index.shape[0] != rows or not _within(index, columns):
        return None
    stored = constant(node.inputs[2])
    if stored is None and ones is not None and ones == ((rows, 1), 1.0):
        return Select(index[:, 0], columns)
    if stored is None or stored.dtype not in FLOATS or tuple(stored.shape) != tuple(index.shape):
        return None
    return SemiSparse(to_torch(stored), index, columns)


def _reshape_rule(node: ir.Node) -> LinearOperator | None:
    """Codes that keep their shape, or ``Reshape(Transpose(ScatterND(zeros, places, blocks)))``: blocks on a grid."""
    swap = node.inputs[0].producer() if node.inputs[0] is not None else None
    if swap is not None and (swap.domain, swap.op_type) == ("", "DequantizeLinear"):
        shape, codes = integers(node.inputs[1]), constant(swap.inputs[0])
        same = shape is not None and codes is not None and shape.tolist() == list(codes.shape.numpy())
        return _dequantize_rule(swap) if same else None
    if swap is None or swap.op_type != "Transpose" or list(swap.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    scatter = swap.inputs[0].producer() if swap.inputs[0] is not None else None
    if scatter is None or scatter.op_type != "ScatterND":
        return None
    zeros, places, stored = _filled(scatter.inputs[0]), integers(scatter.inputs[1]), constant(scatter.inputs[2])
    if zeros is None or zeros[1] != 0 or len(zeros[0]) != 4 or places is None or stored is None:
        return None
    down, across, height, width = zeros[0]
    if tuple(stored.shape) != (len(places), height, width) or tuple(places.shape) != (len(places), 2):
        return None
    rows, columns = places[:, 0].contiguous(), places[:, 1].contiguous()
    if not (_within(rows, down) and _within(columns, across)):
        return None
    return BlockSparse(to_torch(stored), rows, columns, (down, across))


RULES: dict[tuple[str, str], Callable[[ir.Node], LinearOperator | None]] = {
    ("", "DequantizeLinear"): _dequantize_rule,
    ("", "ScatterElements"): _scatter_elements_rule,
    ("", "Reshape"): _reshape_rule,
}
