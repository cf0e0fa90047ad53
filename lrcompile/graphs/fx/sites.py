"""The sites of an exported program: structured layers in the place of the nodes that use a weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from lrcompile.graphs.fx.constants import Constants
from lrcompile.graphs.fx.flat import name_of
from lrcompile.graphs.fx.match import aten, call_of
from lrcompile.graphs.fx.nested import nested
from lrcompile.graphs.fx.raising import Piece, Raiser, readers, source
from lrcompile.graphs.module_sites import Found, Reader
from lrcompile.graphs.module_trace import span
from lrcompile.graphs.structured import Pool, StructuredConv, StructuredLinear, place
from lrcompile.linop import LinearOperator, structure, tensors
from lrcompile.sites import LinearSite, Use, Window

LAYERS = "lrcompile_layers"
"""Where the structured layers stand in the raised module."""


@dataclass(frozen=True, eq=False)
class FxReader(Reader):
    """A structured layer in the place of nodes.

    Args:
        nodes: of the program, the last of them being the one whose value the layer gives.
        source: the node that the layer reads.
    """

    nodes: tuple[str, ...] = ()
    source: str = ""

    @property
    def strides(self) -> tuple[int, ...]:
        return () if self.window is None else self.window.strides

    @property
    def window(self) -> Window | None:
        return self.module.window if isinstance(self.module, StructuredConv) else None

    @property
    def weight(self) -> nn.Parameter:
        """A stored factor, for device, type and whether it is trained."""
        return next(p for p in self.module.factors.parameters())  # type: ignore[union-attr, return-value]


@dataclass(frozen=True, eq=False)
class Raised:
    """A flat module whose constant-linear parts are structured layers.

    Attributes:
        names: stored tensors by :func:`lrcompile.graphs.structured.place`, all of their names.
        roots: site → the stored tensors that its weights are made from.
    """

    module: fx.GraphModule
    founds: Mapping[str, Found]
    roots: Mapping[str, frozenset[str]] = field(default_factory=dict)


def raised(module: fx.GraphModule, names: Mapping[Hashable, Sequence[str]]) -> Raised:
    """Puts structured layers into a flat module, in its place.

    Args:
        names: of the stored tensors, by :func:`lrcompile.graphs.structured.place`.
    """
    constants = Constants(module)
    pieces = Raiser(constants).pieces_of(module.graph)
    groups: dict[object, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(_key(piece), []).append(piece)
    survey, titles, inputs = _Survey(constants, groups), _Titles(constants, names), _Inputs()
    sites: list[tuple[LinearSite, list[Piece]]] = []
    roots: dict[str, frozenset[str]] = {}

    def enter(group: list[Piece], uses: Sequence[Use], kind: str, frozen: str, made: Sequence[fx.Node]) -> None:
        name, first = titles.of(group), group[0]
        site = LinearSite(name, first.operator, tuple(uses), first.window, kind, frozen)
        sites.append((site, group))
        roots[name] = frozenset(str(root.target) for root in made)

    for key, group in groups.items():
        uses = [Use(piece.node.name, inputs.of(piece), piece.bias) for piece in group]
        uses += [Use(node.name, node.name, None, "rows") for node in survey.lookups(key)]
        enter(group, uses, _kind(group[0]), survey.reason(key), survey.roots[key])
    known = {root for found in survey.roots.values() for root in found}
    for inner, outer, operator, reason in nested(constants):
        made = list(constants.roots(outer))
        if known.isdisjoint(made):
            known.update(made)
            alone = Piece(inner, operator, inner, nodes=(inner,), weights=(outer,))
            enter([alone], [Use(inner.name, inner.name)], _kind(alone), reason, made)
    founds = _installed(module, sites)
    for node in reversed([node for node in module.graph.nodes if node in constants]):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return Raised(module, founds, roots)


def _installed(module: fx.GraphModule, sites: Sequence[tuple[LinearSite, list[Piece]]]) -> dict[str, Found]:
    """Layers in the places of the sites that can be replaced."""
    pool, moved = Pool(module.parameters()), dict[fx.Node, fx.Node]()
    founds: dict[str, Found] = {}
    for index, (site, group) in enumerate(sites):
        made = (
            []
            if site.frozen
            else [_layer(module, p, pool, f"{LAYERS}.{index}_{i}", moved) for i, p in enumerate(group)]
        )
        founds[site.name] = Found(site, tuple(made))
    return founds


def _key(piece: Piece) -> object:
    """Equal for expressions over the very same tensors."""
    return str(structure(piece.operator)), tuple(place(tensor) for _, tensor in tensors(piece.operator))


def _kind(piece: Piece) -> str:
    """The operation that multiplies."""
    target = next(node for node in piece.nodes if call_of(node) is not None).target
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)


class _Inputs:
    """One name for all that reads the same vectors; a window of its own makes other vectors of a value."""

    def __init__(self) -> None:
        self._known: dict[object, str] = {}

    def of(self, piece: Piece) -> str:
        """The name of what a piece reads."""
        below = piece.input if piece.convolution else source(piece.input)
        window = piece.window
        if window is None or (window.pointwise and not window.strided):
            return below.name
        return self._known.setdefault((below, window), f"{below.name}[{len(self._known)}]")


class _Survey:
    """Who reads which stored tensor."""

    def __init__(self, constants: Constants, groups: Mapping[object, Sequence[Piece]]) -> None:
        self.constants, self.groups = constants, groups
        self.own = {node for group in groups.values() for piece in group for node in piece.nodes}
        self.roots = {key: self._roots(group) for key, group in groups.items()}
        self.holders: dict[int, list[fx.Node]] = {}
        for node in constants.nodes:
            if node.op == "get_attr":
                self.holders.setdefault(self._storage(node), []).append(node)
        self.sharing: dict[int, list[object]] = {}
        for key, roots in self.roots.items():
            for storage in {self._storage(root) for root in roots}:
                self.sharing.setdefault(storage, []).append(key)

    def _roots(self, group: Sequence[Piece]) -> list[fx.Node]:
        found = (root for piece in group for weight in piece.weights for root in self.constants.roots(weight))
        return list(dict.fromkeys(found))

    def _storage(self, root: fx.Node) -> int:
        return self.constants.value(root).untyped_storage()._cdata

    def _others(self, key: object) -> Iterator[fx.Node]:
        """Nodes that read the tensors and belong to no site."""
        for storage in dict.fromkeys(self._storage(root) for root in self.roots[key]):
            for holder in self.holders[storage]:
                yield from readers(self.constants, holder, self.own)

    def lookups(self, key: object) -> list[fx.Node]:
        """Embeddings that read the tensors."""
        return [node for node in self._others(key) if node.target is aten.embedding.default]

    def reason(self, key: object) -> str:
        """Why a site must stay; empty where it can be replaced."""
        group = self.groups[key]
        frozen = next((piece.frozen for piece in group if piece.frozen), "")
        if frozen:
            return frozen
        if len({(piece.window, piece.convolution) for piece in group}) > 1:
            return "its weight is shared by layers of different kinds"
        for storage in {self._storage(root) for root in self.roots[key]}:
            for other in self.sharing[storage]:
                if other != key and _overlap(group[0].operator, self.groups[other][0].operator):
                    return f"its weight overlaps that of {self.groups[other][0].node.name}"
        for node in self._others(key):
            what = "tied to embedding" if node.target is aten.embedding.default else "its weight is also read by"
            return f"{what} {node.name}"
        return ""


def _overlap(one: LinearOperator, other: LinearOperator) -> bool:
    """Whether leaves of two expressions read some of the same elements without being the same leaf."""
    spans = [[(place(t), t.untyped_storage()._cdata, *span(t)) for _, t in tensors(op)] for op in (one, other)]
    return any(
        a != b and i == j and low < till and start < high
        for a, i, low, high in spans[0]
        for b, j, start, till in spans[1]
    )


def _layer(module: fx.GraphModule, piece: Piece, pool: Pool, path: str, moved: dict[fx.Node, fx.Node]) -> FxReader:
    """Puts one structured layer in the place of a piece's nodes.

    Args:
        moved: nodes that layers took the place of, and those that took it.
    """
    leaves = [tensor for _, tensor in tensors(piece.operator)]
    trainable = any(pool.known(tensor).requires_grad for tensor in leaves)
    factors = pool.factors(piece.operator, device=leaves[0].device, trainable=trainable)
    bias = piece.bias if piece.bias is None or isinstance(piece.bias, nn.Parameter) else nn.Parameter(piece.bias, False)
    layer = (
        StructuredLinear(factors, bias) if piece.window is None else StructuredConv(factors, bias, window=piece.window)
    )
    module.add_submodule(path, layer)
    with module.graph.inserting_before(piece.node):
        node = module.graph.call_module(path, (moved.get(piece.input, piece.input),))
    node.meta = dict(piece.node.meta)
    moved[piece.node] = node
    piece.node.replace_all_uses_with(node)
    nodes = tuple(name_of(each) for each in piece.nodes)
    for each in reversed(piece.nodes):
        module.graph.erase_node(each)
    return FxReader(path, layer, "Linear" if piece.window is None else "Conv", nodes, name_of(piece.input))


@dataclass(eq=False)
class _Titles:
    """Names of sites, from the names of their tensors and the modules that torch noted at their nodes."""

    constants: Constants
    names: Mapping[Hashable, Sequence[str]]
    taken: set[str] = field(default_factory=set)

    def of(self, group: Sequence[Piece]) -> str:
        """A name that is not given twice."""
        name = base = self._plain(group[0])
        count = 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def _plain(self, piece: Piece) -> str:
        roots = [root for weight in piece.weights for root in self.constants.roots(weight)]
        stems = [stem(self._name(root, piece)) for root in dict.fromkeys(roots)]
        if len(stems) > 1:
            return common(stems) or stems[0]
        whole = self.constants.value(roots[0])
        leaf = next((tensor for _, tensor in tensors(piece.operator) if tensor.is_floating_point()), whole)
        if leaf.numel() == whole.numel():
            return stems[0]
        return f"{stems[0]}.{_rows(leaf, whole) or piece.weights[0].name}"

    def _name(self, root: fx.Node, piece: Piece) -> str:
        """Of all names of a tied tensor the one of the module that the node belongs to."""
        known = self.names.get(place(self.constants.value(root)), ()) or [str(root.target)]
        stack = piece.nodes[0].meta.get("nn_module_stack") or {}
        paths = [str(each[0]) for each in stack.values()]
        return next(
            (n for path in reversed(paths) for n in known if path and n.startswith(f"{path}.")), str(root.target)
        )


def _rows(part: Tensor, whole: Tensor) -> str:
    """Which rows of a stored matrix a part of it is; empty where it is something else."""
    same = part.untyped_storage()._cdata == whole.untyped_storage()._cdata and part.ndim == whole.ndim == 2
    if not same or part.stride() != whole.stride() or part.shape[1] != whole.shape[1] or not whole.is_contiguous():
        return ""
    start = int(part.storage_offset() - whole.storage_offset()) // int(whole.shape[1])
    return f"rows_{start}_{start + len(part)}"


def stem(name: str) -> str:
    """``up.weight`` and ``mha.in_proj_weight`` without the last word; factors without their path in the expression."""
    before, mark, _ = name.partition(".factors.")
    if mark:
        return before
    return name.removesuffix("weight").rstrip("._") or name


def common(stems: Sequence[str]) -> str:
    """The leading words that dotted names share."""
    parts = [stem.split(".") for stem in stems]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
