"""What a match is: a linear map that a few nodes compute."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.linop import BlockSparse, Dense, LinearOperator, Quantized, SemiSparse, leaves, tensors
from lrcompile.sites import Window

MAX_NODES = 64
"""An expression stops growing here, so that a long chain of scales stays linear in cost."""


@dataclass(frozen=True, eq=False)
class Match:
    """A linear map that a few nodes compute.

    ``root = operator(source) (+ bias) (+ offset)``; ``axis`` is the channel axis of ``source``: -1, 1 for
    a convolution, 0 where a Gemm reads its input by columns.
    """

    source: ir.Value
    root: ir.Value
    operator: LinearOperator
    nodes: tuple[ir.Node, ...]
    weight: ir.Value | None = None
    kind: str = "MatMul"
    axis: int = -1
    window: Window | None = None
    bias: ir.Value | None = None  # inside the last node (Gemm's C, Conv's B)
    beta: float = 1.0
    adder: ir.Node | None = None  # a following Add of a constant vector
    offset: Tensor | None = None  # (out,): what constants further inside add
    owner: ir.Node | None = None  # the If, Loop or Scan in whose body it stands
    refused: str = ""  # why it can be shown, but not rewritten


def private(value: ir.Value) -> bool:
    """Whether a single node reads the value, and nobody outside the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def has_weight(operator: LinearOperator) -> bool:
    """Whether a matrix is stored in an expression."""
    return any(isinstance(leaf, BlockSparse | Dense | Quantized | SemiSparse) for leaf in leaves(operator))


def path_dtype(match: Match) -> torch.dtype:
    """The type of what flows through a match, which is the type of its weights."""
    stored = [tensor for _, tensor in tensors(match.operator) if tensor.is_floating_point()]
    return next((tensor.dtype for tensor in stored if tensor.ndim > 0), torch.float32)


def together(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two constants of which either may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return one.double() + other.double()


def describe(match: Match) -> str:
    """The operator types that a site is written with, and the node whose body it stands in, for reports."""
    kinds = "+".join(dict.fromkeys(node.op_type for node in match.nodes))
    return kinds if match.owner is None else f"{kinds} in {match.owner.op_type}"


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds: branches of an If, bodies of a Loop or Scan."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found
