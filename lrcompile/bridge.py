"""From ONNX to torch; the other way is ``optimize(program, out="model.onnx")``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrcompile.errors import UsageError
from lrcompile.feeds import feeds
from lrcompile.frontend import open_graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def to_program(model: Any, sample: Any = None) -> ExportedProgram:
    """An ONNX model as an exported program of plain ``aten`` operations.

    Weights become parameters (copies of the model's) called like the tensors in the file, or like the site that
    reads them where an exporter made the name up; a factorised site keeps its factors. Inputs keep their names and
    order, and outputs come in a dictionary. Sizes that the model leaves open stay free as far as torch can trace
    it; a :class:`lrcompile.errors.LrcompileWarning` names those that the sample fixes. The program was compared
    with ONNX Runtime on the sample and, where sizes are free, at other sizes.

    Args:
        model: a path, an ONNX model (the ``model`` of a result too), or a graph with replaced sites; not modified.
        sample: a batch of inputs in any form that calibration takes; made up where it is left out.

    Raises:
        UnsupportedError: an operator that has no counterpart, by name and node; 16-bit floats; inputs that cannot
            be made up.
        GateError: the program computes something else than ONNX Runtime.
        InvalidInputError, UsageError: the model, the sample or the call.
    """
    from lrcompile.backends.onnxruntime import OnnxRuntime
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.torched.program import exported

    graph = open_graph(model)
    if not isinstance(graph, OnnxGraph):
        raise UsageError(f"a graph of kind {graph.kind} is no ONNX model", hint="torch.export exports an nn.Module")
    plain = OnnxRuntime().finished(graph) if graph.replacements else graph
    assert isinstance(plain, OnnxGraph)
    return exported(plain, feeds(plain, sample))
