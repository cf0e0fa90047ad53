"""Which products are worth timing: the shapes of a model's weights, and a few sizes of every form on offer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lrcompile.choices import Offer, site_cost
from lrcompile.costs import Shape, described
from lrcompile.graphs.base import Graph, Inputs
from lrcompile.linop import Dense, LinearOperator, map_leaves
from lrcompile.linop.tree import own_tensors
from lrcompile.planning import free_pivots, positions
from lrcompile.rewrite import Context, LinearPass, Proposal, outline, storage_dtype
from lrcompile.sites import LinearSite, Window

POINTS = 6
"""Sizes at which every form of every shape is timed."""
ROTATED = 64 * 2**20
"""Bytes of weights that one timed run goes through at least, as far as the model has them: caches must not help more
than they do in the model."""
WORK = 4e8
"""Multiply–accumulates of one timed run that further copies may add up to."""
ANCHOR = 0.5
"""Share of the arithmetic that stays at the sites of the whole model that is timed."""


@dataclass(eq=False)
class Candidate:
    """A form at one size. MACs are per token, as in the cost table."""

    form: str
    macs: float
    rank: int | None
    build: Callable[[], LinearOperator]


@dataclass(eq=False)
class Survey:
    """All that is to be timed.

    Attributes:
        shapes: by name of a site.
        uses: products of each site in one run.
        rewritten: sites that hold no plain matrix any more.
        candidates: what is timed, by shape.
        feed: the batch of the timed runs.
    """

    graph: Graph
    feed: Inputs
    shapes: dict[str, Shape] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    rewritten: set[str] = field(default_factory=set)
    candidates: dict[Shape, list[Candidate]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[Shape, int]:
        """Products of each shape in one run."""
        found = dict.fromkeys(self.shapes.values(), 0)
        for name, shape in self.shapes.items():
            found[shape] += self.uses[name]
        return found

    def anchor(self) -> dict[str, Candidate]:
        """By site, what the whole model that is timed has there; sites that nothing is offered for are left out."""
        chosen = {}
        for name, shape in self.shapes.items():
            forms = [each for each in self.candidates[shape] if not each.form.startswith(HELD)]
            if forms and name not in self.rewritten:
                own = [each for each in forms if each.form == forms[0].form]
                chosen[name] = min(own, key=lambda each: abs(each.macs - ANCHOR * shape.out * shape.into))
        return chosen


HELD = "held:"
"""Prefix of the form of what a site holds after exact rewrites, where that is no plain matrix."""


def form_of(proposal: Proposal) -> str:
    """The cost table's name of a proposal's storage form."""
    return f"{proposal.source}/{proposal.form}" if proposal.form else proposal.source


def held_form(site: LinearSite) -> str:
    """The name of what the site holds now; empty for a plain matrix."""
    return "" if isinstance(site.operator, Dense) else HELD + outline(site.operator)


def survey(graph: Graph, sites: Sequence[LinearSite], offers: Mapping[str, Offer], feed: Inputs) -> Survey:
    """What there is to time for these sites.

    Args:
        offers: of at least one site of every shape.
        feed: the batch that the latency is of.
    """
    found = Survey(graph, feed)
    vectors = positions(graph, sites, feed)
    groups: dict[Shape, list[LinearSite]] = {}
    for site in sites:
        shape = shape_of(graph.original(site.name), vectors[site.name])
        found.shapes[site.name], found.uses[site.name] = shape, len(site.uses)
        groups.setdefault(shape, []).append(site)
        if held_form(site):
            found.rewritten.add(site.name)
    for shape, group in groups.items():
        found.candidates[shape] = [*_points(group, offers), *_held(group)]
    return found


def shape_of(site: LinearSite, vectors: float) -> Shape:
    """The key of a site in the cost table.

    Args:
        vectors: that one use of it multiplies.
    """
    dtype = str(storage_dtype(site.operator)).removeprefix("torch.")
    held = site.window
    window = () if held is None else (held.kernel, held.strides, held.pads, held.dilations)
    return Shape(*site.shape, max(round(vectors), 1), dtype, window)


def _points(group: Sequence[LinearSite], offers: Mapping[str, Offer]) -> Iterable[Candidate]:
    """A few proposals of each form, evenly spread over its sizes; the smallest and the largest among them.

    Those of the first site of the group that is offered the form.
    """
    forms: dict[str, tuple[LinearSite, list[Proposal]]] = {}
    for site in group:
        for proposal in offers[site.name].proposals if site.name in offers else ():
            first, given = forms.setdefault(form_of(proposal), (site, []))
            if first is site and proposal.sites == (site.name,):
                given.append(proposal)
    for form, (site, given) in forms.items():
        given = sorted({p.cost.macs: p for p in given}.values(), key=lambda p: p.cost.macs)
        count = min(POINTS, len(given))
        picked = {round(index * (len(given) - 1) / max(count - 1, 1)) for index in range(count)}
        for index in sorted(picked):
            yield _candidate(site, form, given[index])


def _candidate(site: LinearSite, form: str, proposal: Proposal) -> Candidate:
    def build() -> LinearOperator:
        return proposal.build()[site.name].operator

    return Candidate(form, proposal.cost.macs / len(site.uses), proposal.rank, build)


def _held(group: Sequence[LinearSite]) -> list[Candidate]:
    """What exact rewrites have put at sites, each size once."""
    found: dict[tuple[str, float], Candidate] = {}
    for site in group:
        form = held_form(site)
        if form:
            macs = site_cost(site).macs / len(site.uses)
            found[form, macs] = Candidate(form, macs, None, lambda operator=site.operator: operator)
    return list(found.values())


def representatives(
    graph: Graph, sites: Sequence[LinearSite], passes: Sequence[LinearPass], feed: Inputs, align: int
) -> dict[str, Offer]:
    """Offers for one site of every shape and set of free outputs, without statistics: structures do not need them."""
    context = Context(graph, align=align, pivots=free_pivots(graph, sites), trial=True)
    vectors, offers, seen = positions(graph, sites, feed), {}, set()
    for site in sites:
        kind = shape_of(graph.original(site.name), vectors[site.name]), str(context.pivots.get(site.name))
        if kind not in seen:
            seen.add(kind)
            given = [p for each in passes if not each.refuse(site, context) for p in each.proposals(site, context)]
            offers[site.name] = Offer(given, [])
    return offers


def anchored(survey: Survey) -> list[dict[str, Any]]:
    """What the anchor has at its sites: shapes, forms, MACs and how many of each."""
    found: dict[tuple[Shape, str, float], int] = {}
    for name, each in survey.anchor().items():
        key = survey.shapes[name], each.form, each.macs
        found[key] = found.get(key, 0) + survey.uses[name]
    return [{**described(shape), "form": form, "macs": macs, "sites": n} for (shape, form, macs), n in found.items()]


def copies(survey: Survey, shape: Shape) -> int:
    """How many weights of a shape one timed run goes through."""
    size = storage_size(shape)
    whole = sum(n * s.out * s.into * storage_size(s) for s, n in survey.counts.items())
    wanted = min(whole, ROTATED) // (shape.out * shape.into * size)
    return int(min(max(wanted, 1), max(WORK // (shape.out * shape.into * shape.tokens), 1), 64))


def image(shape: Shape) -> tuple[int, ...]:
    """Shape of the input of one product, (tokens, in).

    A convolution reads one image with as many output positions, as square as they allow.
    """
    if not shape.window:
        return shape.tokens, shape.into
    window = Window(*shape.window)
    places = [1] * (window.rank - 1) + [shape.tokens]
    if window.rank > 1:
        places[-2] = max(n for n in range(1, math.isqrt(shape.tokens) + 1) if shape.tokens % n == 0)
        places[-1] = shape.tokens // places[-2]
    axes = zip(places, window.kernel, window.strides, window.dilations, strict=True)
    pads = [window.pads[axis] + window.pads[axis + window.rank] for axis in range(window.rank)]
    sizes = [(n - 1) * s + (k - 1) * d + 1 - pad for (n, k, s, d), pad in zip(axes, pads, strict=True)]
    return 1, shape.into // window.places, *(max(size, 1) for size in sizes)


def storage_size(shape: Shape) -> int:
    """Bytes of one element."""
    return getattr(torch, shape.dtype).itemsize


def copied(operator: LinearOperator) -> LinearOperator:
    """The same expression over tensors of its own, so that nothing is shared or cached between sites."""

    def copy(leaf: LinearOperator) -> LinearOperator:
        own: dict[str, Any] = {name: tensor.clone() for name, tensor in own_tensors(leaf)}
        return dataclasses.replace(leaf, **own) if own else leaf  # type: ignore

    return map_leaves(operator, copy)


def random_weight(shape: Shape) -> torch.Tensor:
    """A matrix (out, in) with numbers as weights have them."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(shape.out, shape.into, generator=generator)
    return weight.to(getattr(torch, shape.dtype))
