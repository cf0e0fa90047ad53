"""The largest constant-linear expressions of a flat graph, and who else reads their weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.graphs.fx.constants import Constants
from lrcompile.graphs.fx.match import Call, aten, call_of
from lrcompile.graphs.structured import place
from lrcompile.linop import BlockSparse, Dense, LinearOperator, Product, Scaled, Stack, Sum
from lrcompile.sites import Window

VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.view_as.default,
})  # fmt: skip
"""Operations that only look at a value in another shape."""
FACTORS = ".factors."
"""What the names of factors have in them."""
SPREADS = VIEWS | {aten.expand.default}


@dataclass(eq=False)
class Piece:
    """A constant-linear expression that ends at a node.

    Attributes:
        nodes: of the graph that it stands for, the last of them being its end.
        weights: constant nodes of its leaves; ``biases`` those of its bias.
        tentative: only of use inside a larger expression.
    """

    node: fx.Node
    operator: LinearOperator
    input: fx.Node
    bias: Tensor | None = None
    window: Window | None = None
    convolution: bool = False
    nodes: tuple[fx.Node, ...] = ()
    weights: tuple[fx.Node, ...] = ()
    biases: tuple[fx.Node, ...] = ()
    tentative: bool = False
    frozen: str = ""


@dataclass(eq=False)
class Raiser:
    """Raises the nodes of a graph, in its order."""

    constants: Constants
    pieces: dict[fx.Node, Piece] = field(default_factory=dict)
    _leaves: dict[Hashable, Dense] = field(default_factory=dict)

    def pieces_of(self, graph: fx.Graph) -> list[Piece]:
        """Every largest expression, in the order of the nodes where they end."""
        for node in graph.nodes:
            if node not in self.constants:
                piece = self._called(node) or self._combined(node)
                if piece is not None:
                    self.pieces[node] = piece
        inner = {node for piece in self.pieces.values() if not piece.tentative for node in piece.nodes[:-1]}
        return [piece for node, piece in self.pieces.items() if node not in inner and not piece.tentative]

    # -- leaves ----------------------------------------------------------------------------

    def _called(self, node: fx.Node) -> Piece | None:
        call = call_of(node)
        if call is None or not isinstance(call.input, fx.Node) or call.input in self.constants:
            return None
        source, weight = self._weight(call)
        if weight is None or not weight.is_floating_point() or not _axes(call, weight):
            return None
        bias = self.constants.tensor(call.bias)
        if (call.bias is not None and bias is None) or (bias is not None and bias.numel() != _outputs(call, weight)):
            return None
        leaf = self._leaf(call, weight)
        window = call.geometry.window(weight.shape[2:]) if call.geometry is not None else None
        if leaf is None or (call.geometry is not None and window is None):
            return None
        piece = Piece(
            node, leaf, call.input, None, window, call.geometry is not None, self._own(call, source), (source,),
            frozen=_frozen(call, bias, leaf),
        )  # fmt: skip
        if bias is not None and call.bias is not None:
            piece.bias, piece.biases = bias.reshape(-1), (call.bias,)
        return self._after(piece)

    def _weight(self, call: Call) -> tuple[Any, Tensor | None]:
        """The constant node behind the operand, and its matrix or kernel; the same matrix for a whole batch is one."""
        if call.kind != "Batched":
            return call.weight, self.constants.tensor(call.weight)
        for node in self._spread(call):
            value = self.constants.tensor(node)
            if value is None:
                continue
            if value.ndim == 3 and (len(value) == 1 or value.stride(0) == 0):
                value = value[0]
            return (node, value) if value.ndim == 2 else (call.weight, None)
        return call.weight, None

    def _spread(self, call: Call) -> Iterator[Any]:
        """The operand and what it is the same matrices of, in another number."""
        node: Any = call.weight
        while isinstance(node, fx.Node):
            yield node
            below = node.all_input_nodes[0] if node.all_input_nodes else None
            if node.target not in SPREADS or below is None or _sizes(node)[-2:] != _sizes(below)[-2:]:
                return
            node = below

    def _own(self, call: Call, source: Any) -> tuple[fx.Node, ...]:
        """The node, and those that only spread its weight over a batch."""
        nodes = [] if call.kind != "Batched" else list(self._spread(call))
        between = nodes[: nodes.index(source)] if source in nodes else []
        alone = [node for node in between if node not in self.constants and len(node.users) == 1]
        return (*reversed(alone), call.node) if len(alone) == len(between) else (call.node,)

    def _leaf(self, call: Call, weight: Tensor) -> LinearOperator | None:
        """The stored matrix (out, in); one object for all that read the same elements."""
        groups = getattr(call.geometry, "groups", 1)
        if groups != 1:
            if call.geometry is None or call.geometry.transposed or len(weight) % groups:
                return None
            at = torch.arange(groups)
            return BlockSparse(weight.detach().reshape(groups, len(weight) // groups, -1), at, at, (groups, groups))
        matrix = weight.flatten(1) if call.kind == "Conv" else weight if call.kind == "Linear" else weight.mT
        key = place(matrix) if matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata else id(call.node)
        return self._leaves.setdefault(key, Dense(matrix.detach()))

    def _after(self, piece: Piece) -> Piece:
        """The piece and what stands right before it, where that is linear too and nobody else reads it."""
        before = self.pieces.get(piece.input)
        if before is None or before.bias is not None or len(before.node.users) != 1 or before.frozen or piece.frozen:
            return piece
        window = piece.window
        if (
            before.convolution != piece.convolution
            or before.tentative
            or (window is not None and (not window.pointwise or window.strided))
        ):
            return piece
        return Piece(
            piece.node, Product(piece.operator, before.operator), before.input, piece.bias, before.window,
            piece.convolution, (*before.nodes, *piece.nodes), (*before.weights, *piece.weights), piece.biases,
        )  # fmt: skip

    # -- combinations ----------------------------------------------------------------------

    def _combined(self, node: fx.Node) -> Piece | None:
        if node.op != "call_function":
            return None
        match node.target:
            case aten.add.Tensor | aten.add_.Tensor:
                return None if node.kwargs or len(node.args) != 2 else self._sum(node) or self._biased(node)
            case aten.mul.Tensor:
                return self._scaled(node)
            case aten.cat.default:
                return self._stacked(node)
            case aten.movedim.int:
                return self._moved(node)
            case target if target in VIEWS:
                return self._reshaped(node)
        return None

    def _parts(self, operands: Any) -> list[Piece]:
        """The pieces of operands that nobody else reads, all of one input; empty where they are not."""
        found = [self.pieces.get(operand) for operand in operands]
        first = found[0] if found else None
        for each in found:
            if each is None or first is None or len(each.node.users) != 1 or each.frozen:
                return []
            if (each.input, each.window, each.convolution) != (first.input, first.window, first.convolution):
                return []
        return [each for each in found if each is not None] if len(set(operands)) == len(operands) else []

    def _sum(self, node: fx.Node) -> Piece | None:
        parts = self._parts(node.args) if node.target is aten.add.Tensor else []
        if not parts or len({each.operator.shape for each in parts}) > 1:
            return None
        biases = [each.bias for each in parts if each.bias is not None]
        return _joined(
            node, parts, Sum(tuple(each.operator for each in parts)), sum(biases[1:], biases[0]) if biases else None
        )

    def _biased(self, node: fx.Node) -> Piece | None:
        """``x @ W + b``, in either order."""
        for first, second in (node.args, node.args[::-1]):
            piece, bias = self.pieces.get(first), self.constants.tensor(second)  # type: ignore[arg-type]
            if piece is None or bias is None or piece.bias is not None or piece.convolution or piece.frozen:
                continue
            if len(piece.node.users) == 1 and tuple(bias.shape) == (piece.operator.shape[0],):
                assert isinstance(second, fx.Node)
                return Piece(
                    node, piece.operator, piece.input, bias, piece.window, False, (*piece.nodes, node), piece.weights,
                    (second,), tentative=piece.tentative,
                )  # fmt: skip
        return None

    def _scaled(self, node: fx.Node) -> Piece | None:
        """The model's own scales belong to a site as part of a sum only: alone they are not a weight's business."""
        for first, second in (node.args[:2], node.args[1::-1]):
            piece = self.pieces.get(first)  # type: ignore[arg-type]
            if piece is None or piece.bias is not None or len(piece.node.users) != 1 or piece.frozen:
                continue
            scale = self.constants.tensor(second)
            if isinstance(second, int | float):
                scale = torch.tensor(float(second), dtype=torch.float32)
            if scale is None or scale.ndim:
                continue
            more = (second,) if isinstance(second, fx.Node) else ()
            ours = all(_ours(str(root.target)) for each in more for root in self.constants.roots(each))
            return Piece(
                node, Scaled(scale.detach(), piece.operator), piece.input, None, piece.window, piece.convolution,
                (*piece.nodes, node), (*piece.weights, *more), tentative=not (more and ours),
            )  # fmt: skip
        return None

    def _reshaped(self, node: fx.Node) -> Piece | None:
        """A layer between two views, of which the second undoes the first: it reads what the first one looks at."""
        piece = self.pieces.get(node.args[0])  # type: ignore[arg-type]
        if piece is None or piece.convolution or len(piece.node.users) != 1:
            return None
        below, outer = source(piece.input), _sizes(node)
        if not outer or outer[:-1] != _sizes(below)[:-1] or outer[-1] != str(piece.operator.shape[0]):
            return None
        return replace(piece, node=node, input=below, nodes=(*piece.nodes, node))

    def _moved(self, node: fx.Node) -> Piece | None:
        """A layer on the channels of a (batch, channels, *spatial) value: a convolution of a single place."""
        piece = self.pieces.get(node.args[0])  # type: ignore[arg-type]
        value = node.meta.get("val")
        if piece is None or value is None or piece.convolution or len(piece.node.users) != 1 or value.ndim < 3:
            return None
        before = piece.input
        alone = before.target is aten.movedim.int and len(before.users) == 1 and not piece.tentative
        if not alone or tuple(before.args[1:]) != (1, -1) or tuple(node.args[1:]) != (-1, 1):
            return None
        ones = (1,) * (value.ndim - 2)
        below: Any = before.args[0]
        nodes = (before, *piece.nodes, node)
        return self._after(
            Piece(node, piece.operator, below, piece.bias, Window(ones, ones), True, nodes, piece.weights, piece.biases)
        )

    def _stacked(self, node: fx.Node) -> Piece | None:
        """Only what an earlier rewrite stacked: layers of the model's own stay layers of their own."""
        operands, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        parts = self._parts(operands)
        value = node.meta.get("val")
        names = [str(root.target) for each in parts for weight in each.weights for root in self.constants.roots(weight)]
        if not parts or value is None or any(each.convolution for each in parts) or axis not in (-1, value.ndim - 1):
            return None
        if len({name.partition(FACTORS)[0] for name in names}) != 1 or not _ours(names[0]):
            return None
        biases = [each.bias for each in parts if each.bias is not None]
        if biases and len(biases) != len(parts):
            return None
        bias = torch.cat(biases) if biases else None
        return _joined(node, parts, Stack(tuple(each.operator for each in parts)), bias)


