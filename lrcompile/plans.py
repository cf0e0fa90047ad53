"""A plan: what every weight of a module becomes, and how to make it again when the weight has changed.

It is made on the whole module, before compilation, and looked up by parameter while a compiled
graph runs. It holds factors and statistics, never the module: that one is only weakly referred to.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrcompile.calibrate import Moments
from lrcompile.errors import UsageError
from lrcompile.graphs.base import Graph, Replacement
from lrcompile.graphs.module_store import raw
from lrcompile.linop import Dense, LinearOperator
from lrcompile.plans_state import Table
from lrcompile.registry import passes
from lrcompile.report import record
from lrcompile.rewrite import Context, GraphPass, LinearPass, Pass, Rewritten, parse, storage_dtype
from lrcompile.sites import LinearSite, Use, Window
from lrcompile.verify import EXACT


@dataclass(frozen=True)
class Recipe:
    """How an expression was made, so that it can be made again from a changed weight.

    Attributes:
        source: the pass with its options, as the command line writes it.
        label: which of its proposals (``rank 96``); empty for an exact pass.
        inputs: for each use of the weight the value that it reads: together the key of its moments.
        biased: whether every use has a bias.
        window: geometry of a convolution.
    """

    source: str
    label: str
    inputs: tuple[str, ...]
    biased: bool
    window: Window | None = None


@dataclass(eq=False)
class Entry:
    """What a plan says about one weight.

    Attributes:
        name: of the site.
        parameters: every name under which the module registers the weight; empty outside of a module.
        kind: how the weight is stored: ``Linear`` (out, in), ``Conv1D`` (in, out), ``Conv`` (out, in, 1, …).
        shape, dtype: of the stored weight.
        sha256: of its values when the plan was made.
        replacement: the expression that stands for it; None where it stays dense.
        recipe: how the expression was made; None where it cannot be made from one weight alone.
        reason: why, for a reader.
    """

    name: str
    parameters: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    replacement: Replacement | None = None
    recipe: Recipe | None = None
    reason: str = ""


@dataclass(eq=False)
class Plan:
    """Weights and what becomes of them, for ``torch.compile(model, backend="lrcompile", options={"plan": plan})``.

    Compared by identity. Made by :func:`lrcompile.plan`.

    Attributes:
        entries: by site name, those included that stay dense.
        moments: calibration statistics by key, for refits; empty where the plan was loaded without them.
        gradients: moments of the outputs' gradients by site name, for refits likewise.
        calibrated: whether statistics were used.
        align, seed: as the passes were told.
        report: what was decided and predicted, and measured where evaluation data was given; None after loading.
        verified: whether the drift was measured on evaluation data, and passed.
        drift: relative L2 change of the worst output on the evaluation data; None where it was not measured.
        graph: ``module``, or the kind of the model file that it was made from.
        budget: the limits that it was made for.
        modules: those that it is tied to; they are not kept alive.
        passes: by their text, those that are not only known by their name.
    """

    entries: dict[str, Entry]
    moments: Mapping[str, Moments] = field(default_factory=dict)
    gradients: Mapping[str, Moments] = field(default_factory=dict)
    calibrated: bool = False
    align: int = 8
    seed: int = 0
    report: record.Report | None = None
    verified: bool = False
    drift: float | None = None
    graph: str = "module"
    budget: dict[str, Any] = field(default_factory=dict)
    modules: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    passes: dict[str, Pass] = field(default_factory=dict)
    table: Any = None

    def __post_init__(self) -> None:
        self.table = Table(self)

    def __repr__(self) -> str:
        stamp = f"drift {self.drift:.4g}" if self.verified and self.drift is not None else "unverified"
        limits = ", ".join(f"{name} {value}" for name, value in self.budget.items())
        return f"Plan({len(self.compressed)} of {len(self.entries)} weights compressed; {limits}; {stamp})"

    @property
    def compressed(self) -> list[str]:
        """Names of the sites that get an expression."""
        return [name for name, entry in self.entries.items() if entry.replacement is not None]

    @property
    def keep(self) -> float:
        """Share of the values of all listed weights that stays stored."""
        from lrcompile.linop import parameters

        before = sum(torch.Size(entry.shape).numel() for entry in self.entries.values())
        after = sum(_values(entry, parameters) for entry in self.entries.values())
        return after / before if before else 1.0

    def status(self) -> dict[str, str]:
        """By site: ``compressed``, or ``dense`` with the reason, as the compiled code that ran last has it."""
        return {name: self.table.running.get(name, "has not run") for name in self.entries}

    def names(self, model: nn.Module) -> list[str]:
        """The planned parameters that a module has."""
        found = dict(model.named_parameters(remove_duplicate=False))
        return [name for entry in self.entries.values() for name in entry.parameters if name in found]

    def bind(self, model: nn.Module) -> Plan:
        """Ties the plan to a module, for one that was loaded, or for a second module of the same architecture.

        Raises:
            UsageError: names, shapes or types of the weights differ.
        """
        if self.graph != "module":
            raise UsageError(f"the plan was made from an {self.graph} model", hint="make it from the nn.Module")
        found = dict(model.named_parameters(remove_duplicate=False))
        for entry in self.entries.values():
            for name in entry.parameters:
                check_fits(entry, found.get(name), name)
        self.modules.add(model)
        self.table.forget()
        return self

    def save(self, folder: str | Path, *, statistics: bool = True, force: bool = False) -> None:
        """Writes ``plan.json`` and ``plan.safetensors`` into a folder.

        Args:
            statistics: with them, a changed weight can be factorised anew; they are most of the bytes.

        Raises:
            UsageError: there is a plan already and ``force`` is not set, or the folder cannot be written.
        """
        from lrcompile.plans_file import save

        save(self, Path(folder), statistics=statistics, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """What :meth:`save` wrote.

        It finds its module when it is compiled with it as a whole; to compile only parts of the module, :meth:`bind`
        it first.

        Raises:
            InvalidInputError: unreadable, malformed or incomplete files.
        """
        from lrcompile.plans_file import load

        return load(Path(folder))

    def refit(self, entry: Entry, weight: Tensor) -> Replacement | str:
        """The entry's expression for a changed weight, of the same structure; or why there is none.

        Args:
            weight: as the module stores it.
        """
        recipe = entry.recipe
        if recipe is None:
            return "its expression was made from several weights together"
        found = LinearSite(entry.name, Dense(matrix(weight, entry.kind)), _uses(recipe, entry), recipe.window)
        if self.calibrated and found.input not in self.moments:
            return "the plan was saved without statistics"
        with torch.inference_mode(False), torch.no_grad():
            each = self.passes.get(recipe.source) or parse(recipe.source, passes())
            context = Context(
                _Lone(found).graph, self.moments, align=self.align, seed=self.seed, gradients=self.gradients
            )
            return _again(each, recipe, found, context)


def _values(entry: Entry, parameters: Any) -> float:
    if entry.replacement is None:
        return torch.Size(entry.shape).numel()
    return parameters([entry.replacement.operator])


def matrix(weight: Tensor, kind: str) -> Tensor:
    """A stored weight as (out, in)."""
    plain = weight.detach()
    return plain.flatten(1) if kind == "Conv" else plain.mT if kind == "Conv1D" else plain


def content(weight: Tensor) -> str:
    """SHA-256 of a weight's values."""
    return hashlib.sha256(raw(weight)).hexdigest()


