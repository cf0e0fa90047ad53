"""Ablation: do joint candidates help? Stacks of q/k/v and gate/up with one right factor, and columns kept dense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import WORK, table, write
from lrcompile import Budget, LowRank
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.budget import COSTS, Unit, allocate
from lrcompile.choices import Planned
from lrcompile.columns import Columns, keeping, loudest
from lrcompile.curves import Curve
from lrcompile.data import Batches
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, densify
from lrcompile.planning import Settings, plan
from lrcompile.sites import LinearSite
from lrcompile.spectrum import metric_matrix, sampling_shrink, spectrum
from lrcompile.zoo import exported, minilm, smollm2

KEEPS = (0.8, 0.6)
SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Shares of a weight's columns that may stay dense."""


@dataclass(eq=False)
class Candidates:
    """What a set of sites may hold, by size: stored values (n,), predicted losses (n,), and how to make each."""

    sites: tuple[LinearSite, ...]
    values: np.ndarray
    losses: np.ndarray
    make: Callable[[int], Mapping[str, tuple[Tensor, Tensor | None]]]
    split: int = 0
    """How many of them, at the front, keep columns dense."""

    def priced(self, price: float) -> float:
        return float((self.losses + price * self.values).min())


# -- candidates ----------------------------------------------------------------------------------


class Maker:
    """Candidates of one model, from the statistics and curves of its plan without either."""

    def __init__(self, planned: Planned, *, gauge: bool) -> None:
        self.context, self.curves, self.gauge, self.planned = planned.context, planned.curves, gauge, planned

    def separate(self, site: LinearSite) -> Candidates:
        """The product's own proposals without columns, and dense."""
        found = [p for p in self.planned.offers[site.name].proposals if self.gauge or not p.form]
        values = [p.cost.parameters for p in found] + [site.shape[0] * site.shape[1]]
        losses = [self.curves[site.name](p.error) for p in found] + [0.0]

        def make(index: int) -> Mapping[str, tuple[Tensor, Tensor | None]]:
            if index == len(found):
                return {}
            new = found[index].build()[site.name]
            return {site.name: (densify(new.operator), new.shift)}

        return Candidates((site,), np.array(values, dtype=float), np.array(losses), make)

    def stack(self, sites: Sequence[LinearSite]) -> Candidates:
        """``W_i -> U_i V`` with one V, the best in the metric of all outputs together."""
        weight = torch.cat([densify(site.operator) for site in sites])
        inner, bare, centered = self._inner(sites)
        slopes = [_slope(self.curves[site.name]) for site in sites]
        outers = [self._outer(site) for site in sites]
        whole = torch.block_diag(*(slope * outer for slope, outer in zip(slopes, outers, strict=True)))
        analysed = spectrum(weight, inner, whole)
        left, right = analysed._pair(len(analysed.energies))  # pyright: ignore[reportPrivateUsage]
        parts = left.split([site.shape[0] for site in sites])
        errors = [_errors(part, right, (inner, bare), outer) for part, outer in zip(parts, outers, strict=True)]
        out, into = weight.shape
        ranks = _ranks(out, into, self.context.align, gauge=self.gauge)
        losses = [sum(self.curves[s.name](float(e[r])) for s, e in zip(sites, errors, strict=True)) for r, _ in ranks]

        def make(index: int) -> Mapping[str, tuple[Tensor, Tensor | None]]:
            rank = ranks[index][0]
            made = (left[:, :rank] @ right[:rank]).split([site.shape[0] for site in sites])
            return {s.name: self._stored(s, m, centered=centered) for s, m in zip(sites, made, strict=True)}

        return Candidates(tuple(sites), np.array([v for _, v in ranks], dtype=float), np.array(losses), make)

    def columns(self, site: LinearSite) -> Candidates | None:
        """``[D, U V]``: some columns dense, low rank for the others, the best for these columns."""
        inner, bare, centered = self._inner([site])
        outer, weight = self._outer(site), densify(site.operator).double()
        found: list[tuple[float, float, Columns, int]] = []
        for share in SHARES:
            split = keeping(weight, inner, loudest(weight, inner, outer, round(share * site.shape[1])), outer)
            tails = torch.maximum(split.errors(bare, outer), split.tails)
            kept, rest = len(split.kept), len(split.rest)
            for rank, values in _ranks(site.shape[0], rest, self.context.align, gauge=self.gauge):
                cost = values + kept * site.shape[0] + kept  # an index of two bytes for a kept column
                if cost < weight.numel():
                    found.append((cost, self.curves[site.name](float(tails[rank])), split, rank))
        if not found:
            return None

        def make(index: int) -> Mapping[str, tuple[Tensor, Tensor | None]]:
            *_, split, rank = found[index]
            return {site.name: self._stored(site, _matrix(split, rank), centered=centered)}

        return Candidates((site,), np.array([f[0] for f in found]), np.array([f[1] for f in found]), make)

    def _inner(self, sites: Sequence[LinearSite]) -> tuple[Tensor, Tensor, bool]:
        """The metric as :class:`LowRank` has it, the same unshrunk, and whether for deviations from the mean."""
        moments = self.context.statistics(sites[0])
        assert moments is not None
        centered = all(use.bias is not None for site in sites for use in site.uses)
        shrink = sampling_shrink(moments)
        inner = metric_matrix(moments, "whitened", center=centered, shrink=shrink, damp=1e-5, alpha=0.5)
        assert inner is not None
        return inner, moments.covariance() if centered else moments.second(), centered

    def _outer(self, site: LinearSite) -> Tensor:
        found = self.context.importance(site)
        return torch.eye(site.shape[0], dtype=torch.float64) if found is None else found

    def _stored(self, site: LinearSite, made: Tensor, *, centered: bool) -> tuple[Tensor, Tensor | None]:
        stored, moments = made.float(), self.context.statistics(site)
        if not centered or moments is None:
            return stored, None
        return stored, ((densify(site.operator).double() - stored.double()) @ moments.mean()).float()


