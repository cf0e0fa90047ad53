"""Plain standard ONNX: a file that any runtime loads, no custom operator in it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from lrcompile.backends.onnx_emit import Emitter, Store
from lrcompile.backends.onnx_rules import RULES
from lrcompile.errors import UnsupportedError
from lrcompile.files import AtomicSet
from lrcompile.graphs.base import Graph, Inputs, Outputs, Replacement
from lrcompile.graphs.onnx.counting import macs
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.match import Match, path_dtype
from lrcompile.graphs.onnx.save import write
from lrcompile.graphs.onnx.session import FileSession, Session, has_bfloat16
from lrcompile.graphs.onnx.splice import Splicer, Tape, add_bias
from lrcompile.lowering import Backend, Rules


class OnnxModel:
    """A lowered model, in memory or in a file.

    Args:
        paths: where the file stands: while it is staged, and once it is published.
    """

    def __init__(self, model: ir.Model, *paths: Path) -> None:
        self.model = model
        self.paths = paths
        self._session: Session | FileSession | None = None

    @property
    def path(self) -> Path | None:
        """The file, where there is one."""
        return next((path for path in self.paths if path.exists()), None)

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs in ONNX Runtime, from the file where there is one.

        The CPU has no bfloat16 kernels: such a model is computed in float32, from the same weights.
        """
        if self._session is None:
            path = None if has_bfloat16(self.model.graph) else self.path
            self._session = FileSession(str(path)) if path else Session(self.model.graph.clone(), self.model)
        return self._session.run(inputs)

    def release(self) -> None:
        """Gives the session's memory back."""
        self._session = None

    @property
    def parameters(self) -> int:
        """Number of values in all floating-point tensors."""
        return OnnxGraph(self.model).parameters

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return OnnxGraph(self.model).nbytes

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates on ``sample``."""
        return macs(self.model, sample)


class OnnxRuntime(Backend):
    """Lowers to MatMul, Conv, Add and a few others of the standard operator set."""

    name: ClassVar[str] = "onnxruntime"
    accepts: ClassVar[type] = OnnxGraph
    rules: ClassVar[Rules] = RULES

    def build(self, graph: Graph, *, out: AtomicSet | None = None) -> OnnxModel:
        """A new model that shares every untouched weight with the loaded one.

        Raises:
            UnsupportedError: not an ONNX graph, or an operator has no rule.
            ResourceError: the disk is full.
        """
        if not isinstance(graph, OnnxGraph):
            raise UnsupportedError(f"the backend '{self.name}' builds ONNX graphs, not {graph.kind}")
        model = lower(graph)
        if out is not None:
            write(model, out, external=True if graph.is_external else None)
        return OnnxModel(model) if out is None else OnnxModel(model, out.path, out.target)

    def finished(self, graph: Graph) -> Graph:
        """The lowered model as a graph of its own; weights are shared."""
        return OnnxGraph(lower(graph), graph.path) if isinstance(graph, OnnxGraph) else graph


def lower(graph: OnnxGraph) -> ir.Model:
    """The loaded model with every replaced site written in standard operators."""
    model = graph.model.clone()
    if not graph.replacements:
        return model
    splicer = Splicer(graph.model.graph, model.graph)
    blocks = any(node.domain == "com.microsoft" and node.op_type == "MatMulNBits" for node in model.graph)
    store = Store(RULES, graph.opset or 0, blocks)
    for name, replacement in graph.replacements.items():
        for match in graph.matches(name):
            _lower_site(splicer, store, name, match, replacement)
    splicer.inline_biases()
    model.graph.sort()
    splicer.drop_unused()
    return model


def _lower_site(splicer: Splicer, store: Store, name: str, match: Match, replacement: Replacement) -> None:
    def emit(tape: Tape, match: Match, source: ir.Value) -> ir.Value:
        if match.axis == 0:
            key = (source, "columns")
            source = store.once(key, lambda: tape.op("Transpose", [source], [ir.AttrInt64s("perm", [1, 0])]))
        result = Emitter(store, tape, name, path_dtype(match), match.window).apply(replacement.operator, source)
        return add_bias(tape, match, result, shift if match.adder is None else None, splicer)

    store.scope = id(match.nodes[-1].graph)
    shift = splicer.shift(match, replacement.shift)
    splicer.replace(match, emit, name)
    if match.adder is not None and shift is not None:
        splicer.shift_adder(match, shift, name)
