"""The module itself: every structured layer computes with its factors in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from lrcompile.artifact import write
from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.graphs.module import ModuleGraph, run
from lrcompile.graphs.module_store import nbytes
from lrcompile.lowering import Backend


class EagerModel:
    """A rewritten module, ready to run, to train, to compile and to save."""

    def __init__(self, module: nn.Module, path: Path | None, files: list[str]) -> None:
        self.module = module
        self.path = path
        self.files = files

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each once."""
        return nbytes(self.module)

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
        files = [] if out is None else write(graph.model, out, source=graph.path)
        return EagerModel(graph.model, None if out is None else out.path, files)