def _matrix(split: Columns, rank: int) -> Tensor:
    kept, left, right = split.factors(rank)
    made = left @ right
    made[:, split.kept] = kept
    return made


def _ranks(out: int, into: int, align: int, *, gauge: bool) -> list[tuple[int, int]]:
    """Ranks and the values that they store; each rank in its cheapest form."""
    plain = [(r, r * (out + into)) for r in range(align, min(out, into), align) if r * (out + into) < out * into]
    if not gauge:
        return plain
    return [(r, r * (out + into - r)) for r in range(align, min(out, into), align)]


def _errors(left: Tensor, right: Tensor, inners: tuple[Tensor, Tensor], outer: Tensor) -> Tensor:
    """Errors of one block of a stack for every rank: the larger of those in two metrics."""
    found = []
    for inner in inners:
        both = (left.T @ (outer @ left)) * (right @ inner @ right.T)
        blocks = both.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        found.append(torch.cat([blocks, blocks.new_zeros(1)]).clamp_min(0))
    return torch.maximum(*found)


def _slope(curve: Curve) -> float:
    return curve.exponent * curve.change / curve.at


# -- plans ---------------------------------------------------------------------------------------


Partition = Sequence[Candidates]


def partitions(maker: Maker, sites: Sequence[LinearSite], extra: frozenset[str]) -> list[Partition]:
    """Ways to serve sites that read one value: each alone, all together, all but one together."""
    alone = [_joined(maker.separate(s), maker.columns(s) if "columns" in extra else None) for s in sites]
    found: list[Partition] = [alone]
    if "stacks" in extra and len(sites) > 1:
        found.append([maker.stack(sites)])
        for out in range(len(sites)) if len(sites) > 2 else ():
            rest = [site for place, site in enumerate(sites) if place != out]
            found.append([alone[out], maker.stack(rest)])
    return found


def _joined(first: Candidates, second: Candidates | None) -> Candidates:
    if second is None:
        return first
    count = len(second.values)
    return Candidates(
        first.sites,
        np.concatenate([second.values, first.values]),
        np.concatenate([second.losses, first.losses]),
        lambda index: second.make(index) if index < count else first.make(index - count),
        split=count,
    )


def chosen(groups: Sequence[Sequence[Partition]], limit: float) -> list[tuple[Candidates, int]]:
    """The cheapest partition of every group at the price that the limit calls for, then the exact allocator."""
    low, high = -60.0, 60.0
    for _ in range(60):
        price = math.exp((low + high) / 2)
        values = sum(u.values[int((u.losses + price * u.values).argmin())] for u in _at(groups, price))
        low, high = ((low + high) / 2, high) if values > limit else (low, (low + high) / 2)
    units = _at(groups, math.exp(high))
    costs = [Unit(np.stack([u.values] + [np.zeros_like(u.values)] * (len(COSTS) - 1), 1), u.losses) for u in units]
    picked = allocate(costs, np.array([limit] + [np.inf] * (len(COSTS) - 1)))
    return list(zip(units, picked, strict=True))


