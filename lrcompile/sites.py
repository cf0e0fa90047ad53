"""Plain records that passes see instead of a graph: a weight with everything that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from lrcompile.linop import LinearOperator

Role = Literal["apply", "transposed", "rows"]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution whose kernel is a site; the right-most factor meets it.

    The site's matrix is ``(out, in * places)``: its columns run over input channels, then over the kernel.

    Args:
        kernel, strides: one number for each spatial axis.
        pads: zeros before each axis, then zeros behind each axis; none by default.
        dilations: steps between the places of the kernel; 1 by default.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pads", self.pads or (0, 0) * self.rank)
        object.__setattr__(self, "dilations", self.dilations or (1,) * self.rank)

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def places(self) -> int:
        """Positions of the input that one output position reads."""
        return prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether every output position reads a single, real position of the input."""
        return self.places == 1 and not any(self.pads)

    @property
    def strided(self) -> bool:
        return any(step != 1 for step in self.strides)

    def split(self, places: int) -> tuple[Window, Window] | None:
        """Two windows, one after the other, of which the second has ``places`` places along the last axes.

        None where no number of last axes has so many.
        """
        for axis in range(self.rank, -1, -1):
            if prod(self.kernel[axis:]) == places:
                return self._part(range(axis)), self._part(range(axis, self.rank))
        return None

    def _part(self, axes: range) -> Window:
        def kept(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(value if i % self.rank in axes else otherwise for i, value in enumerate(values))

        return Window(kept(self.kernel, 1), kept(self.strides, 1), kept(self.pads, 0), kept(self.dilations, 1))

    def __str__(self) -> str:
        """Short text, like ``3x3 patches, steps 2x2, pads 1.1.1.1``."""
        parts = [] if self.places == 1 else ["x".join(map(str, self.kernel)) + " patches"]
        parts += [f"steps {'x'.join(map(str, self.strides))}"] if self.strided else []
        parts += [f"pads {'.'.join(map(str, self.pads))}"] if any(self.pads) else []
        spread = any(step != 1 for step in self.dilations)
        parts += [f"dilations {'x'.join(map(str, self.dilations))}"] if spread else []
        return ", ".join(parts)


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
