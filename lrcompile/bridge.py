"""From ONNX to torch; the other way is ``optimize(program, out="model.onnx")``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrcompile.data import InputSpec, castable
from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError, nearest
from lrcompile.feeds import feeds
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def to_program(model: Any, sample: Any = None) -> ExportedProgram:
    """An ONNX model as an exported program of plain ``aten`` operations.

    Weights become parameters (copies of the model's) called like the tensors in the file, or like the site that
    reads them where an exporter made the name up; a factorised site keeps its factors. Inputs keep their names and
    order, and outputs come in a dictionary. Sizes that the model leaves open stay free as far as torch can trace
    it (a size of 0 or 1 inside the model may be outside of what it traced: the program then refuses such inputs);
    a :class:`lrcompile.errors.LrcompileWarning` names those that the sample fixes. The program was compared
    with ONNX Runtime on the sample and, where sizes are free, at other sizes.

    Args:
        model: a path, an ONNX model (the ``model`` of a result too), or a graph with replaced sites; not modified.
        sample: arrays or tensors by input, or anything else that calibration takes (the first samples are used);
            made up where it is left out.

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
    return exported(plain, _batch(plain.input_specs, sample) if _named(sample) else _feeds(plain, sample))


def _feeds(graph: Graph, sample: Any) -> dict[str, np.ndarray]:
    try:
        return feeds(graph, sample)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, where=error.where, hint="give sample=, arrays by input") from error


def _named(sample: Any) -> bool:
    return isinstance(sample, Mapping) and all(hasattr(value, "shape") for value in sample.values())


def _batch(specs: Sequence[InputSpec], sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by input as they are, whose first axes need not all count samples."""
    known = {spec.name: spec for spec in specs}
    odd = next((name for name in sample if name not in known), None)
    if odd is not None:
        raise InvalidInputError(f"'{odd}' is no input of the model", where="sample", hint=nearest(odd, known))
    missing = [name for name in known if name not in sample]
    if missing:
        raise InvalidInputError(f"lacks the input(s) {', '.join(missing)}", where="sample")
    return {name: _array(spec, sample[name]) for name, spec in known.items()}


def _array(spec: InputSpec, value: Any) -> np.ndarray:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if spec.dtype is not None and not castable(array.dtype, spec.dtype):
        raise InvalidInputError(f"holds {array.dtype}, the model takes {spec.dtype}", where=f"sample: {spec.name}")
    fits = [want == have or not isinstance(want, int) for want, have in zip(spec.shape, array.shape, strict=False)]
    if spec.shape and (len(array.shape) != len(spec.shape) or not all(fits)):
        wanted = ", ".join(map(str, spec.shape))
        raise InvalidInputError(f"has shape {array.shape}, the model takes ({wanted})", where=f"sample: {spec.name}")
    return array if spec.dtype is None else array.astype(spec.dtype, copy=False)