def _joined(node: fx.Node, parts: list[Piece], operator: LinearOperator, bias: Tensor | None) -> Piece:
    first = parts[0]
    nodes = (*(each for part in parts for each in part.nodes), node)
    weights = tuple(each for part in parts for each in part.weights)
    biases = tuple(each for part in parts for each in part.biases)
    return Piece(node, operator, first.input, bias, first.window, first.convolution, nodes, weights, biases)


def _ours(name: str) -> bool:
    """Whether a stored tensor is a factor that an earlier rewrite left."""
    return FACTORS in name or name.startswith(FACTORS[1:])


def _axes(call: Call, weight: Tensor) -> bool:
    return weight.ndim == 2 if call.geometry is None else 3 <= weight.ndim <= 5


def _outputs(call: Call, weight: Tensor) -> int:
    return weight.shape[1] if call.kind in ("Conv1D", "Batched") else weight.shape[0]


def _frozen(call: Call, bias: Tensor | None, leaf: LinearOperator) -> str:
    if isinstance(leaf, BlockSparse):
        return f"a convolution in {leaf.grid[0]} groups"
    if bias is not None and bias.dtype != leaf.weight.dtype:  # type: ignore[attr-defined]
        return "its bias is of another type"
    return ""


def source(node: fx.Node) -> fx.Node:
    """The value behind views of it that keep the last axis: what reads it in another shape reads the same vectors."""
    while node.target in VIEWS and node.all_input_nodes:
        below = node.all_input_nodes[0]
        if not _sizes(node) or _sizes(node)[-1:] != _sizes(below)[-1:]:
            return node
        node = below
    return node


def _sizes(node: fx.Node) -> list[str]:
    """A value's shape as text: symbols are compared without a guess at their values."""
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


def readers(constants: Constants, root: fx.Node, own: set[fx.Node]) -> Iterator[fx.Node]:
    """Nodes outside ``own`` that read a stored tensor, or a constant made from it."""
    for user in root.users:
        if user in own:
            continue
        if user in constants:
            yield from readers(constants, user, own)
        else:
            yield user
