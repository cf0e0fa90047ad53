"""Backends: how expressions become something that runs, by one rule table each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.linop import LinearOperator

Rules = Mapping[type[LinearOperator], Callable[..., Any]]
"""One lowering case for each operator type. Dense, Product and Sum are mandatory."""


class Runnable(Protocol):
    """A built model: what it computes and what it costs."""

    @property
    def parameters(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates on ``sample``."""
        ...

    def release(self) -> None:
        """Gives back memory that only speeds up the next run."""
        ...

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs by name."""
        ...


class Backend(ABC):
    """A target: which graphs it takes, how it lowers each operator, how it builds."""

    name: ClassVar[str]
    accepts: ClassVar[type]
    rules: ClassVar[Rules] = {}
    align: ClassVar[int] = 8  # ranks that the target likes are multiples of this

    @abstractmethod
    def build(self, graph: Graph, *, out: AtomicSet | None = None) -> Runnable:
        """Lowers every replaced site; writes the result to the files ``out`` where they are given.

        Raises:
            UnsupportedError: the graph is of another kind, or an operator has no rule.
        """

    def finished(self, graph: Graph) -> Graph:
        """The graph with every replaced site written out, for passes over the nodes of the result.

        A graph without nodes is returned as it is.
        """
        return graph


def rule_for(rules: Rules, operator: LinearOperator, backend: str) -> Callable[..., Any]:
    """The rule of an operator's type.

    Raises:
        UnsupportedError: there is none.
    """
    rule = rules.get(type(operator))
    if rule is None:
        raise UnsupportedError(
            f"the backend '{backend}' has no rule for {type(operator).__name__}",
            hint="densify the site, or choose another backend",
        )
    return rule