def _at(groups: Sequence[Sequence[Partition]], price: float) -> list[Candidates]:
    best = (min(ways, key=lambda units: sum(unit.priced(price) for unit in units)) for ways in groups)
    return [unit for units in best for unit in units]


# -- rows ----------------------------------------------------------------------------------------


ROWS = (
    ("separate", True, frozenset()),
    ("+ stacks", True, frozenset({"stacks"})),
    ("+ columns", True, frozenset({"columns"})),
    ("separate, no gauge", False, frozenset()),
    ("+ stacks, no gauge", False, frozenset({"stacks"})),
    ("+ columns, no gauge", False, frozenset({"columns"})),
)


def main() -> None:
    """Every row at every budget, on both models; the result is written anew after each row."""
    WORK.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[list[object]]] = {"MiniLM": [], "SmolLM2": []}
    for name, line in _measured():
        lines[name].append(line)
        print(name, *line, flush=True)
        parts = [f"## {model}\n\n{table((*_COLUMNS, *_QUALITY[model]), rows)}" for model, rows in lines.items() if rows]
        write("joint", "Joint candidates: stacks and columns", [_HEAD, *parts])


_HEAD = """Quality only. Every row is the best plan at its budget among what the row may choose from, by Lagrange prices
and the allocator's own fill; expressions are written out as dense matrices, since all forms of one approximation
give the same outputs. Stored values are counted by their formulas, indices included. One draw of the calibration
data. Joint: sites that a stack serves; columns: sites with dense columns. Predicted: the loss that the plan expects."""
_COLUMNS = ("keep", "may choose from", "kept", "joint", "columns", "predicted")
_QUALITY = {"MiniLM": ("cosine", "relative L2"), "SmolLM2": ("foldoc", "wikipedia", "news", "geometric mean")}


def _measured() -> Iterator[tuple[str, list[object]]]:
    dense = exported("minilm")
    reference = minilm.embed(_run(OnnxGraph.load(dense)), minilm.lee.evaluation_documents())

    def cosine(run: Any) -> list[str]:
        found = minilm.scores(run, reference)
        return [f"{found[name]:.4f}" for name in ("cosine", "relative_l2")]

    def perplexity(run: Any) -> list[str]:
        return [f"{value:.2f}" for value in smollm2.metric(run).values()]

    yield from (("MiniLM", line) for line in _rows("minilm", minilm.calibration, cosine))
    yield from (("SmolLM2", line) for line in _rows("smollm2", smollm2.calibration, perplexity))


def _rows(name: str, calibration: Callable[[], Any], judge: Callable[[Any], list[str]]) -> Iterator[list[object]]:
    graph, settings = OnnxGraph.load(exported(name)), Settings(cache=WORK / "cache")
    data = Batches(calibration()).check(graph.input_specs)
    for keep in KEEPS:
        planned = plan(graph, [LowRank(columns=False)], Budget(keep=keep), data, settings)
        sites = [choice.site for choice in planned.choices if not choice.outside]
        total = sum(site.shape[0] * site.shape[1] for site in sites)
        for label, gauge, extra in ROWS:
            start = time.monotonic()
            maker = Maker(planned, gauge=gauge)
            groups = [partitions(maker, list(each), extra) for _, each in groupby(sites, lambda site: site.input)]
            units = chosen(groups, keep * total)
            print(f"planned in {time.monotonic() - start:.0f} s", flush=True)
            yield [keep, label, *_counts(units, total), *judge(_installed(graph, units))]


def _counts(units: Sequence[tuple[Candidates, int]], total: float) -> list[object]:
    joint = sum(len(unit.sites) for unit, _ in units if len(unit.sites) > 1)
    columns = sum(index < unit.split for unit, index in units)
    kept = sum(unit.values[index] for unit, index in units) / total
    return [f"{kept:.4f}", joint, columns, f"{sum(unit.losses[index] for unit, index in units):.4f}"]


def _installed(graph: OnnxGraph, units: Sequence[tuple[Candidates, int]]) -> Any:
    """A run of the model with what was chosen; the graph is as before after it."""
    mark, sites = graph.journal.mark(), {site.name: site for site in graph.linear_sites()}
    for unit, index in units:
        for name, (matrix, shift) in unit.make(index).items():
            graph.replace(sites[name], Dense(matrix.contiguous()), shift)
    run = _run(graph)
    graph.rollback(mark)
    return run


def _run(graph: OnnxGraph) -> Any:
    return OnnxRuntime().build(graph).run