def check_fits(entry: Entry, weight: Tensor | None, name: str) -> None:
    """Whether a weight is one that an entry speaks about.

    Raises:
        UsageError: it is not; the plan is for another model, or the weight has changed its type or has no values.
    """
    if weight is None:
        raise UsageError("the plan is for another model: there is no such parameter", where=name, hint=_AGAIN)
    if tuple(weight.shape) != entry.shape:
        have = f"the parameter has the shape {tuple(weight.shape)}, the plan says {entry.shape}"
        raise UsageError(f"the plan is for another model: {have}", where=name, hint=_AGAIN)
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype != entry.dtype:
        raise UsageError(f"the weight is {dtype} now, the plan was made for {entry.dtype}", where=name, hint=_AGAIN)
    if weight.is_meta:
        raise UsageError(
            "the weight lies on the meta device and has no values", where=name, hint="load the model first"
        )


_AGAIN = "make a new plan of this model with lrcompile.plan"


def _uses(recipe: Recipe, entry: Entry) -> tuple[Use, ...]:
    out = entry.shape[1] if entry.kind == "Conv1D" else entry.shape[0]
    bias = torch.zeros(out) if recipe.biased else None
    return tuple(Use(f"{entry.name}#{index}", name, bias) for index, name in enumerate(recipe.inputs))


def _again(each: Pass, recipe: Recipe, site: LinearSite, context: Context) -> Replacement | str:
    """Runs the pass once more on this one site."""
    if isinstance(each, GraphPass):
        return apply_exact(each, site, context)
    assert isinstance(each, LinearPass)
    for proposal in each.proposals(site, context):
        if proposal.label == recipe.label and proposal.sites == (site.name,):
            return proposal.by[site.name]
    return f"{recipe.source} no longer proposes '{recipe.label}'"


def apply_exact(each: GraphPass, site: LinearSite, context: Context) -> Replacement | str:
    """What an exact pass makes of one weight, its error verified; or why it leaves it alone."""
    graph = _Lone(site)
    outcomes = each.apply(graph.graph, context)
    if graph.held is None:
        return next((o.reason for o in outcomes if not isinstance(o, Rewritten)), f"{each.name} does not apply")
    plain = Context(graph.graph)
    dtype = str(storage_dtype(site.operator)).removeprefix("torch.")
    limit = EXACT.get(dtype, EXACT["float32"])
    if plain.error(site, graph.held.operator, graph.held.shift) > limit**2 * plain.energy(site):
        return f"rolled back: {each.name} changes the weight by more than rounding"
    return graph.held


class _Lone:
    """A graph of one site, for a pass that looks at nothing else."""

    kind = "weight"

    def __init__(self, site: LinearSite) -> None:
        self.site = site
        self.held: Replacement | None = None

    @property
    def graph(self) -> Graph:
        """Itself, in the eyes of whoever needs no more of a graph than this."""
        return cast(Graph, self)

    def linear_sites(self) -> list[LinearSite]:
        return [self.site]

    def original(self, name: str) -> LinearSite:
        return self.site

    def replace(self, site: LinearSite, by: LinearOperator, shift: Tensor | None = None) -> None:
        self.held = Replacement(by, shift)

    def clean(self) -> tuple[bool, str]:
        return False, "there is nothing around it"
