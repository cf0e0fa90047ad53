"""Permutations of channels go into the weights that read them, where any order will do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lrcompile.graphs.base import Graph
from lrcompile.linop import LinearOperator
from lrcompile.order import Pivoted, Region, settled
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten


@dataclass(frozen=True)
class Absorb(GraphPass):
    """Spare the permutation behind an identity gauge, where only elementwise operations lie before the next layers.

    rewrite:  f(x (P G)ᵀ) Wᵀ  ->  f(x Gᵀ) (W P)ᵀ

    A gated layer and its gate get one order. Biases and other constants along the channels move with them. Runs by
    itself behind passes that replace weights.
    """

    name: ClassVar[str] = "absorb"
    follows: ClassVar[bool] = True

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites every region that can do without a permutation; a graph without nodes is refused."""
        operators = {site.name: site.operator for site in graph.linear_sites()}
        waiting = [name for name, operator in operators.items() if Pivoted.of(operator) is not None]
        found: Any = getattr(graph, "regions", None)
        if not waiting or found is None:
            kind = "no site puts its outputs in order" if not waiting else f"'{graph.kind}' graphs have no nodes"
            return [Refused("graph", kind)]
        orders = list(_orders(found(), operators))
        if orders:
            rewriter: Any = graph
            touched = {name for region, _ in orders for name in (*region.writers, *region.readers)}
            rewriter.reorder(orders, {name: operators[name] for name in operators if name in touched})
        done = {name for region, _ in orders for name in region.writers} & set(waiting)
        return [Rewritten(name) if name in done else Refused(name, "not every reader bears another order")
                for name in waiting]  # fmt: skip


def _orders(regions: Sequence[Region], operators: dict[str, LinearOperator]) -> Iterator[tuple[Region, Tensor]]:
    """New orders of the regions that can have one; what their sites hold then takes the place of what they held.

    A site may write one region and read another.
    """
    for region in regions:
        found = settled(region, operators)
        if found is not None:
            order, moved = found
            operators.update(moved)
            yield region, order
