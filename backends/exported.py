"""An exported program again: every structured layer written as plain ``aten`` operations."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Graph, Inputs, Outputs
from lrcompile.graphs.fx.flat import flat, input_specs, output_names, stored, typed
from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.graphs.module_run import macs, run
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.lowering import Backend

LARGEST = 1900 * 2**20
"""Bytes of weights that one protobuf file takes."""


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

    def build(self, graph: Graph, *, out: AtomicSet | None = None) -> ExportedModel | OnnxGraph:
        """The program with all replacements of the moment.

        Args:
            out: also write it. The set's target is a ``.pt2`` file for ``torch.export.save``, or an ``.onnx`` file
                for ``torch.onnx.export``; then what is returned runs that file in ONNX Runtime.

        Raises:
            UnsupportedError: not a graph of an exported program, or something that torch cannot trace or export.
            ResourceError: the disk is full.
        """
        if not isinstance(graph, FxGraph):
            raise UnsupportedError(f"the backend '{self.name}' builds exported programs, not {graph.kind}")
        program = graph.lowered()
        if out is None:
            return ExportedModel(program, None)
        if out.target.suffix == ".onnx":
            return _onnx(program, out.path)
        with open(out.path, "wb") as stream:  # a path would put its temporary name into the archive
            _save(program, stream)
        return ExportedModel(program, out.target)


def _save(program: ExportedProgram, stream: IO[bytes]) -> None:
    sink: Any = _Sink(stream)
    try:
        torch.export.save(program, sink)
    except Exception as error:  # torch raises anything
        if sink.error is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise UnsupportedError(f"torch.export.save cannot write the program: {reason}") from error
    if sink.error is not None:
        raise sink.error


class _Sink(io.RawIOBase):
    """Keeps an error of writing for later: torch's writer would end the whole process on it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """torch goes back to the start when all is written."""
        return offset if self.error is not None else self.stream.seek(offset, whence)

    def write(self, data: Any) -> int:
        """Takes everything; after an error it goes nowhere."""
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def _onnx(program: ExportedProgram, path: Path) -> OnnxGraph:
    """Writes standard ONNX operators; inputs, outputs and weights keep their names."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored(program).values())
    if size > LARGEST:
        raise UnsupportedError(
            "an .onnx file of more than 2 GB is not made of an exported program", hint="write a .pt2 file instead"
        )
    inputs, named = [spec.name for spec in input_specs(program)], output_names(program)
    count = max(named.values(), default=-1) + 1
    outputs = {index: name for name, index in named.items()}
    try:
        with _quiet():
            torch.onnx.export(
                program,
                f=path,
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=inputs,
                output_names=[outputs.get(index, f"output_{index}") for index in range(count)],
            )
    except OSError:
        raise
    except Exception as error:  # torch raises anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise UnsupportedError(f"torch.onnx cannot export the program: {lines[-1].strip()[:300]}") from error
    return OnnxGraph.load(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
