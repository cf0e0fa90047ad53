"""An exported program again: every structured layer written as plain ``aten`` operations."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet, system_error
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.graphs.fx.flat import flat, stored, typed
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module_run import macs, run
from lrcompile.lowering import Backend


class ExportedModel:
    """A rewritten exported program, ready to run, to save and to compile.

    Attributes:
        model: the program, with the inputs and outputs of the given one.
        path: the ``.pt2`` file, if it was written.
    """

    def __init__(self, model: ExportedProgram, path: Path | None) -> None:
        self.model = model
        self.path = path

    @cached_property
    def _flat(self) -> nn.Module:
        return flat(self.model)

    @property
    def parameters(self) -> int:
        """Number of values in all stored floating-point tensors, each once."""
        return sum(tensor.numel() for tensor in stored(self.model).values() if tensor.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, each once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in stored(self.model).values())

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates on ``sample``."""
        return macs(self._flat, typed(sample, self.model))

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs by name; bfloat16 as float32."""
        return run(self._flat, typed(inputs, self.model))

    def release(self) -> None:
        """Nothing is kept between runs."""


class Exported(Backend):
    """Traces what each structured layer computes and writes it into a copy of the program's graph."""

    name: ClassVar[str] = "exported"
    accepts: ClassVar[type] = FxGraph

    def build(self, graph: Graph, *, out: AtomicSet | None = None) -> ExportedModel:
        """The program with all replacements of the moment.

        Args:
            out: also write it with ``torch.export.save``; the set's target is the ``.pt2`` file.

        Raises:
            UnsupportedError: not a graph of an exported program, or an expression that torch cannot trace.
            ResourceError: the disk is full.
        """
        if not isinstance(graph, FxGraph):
            raise UnsupportedError(f"the backend '{self.name}' builds exported programs, not {graph.kind}")
        program = graph.lowered()
        if out is None:
            return ExportedModel(program, None)
        try:
            with open(out.path, "wb") as stream:  # a path would put its temporary name into the archive
                torch.export.save(program, stream)
        except RuntimeError as error:  # torch's writer has no error of its own for a full disk
            raise system_error(error, out.path) from error
        return ExportedModel(program, out.target)
