"""Which values of an ONNX graph may have their channels in any order, and the graph with another order of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from torch import Tensor

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
    """All regions, by their first writer; linear in the size of the graph."""
    finder = _Finder(graph, sites)
    found = (finder.around(name) for name in finder.matches)
    return [region for region in found if region is not None]


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


@dataclass(eq=False)
class _Walk:
    """What is found around one value."""

    size: int
    values: dict[int, ir.Value]
    waiting: list[ir.Value]
    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    vectors: list[tuple[ir.Node, int]] = field(default_factory=list)
    fits: bool = True

    def join(self, value: ir.Value) -> None:
        if id(value) not in self.values:
            self.values[id(value)] = value
            self.waiting.append(value)

    def constant(self, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
        """Takes note of a constant beside the channels: one number for all of them, or for each."""
        width = tensor.shape[-1] if len(tensor.shape) else 1
        if width == self.size:
            self.vectors.append((node, index))
        elif width != 1:
            self.fits = False


class _Finder:
    """Walks from what a site computes to everything whose channels must keep its order."""

    def __init__(self, graph: ir.Graph, sites: Sites) -> None:
        self.graph = graph
        self.matches = {name: matches[0] for name, (site, matches) in sites.items() if _movable(site, matches)}
        self.places = {name: place for place, name in enumerate(self.matches)}
        self.ends = {id(_end(match)): name for name, match in self.matches.items()}
        self.owners = {id(node): name for name, match in self.matches.items() for node in match.nodes}
        self.seen: set[int] = set()

    def around(self, name: str) -> OnnxRegion | None:
        """The region that a site writes, where it is one and was not met before."""
        match = self.matches[name]
        end = _end(match)
        if id(end) in self.seen:
            return None
        walk = _Walk(match.operator.shape[0], {id(end): end}, [end])
        while walk.waiting:  # on and on, even where it fits no more: so that nothing is walked twice
            value = walk.waiting.pop()
            walk.fits = walk.fits and not value.is_graph_output()
            self._behind(value, walk)
            self._ahead(value, walk)
        self.seen.update(walk.values)
        if not (walk.fits and walk.writers and walk.readers and walk.size > 1):
            return None
        writers, readers = (tuple(sorted(names, key=self.places.__getitem__)) for names in (walk.writers, walk.readers))
        return OnnxRegion(writers, readers, walk.size, tuple(walk.vectors))

    def _behind(self, value: ir.Value, walk: _Walk) -> None:
        """What computes a value."""
        name = self.ends.get(id(value))
        node = value.producer()
        if name is not None:
            match = self.matches[name]
            walk.writers.add(name)
            walk.fits = walk.fits and match.operator.shape[0] == walk.size
            self._bias(match, walk)
        elif node is None or not self._elementwise(node):
            walk.fits = False
        else:
            for index, given in enumerate(node.inputs):
                tensor = constant(given)
                if tensor is not None:
                    walk.constant(node, index, tensor)
                elif given is not None and not _single(given):
                    walk.join(given)

    def _bias(self, match: Match, walk: _Walk) -> None:
        tensor = constant(match.bias)
        if match.bias is None:
            return
        node = match.adder or match.nodes[-1]
        if tensor is None:
            walk.fits = False
        else:
            walk.constant(node, next(i for i, given in enumerate(node.inputs) if given is match.bias), tensor)

    def _ahead(self, value: ir.Value, walk: _Walk) -> None:
        """What reads a value."""
        for user, index in value.uses():
            name = self.owners.get(id(user))
            if name is not None and self.matches[name].source is value and (index == 0 or self._elementwise(user)):
                walk.readers.add(name)
                walk.fits = walk.fits and self.matches[name].operator.shape[1] == walk.size
            elif name is None and self._elementwise(user):
                walk.join(user.outputs[0])
            else:
                walk.fits = False

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
