"""Which values of a raised module may have their channels in any order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lrcompile.graphs.channels import Finder, Walk
from lrcompile.graphs.fx.match import aten
from lrcompile.graphs.fx.raising import VIEWS
from lrcompile.graphs.module_sites import Found
from lrcompile.graphs.structured import StructuredLinear
from lrcompile.order import Region

_COPIES = VIEWS | {aten._to_copy.default, aten.clone.default, aten.lift_fresh_copy.default}
"""Operations that keep every vector along the last axis as it is, where the length of that axis stays."""


def regions(module: fx.GraphModule, founds: Mapping[str, Found]) -> list[Region]:
    """All regions, by their first writer. Constants along the channels other than biases give a region up."""
    finder = _FxFinder(module, founds)
    return [Region(*walk.sorted(finder.places), walk.size) for walk in finder.walks()]


class _FxFinder(Finder[fx.Node]):
    def __init__(self, module: fx.GraphModule, founds: Mapping[str, Found]) -> None:
        plain = {found.readers[0].path: name for name, found in founds.items() if _movable(found)}
        nodes = [n for n in module.graph.nodes if n.op == "call_module" and n.target in plain]
        self.names = {id(node): plain[str(node.target)] for node in nodes}
        self.founds = founds
        super().__init__({plain[str(node.target)]: node for node in nodes})

    def channels(self, name: str) -> int:
        return self.founds[name].site.shape[0]

    def behind(self, value: fx.Node, walk: Walk[fx.Node]) -> None:
        if not _elementwise(value):
            walk.fits = False
            return
        for operand in value.all_input_nodes:
            if _width(operand) != 1:
                walk.join(operand)

    def ahead(self, value: fx.Node, walk: Walk[fx.Node]) -> None:
        for user in value.users:
            name = self.names.get(id(user))
            if name is not None:
                walk.readers.add(name)
                walk.require(self.founds[name].site.shape[1] == walk.size)
            elif _elementwise(user):
                walk.join(user)
            else:
                walk.fits = False


def _movable(found: Found) -> bool:
    return found.alone and isinstance(found.readers[0].module, StructuredLinear)


def _width(node: fx.Node) -> int | None:
    """Length of a value's last axis; None where it is not known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    last = value.shape[-1] if value.ndim else 1
    return last if isinstance(last, int) else None


def _elementwise(node: fx.Node) -> bool:
    """Whether a node computes every element from those of its operands at its place."""
    if node.target in _COPIES:
        widths = {_width(node), *map(_width, node.all_input_nodes[:1])}
        return len(widths) == 1 and None not in widths
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags
