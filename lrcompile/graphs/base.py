"""What every graph offers to the passes and the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from lrcompile.calibrate import Moments
from lrcompile.data import InputSpec
from lrcompile.linop import LinearOperator
from lrcompile.sites import LinearSite
from lrcompile.sketch import Importance

Inputs = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]

SUFFIXES = {"onnx": (".onnx",), "fx": (".pt2", ".onnx")}
"""Kinds of graphs whose artefact is one file, and how its name may end, usually first; others are folders."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """What stands at a site now: an expression, and a constant that its output gains.

    Attributes:
        order: the outputs come in this order; a bias that stays in the graph is moved with them.
    """

    operator: LinearOperator
    shift: Tensor | None = None  # (out,)
    order: Tensor | None = None  # (out,) int64


@dataclass(eq=False)
class Journal:
    """Undo log: what each site held before it was replaced. Roll-back needs no second model.

    An entry is a site's name and what it held, or a graph's own note of a rewrite of the whole.
    """

    entries: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self) -> int:
        """A point to roll back to."""
        return len(self.entries)


class Graph(Protocol):
    """A model whose linear sites can be read, measured and replaced."""

    kind: ClassVar[str]

    @property
    def input_specs(self) -> Sequence[InputSpec]:
        """Name, dtype and shape of every input that must be fed."""
        ...

    def linear_sites(self) -> Sequence[LinearSite]:
        """Every constant linear map, in the order of execution; frozen ones included."""
        ...

    def original(self, name: str) -> LinearSite:
        """A site as it stood before anything was replaced."""
        ...

    def replace(self, site: LinearSite, by: LinearOperator, shift: Tensor | None = None) -> None:
        """Installs an expression at every use of the site and writes it to the journal."""
        ...

    @property
    def journal(self) -> Journal: ...

    def rollback(self, mark: int) -> None:
        """Undoes every replacement since ``mark``."""
        ...

    def observe(self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int) -> Mapping[str, Moments]:
        """Moments of the values that the sites read, keyed by value name.

        Args:
            memory: bytes that Gram matrices may take at once; 0: vectors are counted, and nothing else.
        """
        ...

    def probe(self, batches: Iterable[Inputs], changes: Mapping[str, Replacement]) -> Mapping[str, float]:
        """Change of the outputs when each site alone is replaced.

        Returns for every site name the squared relative L2 change, summed over float outputs.
        """
        ...

    def gradients(
        self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int, seed: int
    ) -> Importance:
        """Moments of the outputs' gradients at what the sites give, by site name; see :mod:`lrcompile.sketch`.

        Raises:
            UnsupportedError: the model cannot be differentiated; the reason is named.
        """
        ...

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs of the model as it was loaded, in its own precision or a wider one."""
        ...

    def fingerprint(self) -> str:
        """A content hash of structure and weights, for caches."""
        ...

    @property
    def parameters(self) -> int:
        """Number of values in all floating-point tensors of the loaded model."""
        ...

    @property
    def opset(self) -> int | None:
        """Version of the operator set, where the graph has one."""
        ...

    @property
    def outputs(self) -> Sequence[Mapping[str, Any]]:
        """``name``, ``dtype`` and ``shape`` of every output that is known before a run."""
        ...

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that the model was read from; empty where it was not."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of the loaded model."""
        ...

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates of the loaded model on ``sample``."""
        ...

    def clean(self) -> tuple[bool, str]:
        """Takes out what is unused or repeated; says whether anything was, and what (or why not)."""
        ...

    def release(self) -> None:
        """Gives back memory that only speeds up the next run."""
        ...

    def verify(self) -> None:
        """Raises GateError when the graph is not well-formed."""
        ...
