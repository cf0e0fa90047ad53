"""An ONNX model as a ``torch.export.ExportedProgram``, compared with ONNX Runtime before it is given out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor
from torch.export import ExportedProgram

from lrcompile.errors import GateError, LrcompileError, LrcompileWarning, UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.observe import tensor_of
from lrcompile.graphs.onnx.torched.module import Traceable, refusal, stored
from lrcompile.graphs.onnx.torched.resize import Sized, resized, symbols, trial
from lrcompile.graphs.onnx.torched.run import FLAT_SOFTMAX
from lrcompile.graphs.onnx.torched.sizes import Sizes
from lrcompile.graphs.onnx.torched.titles import titles

TOLERANCE = 1e-3
"""Largest relative L2 distance of an output to that of ONNX Runtime."""

_INTEGERS = ("INT8", "INT16", "INT32", "INT64")
_FED = frozenset(ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "BOOL", "UINT8", *_INTEGERS))
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def exported(graph: OnnxGraph, sample: Inputs) -> ExportedProgram:
    """The program of a graph without replacements.

    All sizes that the model leaves open stay free, else those of the batch alone, else none; what is fixed although
    the model leaves it open is said in a warning. The program is compared with ONNX Runtime on the sample, and at
    other sizes where it takes them.

    Args:
        sample: a batch.

    Raises:
        UnsupportedError: an operator that is not covered, by name and node; 16-bit floats; torch cannot export it.
        GateError: the program computes something else than ONNX Runtime.
    """
    model = InlinePass()(graph.model.clone()).model if graph.model.functions else graph.model
    _check(model)
    names = titles(stored(model.graph), {site.name: graph.matches(site.name) for site in graph.linear_sites()})
    open_sizes, sizes = symbols(model.graph, sample)
    attempts = [open_sizes.names, open_sizes.batch, frozenset()]
    last: LrcompileError | None = None
    for free in dict.fromkeys(attempts):
        try:
            program = _attempt(graph, model.graph, names, sample, open_sizes, sizes, free)
        except LrcompileError as error:
            last = last or error
            if not free:
                raise
            continue
        _tell(program, open_sizes, free, last)
        return program
    raise last or UnsupportedError("no attempt was made")


def _check(model: ir.Model) -> None:
    for value in model.graph.inputs:
        if value.dtype is None or value.dtype not in _FED:
            kind = "an unknown type" if value.dtype is None else value.dtype.name
            raise UnsupportedError(f"an input of {kind} is not carried over to torch", where=str(value.name))
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    narrow = next((value for value in values if value.dtype in _NARROW), None)
    if narrow is not None:
        hint = "convert the model to float32"
        raise UnsupportedError("16-bit floats are not carried over to torch", where=str(narrow.name), hint=hint)
    for node in model.graph:
        if (model.opset_imports.get("") or 0) < FLAT_SOFTMAX and node.op_type in ("Softmax", "LogSoftmax"):
            raise refusal(node, f"its meaning before operator set {FLAT_SOFTMAX}")


def _attempt(
    graph: OnnxGraph,
    body: ir.Graph,
    names: Mapping[str, str],
    sample: Inputs,
    open_sizes: Sized,
    sizes: Mapping[str, int],
    free: frozenset[str],
) -> ExportedProgram:
    """A program in which these sizes may be free."""
    given = resized(sample, open_sizes, trial(sizes, free))
    wanted = graph.run(given)
    module = _first(body, names, given, {})
    if not free:
        module = _first(body, names, given, module.measured)
    module.settle()
    program = _traced(module, given, open_sizes, free)
    _compare(program, given, wanted)
    varying = _free(program, module, open_sizes)
    if varying:
        other = resized(given, open_sizes, {**trial(sizes, free), **_others(trial(sizes, free), varying)})
        _compare(program, other, graph.run(other))
    return program


def _first(body: ir.Graph, names: Mapping[str, str], given: Inputs, shapes: Mapping[str, Sizes]) -> Traceable:
    module = Traceable(body, names, shapes).eval()
    with torch.no_grad():
        module(*_tensors(given))
    return module


def _tensors(given: Inputs) -> tuple[Tensor, ...]:
    """The inputs in their order, which :func:`resized` gives them."""
    return tuple([tensor_of(np.asarray(array)) for array in given.values()])


def _traced(module: Traceable, given: Inputs, open_sizes: Sized, free: frozenset[str]) -> ExportedProgram:
    auto = torch.export.Dim.AUTO
    dims = [
        {
            axis: auto
            for axis, key in enumerate(open_sizes.axes[name])
            if key is not None and open_sizes.under(key, free)
        }
        for name in module.inputs
    ]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, _tensors(given), dynamic_shapes=tuple(dims), strict=False)
    except LrcompileError:
        raise
    except Exception as error:  # export raises anything
        cause = error.__cause__ if isinstance(error.__cause__, LrcompileError) else None
        raise cause or UnsupportedError(f"torch.export fails: {_line(error)}") from error


def _free(program: ExportedProgram, module: Traceable, open_sizes: Sized) -> frozenset[str]:
    """The sizes that torch kept free."""
    found: set[str] = set()
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for name, fed in zip(module.inputs, program.graph_signature.user_inputs, strict=True):
        value = nodes[str(fed)].meta["val"]
        for key, size in zip(open_sizes.axes[name], value.shape, strict=True):
            if key is not None and not isinstance(size, int):
                found |= open_sizes.parts(key)
    return frozenset(found)


def _others(sizes: Mapping[str, int], varying: Iterable[str]) -> dict[str, int]:
    return {key: sizes[key] - 1 if sizes[key] > 2 else sizes[key] + 1 for key in varying if key in sizes}


def _compare(program: ExportedProgram, given: Inputs, wanted: Mapping[str, Any]) -> None:
    try:
        with torch.no_grad():
            found = program.module()(*_tensors(given))
    except Exception as error:  # a condition that torch noted, or anything
        raise UnsupportedError(f"the program does not run at other sizes: {_line(error)}") from error
    for name, want in wanted.items():
        have, like = found[name].double(), tensor_of(np.asarray(want)).double()
        distance = 0.0 if have.shape != like.shape else float((have - like).norm())
        if have.shape != like.shape or not distance <= TOLERANCE * float(like.norm()) + 1e-6:
            raise GateError("the program computes something else than ONNX Runtime", where=name)


def _tell(program: ExportedProgram, open_sizes: Sized, free: frozenset[str], last: LrcompileError | None) -> None:
    """Warns of sizes that the model leaves open and the program does not."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    fixed = []
    for (name, axes), fed in zip(open_sizes.axes.items(), program.graph_signature.user_inputs, strict=True):
        shape = nodes[str(fed)].meta["val"].shape
        for axis, (key, size) in enumerate(zip(axes, shape, strict=True)):
            if key is not None and isinstance(size, int):
                fixed.append(f"axis {axis} of {name} at {size}")
    if fixed:
        reason = f" ({last})" if last is not None else ""
        warnings.warn(f"the program fixes {', '.join(fixed)}{reason}", LrcompileWarning, stacklevel=5)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
