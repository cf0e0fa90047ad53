"""Passes: what they propose, what they are told, and how their options are written.

A pass is a frozen dataclass. Its fields are its options, its command-line form
(``low-rank{metric=plain}``), its printing and its equality, from one declaration.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrcompile.calibrate import Moments
from lrcompile.errors import UsageError, nearest
from lrcompile.graphs.base import Graph, Inputs, Replacement
from lrcompile.linop import Cost, LinearOperator, densify
from lrcompile.sites import LinearSite
from lrcompile.spectrum import importance_matrix
from lrcompile.windows import site_cost


@dataclass(eq=False)
class Proposal:
    """A cheaper expression for one or several sites, built only when it is chosen.

    Attributes:
        sites: names of the sites that it covers.
        error: energy of the error at the outputs of its sites, as :meth:`Context.error` has it; what it does to
            the loss is the driver's to find out.
        cost: stored values, bytes, and multiply–accumulates per token of all uses.
        build: makes the replacements.
        label: what it is, for reports (``rank 96``).
        source: the name of the pass.
        rank: its rank, where it has one.
        tails: error at every rank from 0 on, where the pass knows it; for pictures.
        form: how it is stored, where a pass has several ways: proposals of one pass, form and shape differ in
            size only, so what they cost in time is measured at a few sizes.
    """

    sites: tuple[str, ...]
    error: float
    cost: Cost
    build: Callable[[], Mapping[str, Replacement]]
    label: str = ""
    source: str = ""
    rank: int | None = None
    tails: Sequence[float] = ()
    form: str = ""

    @cached_property
    def by(self) -> Mapping[str, Replacement]:
        """The replacements."""
        return self.build()


@dataclass(frozen=True)
class Rewritten:
    """A site that a pass changed."""

    site: str
    detail: str = ""


@dataclass(frozen=True)
class Refused:
    """A site that a pass left alone, and why."""

    site: str
    reason: str


Outcome = Rewritten | Refused


@dataclass(eq=False)
class Context:
    """What a pass may ask for: statistics of a site, the error of an expression, ranks, randomness.

    Args:
        graph: the model.
        moments: by :attr:`LinearSite.input`; empty without calibration data.
        gradients: moments of the outputs' gradients at what a site gives, by its name; empty where not known.
        align: ranks are multiples of this, as the target likes.
        seed: of everything random.
        sample: inputs of the sizes that the user's data have; None without data. A pass that is told other sizes
            puts its own here.
        pivots: by site, outputs that may become an identity without a step that puts all outputs in order: what
            follows bears any order of them.
        trial: what is proposed gets timed, never used: its structure counts, its error does not.
    """

    graph: Graph
    moments: Mapping[str, Moments] = field(default_factory=dict)
    align: int = 8
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    gradients: Mapping[str, Moments] = field(default_factory=dict)
    sample: Inputs | None = None
    pivots: Mapping[str, slice] = field(default_factory=dict)
    trial: bool = False

    def statistics(self, site: LinearSite) -> Moments | None:
        """Moments of what the site reads, or None without calibration data."""
        return self.moments.get(site.input)

    def importance(self, site: LinearSite) -> Tensor | None:
        """(out, out) float64: what an error at the site's output does to the model's outputs; None where not known."""
        gradients = self.gradients.get(site.name)
        return None if gradients is None else importance_matrix(gradients)

    def ranks(self, site: LinearSite, *, gauged: bool = False) -> list[int]:
        """Aligned ranks below break-even, the smallest first; in the identity gauge every rank is below it."""
        out, into = site.shape
        limit = min(out, into) - 1 if gauged else (out * into - 1) // (out + into)
        return list(range(self.align, limit + 1, self.align))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers that depend on the seed and the shape only."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def error(self, site: LinearSite, operator: LinearOperator, shift: Tensor | None = None) -> float:
        """``E[eᵀ G e]`` of the error ``e = (W − Ŵ) x − shift`` over the calibration inputs.

        G is :meth:`importance`, or the identity; without data the squared Frobenius norm of ``W − Ŵ``.
        """
        difference = densify(site.operator).double() - densify(operator).double()
        return self._energy(site, difference, shift)

    def energy(self, site: LinearSite) -> float:
        """``E[yᵀ G y]`` of the output ``y = W x``; without data the squared Frobenius norm."""
        return self._energy(site, densify(site.operator).double())

    def _energy(self, site: LinearSite, matrix: Tensor, shift: Tensor | None = None) -> float:
        moments, outer = self.statistics(site), self.importance(site)
        weighted = matrix if outer is None else outer @ matrix
        if moments is None:
            return float((matrix * weighted).sum())
        second = (matrix.float() @ moments.gram).double() / max(moments.tokens, 1)
        energy = float((second * weighted).sum())
        if shift is not None:
            moved = shift.double()
            against = moved if outer is None else outer @ moved
            energy += float(against @ moved - 2 * against @ (matrix @ moments.mean()))
        return max(energy, 0.0)

    def price(self, site: LinearSite, operator: LinearOperator) -> Cost:
        """Stored values and bytes once, multiply–accumulates per token for each use."""
        return site_cost(site, operator)


class Pass(ABC):
    """Something that rewrites a graph. ``exact`` passes reproduce the outputs to rounding."""

    name: ClassVar[str]
    exact: ClassVar[bool] = False

    @classmethod
    def options(cls) -> dict[str, tuple[str, Any]]:
        """Every option with its type and default."""
        if not dataclasses.is_dataclass(cls):
            return {}
        return {f.name: (_type_name(f.type), _default(f)) for f in dataclasses.fields(cls)}

    def __str__(self) -> str:
        if not _is_data(type(self)):
            return self.name
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != _default(f)
        ]
        return f"{self.name}{{{', '.join(changed)}}}" if changed else self.name


def _is_data(cls: type) -> bool:
    return dataclasses.is_dataclass(cls)


def _type_name(kind: Any) -> str:
    """As it is written; with and without ``from __future__ import annotations``."""
    return kind.__name__ if type(kind) is type else str(kind)


def _default(f: dataclasses.Field) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


class GraphPass(Pass):
    """A pass that rewrites a graph directly; exact unless it says otherwise.

    Attributes:
        early: it puts another model in the place of the graph's, so it runs before those that replace weights.
        late: it cuts up the nodes of what will be published, so it runs after everything else, and again where
            something else is chosen.
        follows: it tidies up behind replaced weights, so it runs right after them, and again where something else
            is chosen.
    """

    exact: ClassVar[bool] = True
    early: ClassVar[bool] = False
    late: ClassVar[bool] = False
    follows: ClassVar[bool] = False

    @abstractmethod
    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites the graph in place and says what it did and what it left alone."""


