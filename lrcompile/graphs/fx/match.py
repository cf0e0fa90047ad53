"""What a node of a captured graph computes with a weight, whatever it is called: torch's functions or ``aten``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from lrcompile.sites import Window

aten = torch.ops.aten
linear: Any = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue] - what torch captures for F.linear

LINEAR = frozenset({linear, functional.linear, aten.linear.default})
PRODUCTS = frozenset({torch.matmul, torch.mm, aten.mm.default, aten.matmul.default})
ADDMM = frozenset({torch.addmm, aten.addmm.default})
BATCHED = frozenset({torch.bmm, aten.bmm.default})
EINSUM = frozenset({torch.einsum, aten.einsum.default})
CONVS = frozenset(
    {torch.conv1d, torch.conv2d, torch.conv3d}
    | {getattr(getattr(aten, f"conv{rank}d"), form) for rank in (1, 2, 3) for form in ("default", "padding")}
)
CONVOLUTION = frozenset({aten.convolution.default})


@dataclass(frozen=True, eq=False)
class Geometry:
    """Arguments of a convolution as they stand in the graph."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: Any = 1
    transposed: bool = False

    def window(self, kernel: Sequence[int]) -> Window | None:
        """The window of a kernel of these sizes; None where they are not all plain numbers."""
        sizes = tuple(int(size) for size in kernel)
        strides, dilations = (_each(value, len(sizes)) for value in (self.stride, self.dilation))
        pads = _pads(self.padding, sizes, dilations)
        numbers = (*strides, *pads, *dilations)
        if self.transposed or not all(isinstance(number, int) for number in numbers):
            return None
        return Window(sizes, strides, pads, dilations)


@dataclass(frozen=True, eq=False)
class Call:
    """A node that multiplies by a matrix or convolves with a kernel; which operand is constant is not looked at.

    Args:
        kind: ``Linear`` has a weight (out, in), ``Conv1D`` (in, out), ``Batched`` (batch, in, out), and
            ``Conv`` a kernel (out, in / groups, *kernel).
    """

    node: fx.Node
    kind: str
    input: Any
    weight: Any
    bias: Any = None
    geometry: Geometry | None = None


def call_of(node: fx.Node) -> Call | None:
    """How a node uses a matrix or kernel; None for everything else."""
    if node.op != "call_function":
        return None
    target = node.target
    if target in LINEAR:
        given = _named(node, ("input", "weight", "bias"))
        return Call(node, "Linear", given.get("input"), given.get("weight"), given.get("bias"))
    if target in PRODUCTS and len(node.args) == 2:
        return Call(node, "Conv1D", node.args[0], node.args[1])
    if target in ADDMM and len(node.args) == 3 and all(factor == 1 for factor in node.kwargs.values()):
        return Call(node, "Conv1D", node.args[1], node.args[2], node.args[0])
    if target in BATCHED and len(node.args) == 2:
        return Call(node, "Batched", node.args[0], node.args[1])
    if target in EINSUM:
        return _einsum(node)
    return _convolution(node) if target in CONVS or target in CONVOLUTION else None


def _named(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _einsum(node: fx.Node) -> Call | None:
    """``...k,km->...m`` and ``...k,mk->...m``, with letters in the place of the dots."""
    if len(node.args) < 2 or not isinstance(node.args[0], str) or not isinstance(node.args[1], list | tuple):
        return None
    left, _, result = node.args[0].replace(" ", "").partition("->")
    parts, operands = left.split(","), list(node.args[1])
    if len(parts) != 2 or len(operands) != 2 or len(parts[1]) != 2 or not parts[0] or not result:
        return None
    (first, second), (value, weight) = parts, operands
    outer, inner = first[:-1], first[-1]
    if inner in outer or len(set(outer)) != len(outer) or set(second) & set(outer) or second[0] == second[1]:
        return None
    if second[0] == inner and result == outer + second[1]:
        return Call(node, "Conv1D", value, weight)
    return Call(node, "Linear", value, weight) if second[1] == inner and result == outer + second[0] else None


def _convolution(node: fx.Node) -> Call:
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if node.target in CONVOLUTION:
        names[6:] = ["transposed", "output_padding", "groups"]
    given = _named(node, names)
    geometry = {
        name: given[name] for name in ("stride", "padding", "dilation", "groups", "transposed") if name in given
    }
    return Call(node, "Conv", given.get("input"), given.get("weight"), given.get("bias"), Geometry(**geometry))


def _pads(padding: Any, kernel: tuple[int, ...], dilations: tuple[int, ...]) -> tuple[int, ...]:
    """Zeros before each axis, then behind each axis."""
    if padding == "same":
        total = [(size - 1) * spread for size, spread in zip(kernel, dilations, strict=True)]
        return (*(size // 2 for size in total), *(size - size // 2 for size in total))
    return _each(0 if padding == "valid" else padding, len(kernel)) * 2


def _each(value: Any, axes: int) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, tuple | list) else (value,)
    return found * axes if len(found) == 1 else found
