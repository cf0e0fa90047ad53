"""Operators that move values about: shapes, slices, gathers, constants."""

from __future__ import annotations

from math import prod
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.graphs.onnx.torched.table import filling, ints, rule, wide

_FAR = 2**31 - 1


@rule("Shape")
def _shape(node: ir.Node, x: Tensor) -> Tensor:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@rule("Size")
def _size(node: ir.Node, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@rule("Constant")
def _constant(node: ir.Node) -> Tensor:
    (attribute,) = node.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        return wide(to_torch(attribute.as_tensor()))
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
        return torch.tensor(attribute.value, dtype=torch.int64)
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return torch.tensor(attribute.value, dtype=torch.float32)
    raise NotImplementedError(f"Constant of {attribute.type.name}")


@rule("ConstantOfShape")
def _filled(node: ir.Node, shape: Tensor) -> Tensor:
    number, dtype = filling(node)
    return torch.full(ints(shape), number, dtype=dtype)


@rule("Reshape")
def _reshape(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape)
    if not node.attributes.get_int("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@rule("Flatten")
def _flatten(node: ir.Node, x: Tensor) -> Tensor:
    axis = node.attributes.get_int("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


@rule("Transpose")
def _transpose(node: ir.Node, x: Tensor) -> Tensor:
    return x.permute(*node.attributes.get_ints("perm", list(range(x.ndim))[::-1]))


def _axes(node: ir.Node, axes: Tensor | None) -> list[int]:
    return ints(axes) if axes is not None else list(node.attributes.get_ints("axes", []))


@rule("Squeeze")
def _squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(node, axes) or [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(chosen))


@rule("Unsqueeze")
def _unsqueeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(node, axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@rule("Expand")
def _expand(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape)))


@rule("Concat")
def _concat(node: ir.Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node.attributes["axis"].as_int())


@rule("Split")
def _split(node: ir.Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = node.attributes.get_int("axis", 0)
    given = ints(sizes) if sizes is not None else list(node.attributes.get_ints("split", []))
    if not given:
        count = node.attributes.get_int("num_outputs", len(node.outputs))
        each = -(-x.shape[axis] // count)
        given = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    return x.split(given, axis)


def _near(end: Any) -> Any:
    """An end of a slice as a number of 32 bits: exporters write the largest there is for "all", and torch warns."""
    return max(min(end, _FAR), -_FAR) if isinstance(end, int) else end


@rule("Slice")
def _slice(
    node: ir.Node, x: Tensor, starts: Tensor | None = None, ends: Tensor | None = None,
    axes: Tensor | None = None, steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    first = ints(starts) if starts is not None else list(node.attributes.get_ints("starts", []))
    last = ints(ends) if ends is not None else list(node.attributes.get_ints("ends", []))
    chosen = ints(axes) if axes is not None else list(node.attributes.get_ints("axes", range(len(first))))
    strides = ints(steps) or [1] * len(first)
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(_near(start), _near(end), step),)]
        else:
            where = range(x.shape[axis])[slice(start, end, step)]
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64))
    return x


@rule("Gather")
def _gather(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.attributes.get_int("axis", 0) % max(x.ndim, 1)
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    found = x.index_select(axis, wrapped.reshape(-1))
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@rule("GatherElements")
def _gather_elements(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.attributes.get_int("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@rule("GatherND")
def _gather_nd(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    shared = node.attributes.get_int("batch_dims", 0)
    lead = [
        torch.arange(size).reshape([-1 if axis == d else 1 for d in range(indices.ndim - 1)])
        for axis, size in enumerate(x.shape[:shared])
    ]
    return x[(*lead, *indices.unbind(-1))]


@rule("ScatterND")
def _scatter_nd(node: ir.Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if node.attributes.get_string("reduction", "none") != "none":
        raise NotImplementedError("ScatterND with a reduction")
    return x.index_put(tuple(indices.unbind(-1)), updates)


@rule("ScatterElements")
def _scatter_elements(node: ir.Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if node.attributes.get_string("reduction", "none") != "none":
        raise NotImplementedError("ScatterElements with a reduction")
    axis = node.attributes.get_int("axis", 0)
    return x.scatter(axis, torch.where(indices < 0, indices + x.shape[axis], indices), updates)


@rule("Tile")
def _tile(node: ir.Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


@rule("Range")
def _range(node: ir.Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@rule("Trilu")
def _trilu(node: ir.Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else ints(k)[0]
    return torch.triu(x, diagonal) if node.attributes.get_int("upper", 1) else torch.tril(x, diagonal)


@rule("NonZero")
def _nonzero(node: ir.Node, x: Tensor) -> Tensor:
    return torch.nonzero(x).T


@rule("TopK")
def _topk(node: ir.Node, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    axis, largest = node.attributes.get_int("axis", -1), bool(node.attributes.get_int("largest", 1))
    found = torch.sort(x, dim=axis, descending=largest, stable=True)  # of equal values the first counts
    (count,) = ints(k)
    return found.values.narrow(axis, 0, count), found.indices.narrow(axis, 0, count)


@rule("OneHot")
def _one_hot(node: ir.Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    (count,), axis = ints(depth), node.attributes.get_int("axis", -1)
    inside = ((indices >= -count) & (indices < count)).unsqueeze(-1)
    found = (F.one_hot(indices.long() % count, count).bool() & inside).movedim(-1, axis)
    return torch.where(found, values[1], values[0])


@rule("Pad")
def _pad(node: ir.Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None,
         axes: Tensor | None = None) -> Tensor:  # fmt: skip
    amounts = ints(pads) if pads is not None else list(node.attributes.get_ints("pads", []))
    chosen = [axis % x.ndim for axis in ints(axes)] or list(range(x.ndim))
    before = dict(zip(chosen, amounts[: len(chosen)], strict=True))
    after = dict(zip(chosen, amounts[len(chosen) :], strict=True))
    flat = [each.get(axis, 0) for axis in reversed(range(x.ndim)) for each in (before, after)]
    mode = node.attributes.get_string("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    while flat[-2:] == [0, 0]:  # torch pads the last axes only, in these modes
        flat = flat[:-2]
    return F.pad(x, flat, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


@rule("DepthToSpace")
def _depth_to_space(node: ir.Node, x: Tensor) -> Tensor:
    size = node.attributes["blocksize"].as_int()
    if node.attributes.get_string("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    parts = x.reshape(n, size, size, c // size**2, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // size**2, h * size, w * size)