class LinearPass(Pass):
    """A pass over single linear sites; the allocator decides among what it proposes."""

    def propose(self, site: LinearSite, context: Context) -> Iterator[LinearOperator]:
        """Cheaper expressions for the site; most users override this one."""
        raise UsageError(f"{self.name}: a linear pass defines propose() or proposals()")

    def concerns(self, site: LinearSite) -> bool:
        """Whether the site is of a kind that the pass is for; others are not even refused."""
        return True

    def refuse(self, site: LinearSite, context: Context) -> str:
        """Why the pass leaves the site alone; empty where it does not."""
        return ""

    def proposals(self, site: LinearSite, context: Context) -> Iterator[Proposal]:
        """Proposals with error and cost; override it where both are known without building."""
        for operator in self.propose(site, context):
            stored = _like(operator, site)
            yield Proposal(
                (site.name,),
                context.error(site, stored),
                context.price(site, stored),
                lambda by=stored: {site.name: Replacement(by)},
                label=repr(stored),
                source=self.name,
                form=outline(stored),
            )


def _like(operator: LinearOperator, site: LinearSite) -> LinearOperator:
    """The operator with matrices, and whatever a decomposition left in float64, in the dtype that the site stores."""
    from lrcompile.linop import Dense, map_leaves
    from lrcompile.linop.tree import own_tensors

    dtype = storage_dtype(site.operator)

    def cast(leaf: LinearOperator) -> LinearOperator:
        wide = {n: t for n, t in own_tensors(leaf) if t.dtype == torch.float64 or isinstance(leaf, Dense)}
        return dataclasses.replace(leaf, **{n: t.to(dtype) for n, t in wide.items()}) if wide else leaf  # type: ignore

    return map_leaves(operator, cast)


def outline(operator: LinearOperator) -> str:
    """The types of an expression, without sizes: ``Product(Dense, Dense)``."""
    from lrcompile.linop.tree import children

    parts = ", ".join(map(outline, children(operator)))
    return f"{type(operator).__name__}({parts})" if parts else type(operator).__name__


def storage_dtype(operator: LinearOperator) -> torch.dtype:
    """The floating dtype that an operator is stored in."""
    from lrcompile.linop import tensors

    return next((t.dtype for _, t in tensors(operator) if t.is_floating_point()), torch.float32)


def parse(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    """``low-rank{metric=plain, align=16}`` as a pass.

    Raises:
        UsageError: unknown pass or option (with the nearest name), a value of the wrong type, an option
            twice, or none where one is needed.
    """
    name, brace, rest = text.strip().partition("{")
    if name not in known:
        raise UsageError(f"unknown pass '{name}'", hint=nearest(name, known))
    if brace and not rest.endswith("}"):
        raise UsageError(f"'{text}' lacks its closing brace", where=name)
    cls = known[name]
    values = {}
    for item in filter(None, (part.strip() for part in rest.removesuffix("}").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in cls.options():
            raise UsageError(f"unknown option '{key}'", where=name, hint=nearest(key, cls.options()))
        if not equals or key in values:
            reason = "is given twice" if equals else "lacks its value"
            raise UsageError(f"the option '{key}' {reason}", where=name, hint=f"write {name}{{{key}=...}}")
        values[key] = _convert(value, cls.options()[key], f"{name}.{key}")
    try:
        return cls(**values)
    except TypeError as error:  # an option without a default
        raise UsageError(f"cannot be made: {error}", where=name) from error


def _convert(text: str, option: tuple[str, Any], where: str) -> Any:
    kind, default = option
    if kind.startswith("Literal["):
        return _one_of(text, re.findall(r"""['"]([^'"]*)['"]""", kind), where)
    try:
        if text == "None" and "None" in kind:
            return None
        if "bool" in kind or isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if "float" in kind or isinstance(default, float):
            return float(text)
        if re.search(r"\bint\b", kind) or isinstance(default, int):
            return int(text)
        return text
    except (KeyError, ValueError):
        raise UsageError(f"'{text}' is not {kind}", where=where) from None


def _one_of(text: str, known: Sequence[str], where: str) -> str:
    if text not in known:
        raise UsageError(f"'{text}' is not one of {', '.join(known)}", where=where, hint=nearest(text, known))
    return text
