"""Rewrites of nodes rather than weights: a pattern and what stands in its place, for ONNX, for FX, or for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lrcompile.errors import UsageError
from lrcompile.graphs.base import Graph
from lrcompile.rewrite import Context, GraphPass, Outcome, Refused, Rewritten

FxPattern = tuple[Callable[..., Any], Callable[..., Any]] | tuple[Callable[..., Any], Callable[..., Any], Sequence[Any]]
"""(pattern, replacement): two functions of the same arguments, and example inputs where these need a certain shape."""


@dataclass(frozen=True, eq=False)
class NodeRewrite(GraphPass):
    """A rewrite of nodes by pattern; applied, probed, gated and rolled back like every other pass.

    The object itself is what an entry point ``lrcompile.passes`` names, and what a pipeline takes.

    Args:
        name: as users write it.
        onnx: an onnxscript ``RewriteRule`` or ``RewriteRuleSet`` (``onnxscript.rewriter``), or a sequence of rules.
        fx: a (pattern, replacement) pair of functions in plain torch, or a sequence of pairs. They apply to
            exported programs (graphs of the kind ``fx``): both are traced into ``aten`` operations, with the
            example inputs that follow them in the tuple, else with small tensors of equal shape.
        exact: whether the outputs are reproduced to rounding. If not, the gate's drift limit applies.
        doc: what it does, for ``lrcompile passes``; the first line is the summary.

    Raises:
        UsageError: neither kind of rule is given, or a name that the command line could not take.
    """

    early: ClassVar[bool] = True

    name: str  # type: ignore[misc]
    onnx: Any = None
    fx: FxPattern | Sequence[FxPattern] | None = None
    exact: bool = True  # type: ignore[misc]
    doc: str = ""

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name):
            raise UsageError(f"'{self.name}' is no name for a pass", hint="letters, digits and hyphens")
        if self.onnx is None and self.fx is None:
            raise UsageError("a node rewrite needs an ONNX rule or an FX pattern", where=self.name)
        object.__setattr__(self, "__doc__", self.doc or f"Rewrites nodes by the pattern of '{self.name}'.")

    @classmethod
    def options(cls) -> dict[str, tuple[str, Any]]:
        """It has none: its fields are its rules."""
        return {}

    def __call__(self) -> NodeRewrite:
        """Itself, so that the object stands where others have a class."""
        return self

    def __str__(self) -> str:
        return self.name

    @property
    def fx_patterns(self) -> list[FxPattern]:
        """The FX pairs; empty without any."""
        if self.fx is None:
            return []
        return [self.fx] if callable(self.fx[0]) else list(self.fx)  # type: ignore[list-item]

    def rules(self, kind: str) -> Any:
        """What it has for a graph of a kind (``onnx`` or ``fx``); None where it has nothing."""
        return {"onnx": self.onnx, "fx": self.fx_patterns or None}.get(kind)

    def apply(self, graph: Graph, context: Context) -> Sequence[Outcome]:
        """Rewrites every match; a graph of a kind that it has no rule for is refused.

        A graph that nodes can be rewritten in has ``rewrite_nodes(rules)``: it applies the rules of its kind,
        writes to its journal, and returns the name of a node for each match.
        """
        rules = self.rules(graph.kind)
        rewrite = getattr(graph, "rewrite_nodes", None)
        if rules is None or rewrite is None:
            more = "; export it with torch.export first" if graph.kind == "module" and self.fx is not None else ""
            return [Refused(self.name, f"no rule for a graph of kind '{graph.kind}'{more}")]
        return [Rewritten(place) for place in rewrite(rules)]
