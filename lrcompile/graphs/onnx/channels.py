"""Which values of an ONNX graph may have their channels in any order, and the graph with another order of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from lrcompile.graphs.channels import Finder, Walk
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.match import Match
from lrcompile.graphs.onnx.operators import ELEMENTWISE
from lrcompile.graphs.onnx.splice import Splicer, Tape
from lrcompile.graphs.onnx.tensors import from_torch, to_torch
from lrcompile.order import Region
from lrcompile.sites import LinearSite

Sites = Mapping[str, tuple[LinearSite, tuple[Match, ...]]]
_ELEMENTWISE = {("", name) for name in ELEMENTWISE}


@dataclass(frozen=True, eq=False)
class OnnxRegion(Region):
    """A region of an ONNX graph.

    Attributes:
        vectors: nodes and their inputs that hold one constant number for each channel, biases included.
    """

    vectors: tuple[tuple[ir.Node, int], ...] = ()


def regions(graph: ir.Graph, sites: Sites) -> list[OnnxRegion]:
    """All regions, by their first writer."""
    finder = _OnnxFinder(graph, sites)
    return [OnnxRegion(*w.sorted(finder.places), w.size, tuple(w.constants)) for w in finder.walks()]


def reordered(model: ir.Model, orders: Sequence[tuple[OnnxRegion, Tensor]]) -> ir.Model:
    """A copy with the constant vectors of some regions in another order; weights are the caller's to move."""
    clone = model.clone()
    splicer = Splicer(model.graph, clone.graph)
    for region, order in orders:
        made: dict[int, ir.Value] = {}
        for node, index in region.vectors:
            value = node.inputs[index]
            tensor = constant(value)
            if value is None or tensor is None:
                raise ValueError(f"{node.name} holds no constant")
            if id(value) not in made:
                moved = from_torch(to_torch(tensor)[..., order].contiguous())
                made[id(value)] = Tape(clone.graph, str(value.name), splicer.taken).constant(moved, str(value.name))
            splicer.node(node).replace_input_with(index, made[id(value)])
    return clone


class _OnnxFinder(Finder[ir.Value]):
    """Regions of one graph; bodies of its nodes see every order."""

    def __init__(self, graph: ir.Graph, sites: Sites) -> None:
        self.graph = graph
        self.matches = {name: matches[0] for name, (site, matches) in sites.items() if _movable(site, matches)}
        self.owners = {id(node): name for name, match in self.matches.items() for node in match.nodes}
        super().__init__({name: _end(match) for name, match in self.matches.items()})

    def channels(self, name: str) -> int:
        return self.matches[name].operator.shape[0]

    def written(self, name: str, walk: Walk[ir.Value]) -> None:
        match = self.matches[name]
        if match.bias is not None:
            node = match.adder or match.nodes[-1]
            self._operand(node, next(i for i, given in enumerate(node.inputs) if given is match.bias), walk)

    def behind(self, value: ir.Value, walk: Walk[ir.Value]) -> None:
        node = value.producer()
        if node is None or not self._elementwise(node):
            walk.fits = False
            return
        for index in range(len(node.inputs)):
            self._operand(node, index, walk)

    def _operand(self, node: ir.Node, index: int, walk: Walk[ir.Value]) -> None:
        """An operand: one number for all channels, one for each, or a value of the region."""
        value = node.inputs[index]
        tensor = constant(value)
        if tensor is not None:
            width = tensor.shape[-1] if len(tensor.shape) else 1
            walk.require(width in (1, walk.size))
            if width == walk.size:
                walk.constants.append((node, index))
        elif value is not None and not _single(value):
            walk.join(value)

    def ahead(self, value: ir.Value, walk: Walk[ir.Value]) -> None:
        walk.require(not value.is_graph_output())
        for user, index in value.uses():
            name = self.owners.get(id(user))
            if name is None and self._elementwise(user):
                walk.join(user.outputs[0])
            elif name is None or self.matches[name].source is not value or (index and not self._elementwise(user)):
                walk.fits = False
            else:
                walk.readers.add(name)
                walk.require(self.matches[name].operator.shape[1] == walk.size)

    def _elementwise(self, node: ir.Node) -> bool:
        kind = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        return node.graph is self.graph and kind in _ELEMENTWISE and len(node.outputs) == 1


def _movable(site: LinearSite, matches: Sequence[Match]) -> bool:
    """Whether a site's channels lie along the last axis of one place in the graph, and its weights may be changed."""
    match = matches[0]
    plain = match.axis == -1 and match.window is None and match.owner is None and match.offset is None
    return len(matches) == 1 and not site.frozen and plain


def _end(match: Match) -> ir.Value:
    """What the site computes, bias included."""
    return match.root if match.adder is None else match.adder.outputs[0]


def _single(value: ir.Value) -> bool:
    """Whether a value is known to have one channel, which serves all."""
    shape = value.shape
    return shape is not None and (len(shape) == 0 or shape[-1] == 1)
