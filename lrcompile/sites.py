"""Plain records that passes see instead of a graph: a weight with everything that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lrcompile.linop import LinearOperator

Role = Literal["apply", "transposed", "rows"]


@dataclass(frozen=True, eq=False)
class Window:
    """Geometry of a convolution whose kernel is a site; the right-most factor meets it."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)


@dataclass(frozen=True, eq=False)
class Use:
    """One place that reads the weight.

    ``apply`` computes ``x @ W.T``, ``transposed`` computes ``x @ W`` and ``rows`` looks rows
    up like an embedding. ``input`` names the value it reads: sites with one input share
    moments and products.
    """

    node: str
    input: str
    bias: Tensor | None = None  # (out,)
    role: Role = "apply"


@dataclass(frozen=True, eq=False)
class LinearSite:
    """A constant linear map of the model, oriented ``(out, in)``, with all of its uses.

    Args:
        name: unique and stable; the module path where the model tells it.
        operator: the current expression.
        kind: what it is written as in the graph (``MatMul``, ``Gemm``, ``Conv``, ``Linear`` …).
        frozen: why it cannot be replaced; empty when it can.
    """

    name: str
    operator: LinearOperator
    uses: tuple[Use, ...]
    window: Window | None = None
    kind: str = "Linear"
    frozen: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def input(self) -> str:
        """The values that its uses read, joined; the key of the site's moments."""
        return "+".join(dict.fromkeys(use.input for use in self.uses if use.role == "apply"))


Site = LinearSite
