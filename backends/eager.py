"""The module itself: every structured layer computes with its factors in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from lrcompile.artifact import write
from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_run import macs, run
from lrcompile.graphs.module_store import nbytes, parameters
from lrcompile.lowering import Backend


class EagerModel:
    """A rewritten module, ready to run, to train, to compile and to save.

    Attributes:
        module: the user's own class, some of its layers structured.
        path: the artefact's index file, if it was written.
        notes: what the files lack, and why.
    """

    def __init__(self, module: nn.Module, path: Path | None, notes: Sequence[str]) -> None:
        self.module = module
        self.path = path
        self.notes = list(notes)

    @property
    def parameters(self) -> int:
        """Number of values in all stored floating-point tensors, each once."""
        return parameters(self.module)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each once."""
        return nbytes(self.module)

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates on ``sample``."""
        return macs(self.module, sample)

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs by name; dropout off, bfloat16 as float32."""
        return run(self.module, inputs)

    def release(self) -> None:
        """Nothing is kept between runs."""


class Eager(Backend):
    """Leaves the structured layers as they are: ``linop.apply`` is their lowering, for every operator."""

    name: ClassVar[str] = "eager"
    accepts: ClassVar[type] = ModuleGraph

    def build(self, graph: Graph, *, out: AtomicSet | None = None) -> EagerModel:
        """The graph's module with all replacements in place: later replacements show in it.

        Args:
            out: also write it; the set's target is the artefact's ``lrcompile.json``.

        Raises:
            UnsupportedError: not a module graph.
            ResourceError: the disk is full.
        """
        if not isinstance(graph, ModuleGraph):
            raise UnsupportedError(f"the backend '{self.name}' builds modules, not {graph.kind}")
        if out is None:
            return EagerModel(graph.model, None, [])
        try:
            write(graph.model, out, source=graph.path, sample=graph.sample)
            notes = []
        except UnsupportedError as error:  # without a program the files still load into a freshly built module
            write(graph.model, out, source=graph.path)
            notes = [error.message]
        return EagerModel(graph.model, out.target, notes)
