"""A folder that times a model's products on a machine with nothing but numpy and ONNX Runtime.

It holds models without weights: large tensors point into one file of made-up numbers, which the script
writes before it measures and removes afterwards. So the kit of a model of gigabytes has some kilobytes,
and nobody's weights travel.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile import __version__
from lrcompile.costs import Shape, described
from lrcompile.errors import UnsupportedError
from lrcompile.feeds import stored
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import LinearOperator
from lrcompile.lowering import Backend
from lrcompile.profiling import script
from lrcompile.profiling.survey import ROTATED, Survey, anchored, copied, copies, image
from lrcompile.sites import Window

SCRIPT = "measure.py"
OUTSIDE = 1024
"""Float tensors with more elements than this hold made-up numbers."""
_KINDS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "float64",
          ir.DataType.INT8: "bytes", ir.DataType.UINT8: "bytes", ir.DataType.INT4: "bytes",
          ir.DataType.UINT4: "bytes"}  # fmt: skip


@dataclass(eq=False)
class Weights:
    """Files of made-up numbers: which kind each holds, and how many bytes."""

    sizes: dict[str, int] = field(default_factory=dict)
    cursor: dict[str, int] = field(default_factory=dict)

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor | None:
        """Where a tensor's numbers come from; None for one that the model keeps."""
        kind = _KINDS.get(tensor.dtype)
        if kind is None or tensor.size <= OUTSIDE:
            return None
        start = self.cursor.get(kind, 0)
        if start + tensor.nbytes > ROTATED:
            start = 0
        self.cursor[kind] = start + tensor.nbytes + -tensor.nbytes % 4096
        self.sizes[kind] = max(self.sizes.get(kind, 0), start + tensor.nbytes)
        held = ir.Shape(tensor.shape.numpy())
        name = tensor.name or "w"
        return ir.ExternalTensor(f"{kind}.bin", start, tensor.nbytes, tensor.dtype, shape=held, name=name, base_dir=".")

    @property
    def files(self) -> dict[str, tuple[str, int]]:
        """File → (kind, bytes)."""
        return {f"{kind}.bin": (kind, size) for kind, size in self.sizes.items()}


def write(survey: Survey, backend: Backend, folder: Path, threads: int) -> Path:
    """Writes the kit; returns its script.

    Raises:
        UnsupportedError: bfloat16, for which ONNX Runtime has no kernels on CPUs.
    """
    graph = survey.graph
    if not isinstance(graph, OnnxGraph):
        raise UnsupportedError("a kit is made for ONNX models", hint="export the model to ONNX first")
    weights = Weights()
    shapes = [_shape(survey, backend, shape, folder, weights, index) for index, shape in enumerate(survey.candidates)]
    model = _whole(survey, graph, backend, folder, weights)
    stored(survey.feed, folder / "inputs.npz")
    facts = {
        "schema": "lrcompile.kit/1",
        "made_by": __version__,
        "threads": threads,
        "inputs": {name: list(array.shape) for name, array in survey.feed.items()},
        "weights": weights.files,
        "shapes": shapes,
        "model": model,
    }
    (folder / "kit.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Path(shutil.copyfile(script.__file__, folder / SCRIPT))


def _whole(survey: Survey, graph: OnnxGraph, backend: Backend, folder: Path, weights: Weights) -> dict[str, Any]:
    """The model itself, and one with something cheaper at every site; the graph is left as it was."""
    _save(_bare(_built(backend, graph), weights), folder / "dense.onnx")
    model = {"file": "dense.onnx", "inputs": "inputs.npz", "anchor": None}
    chosen = survey.anchor()
    if not chosen:
        return model
    mark, operators = graph.journal.mark(), {id(each): each.build() for each in chosen.values()}
    sites = {site.name: site for site in graph.linear_sites()}
    try:
        for name, each in chosen.items():
            graph.replace(sites[name], copied(operators[id(each)]))
        _save(_bare(_built(backend, graph), weights), folder / "anchor.onnx")
    finally:
        graph.rollback(mark)
    return model | {"anchor": {"file": "anchor.onnx", "sites": anchored(survey)}}


def _built(backend: Backend, graph: OnnxGraph) -> ir.Model:
    return backend.build(graph).model  # type: ignore[attr-defined]


# -- models --------------------------------------------------------------------------------------


def _shape(
    survey: Survey, backend: Backend, shape: Shape, folder: Path, weights: Weights, index: int
) -> dict[str, Any]:
    if shape.dtype == "bfloat16":
        raise UnsupportedError(
            "ONNX Runtime has no bfloat16 kernels on CPUs, so no latency can be measured",
            hint="convert the model to float32 or float16",
        )
    count, opset = copies(survey, shape), survey.graph.opset or 20
    _save(product(backend, shape, None, opset, weights, count), folder / f"{index}.onnx")
    forms: dict[str, list[dict[str, Any]]] = {}
    for number, each in enumerate(survey.candidates[shape]):
        name = f"{index}-{number}.onnx"
        _save(product(backend, shape, each.build(), opset, weights, count), folder / name)
        forms.setdefault(each.form, []).append({"macs": each.macs, "rank": each.rank, "file": name})
    return {
        **described(shape),
        "sites": survey.counts[shape],
        "input": list(image(shape)),
        "file": f"{index}.onnx",
        "copies": count,
        "forms": [{"form": form, "points": points} for form, points in forms.items()],
    }


def product(
    backend: Backend, shape: Shape, operator: LinearOperator | None, opset: int, weights: Weights, count: int
) -> ir.Model:
    """``count`` products of one input with weights of their own, each an output."""
    dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "float64": "DOUBLE"}[shape.dtype]]
    given = image(shape)
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(given))
    held, attributes = (shape.into, shape.out), []
    if shape.window:
        window = Window(*shape.window)
        held = (shape.out, given[1], *window.kernel)
        named = {"strides": window.strides, "pads": window.pads, "dilations": window.dilations}
        attributes = [ir.AttrInt64s(name, list(sizes)) for name, sizes in named.items()]
    w = ir.Value(name="w", const_value=ir.tensor(np.zeros(held, dtype.numpy()), name="w"))
    node = ir.Node("", "Conv" if shape.window else "MatMul", [x, w], attributes, name="product")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    whole = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": opset}, name="product")
    graph = OnnxGraph(ir.Model(whole, ir_version=10))
    if operator is not None:
        graph.replace(graph.linear_sites()[0], operator)
    return _repeated(_built(backend, graph), weights, count)


def _repeated(model: ir.Model, weights: Weights, count: int) -> ir.Model:
    """The graph ``count`` times on the same input; copies have large tensors of their own and share small ones."""
    graph = model.graph
    nodes, outputs, given = list(graph), list(graph.outputs), dict(graph.initializers)
    for number in range(1, count):
        known: dict[ir.Value, ir.Value] = {}
        for name, value in given.items():
            placed = None if value.const_value is None else weights.place(value.const_value)
            if placed is not None:
                known[value] = ir.Value(name=f"{name}.{number}", const_value=placed)
                known[value].type, known[value].shape = value.type, value.shape
                graph.register_initializer(known[value])
        for node in nodes:
            graph.append(_copy(node, known, number))
        graph.outputs.extend(known[value] for value in outputs)
    return _bare(model, weights)


def _copy(node: ir.Node, known: dict[ir.Value, ir.Value], number: int) -> ir.Node:
    inputs = [None if value is None else known.get(value, value) for value in node.inputs]
    new = ir.Node(
        node.domain, node.op_type, inputs, list(node.attributes.values()),
        num_outputs=len(node.outputs), name=f"{node.name}.{number}",
    )  # fmt: skip
    for before, after in zip(node.outputs, new.outputs, strict=True):
        after.name, after.type, after.shape = f"{before.name}.{number}", before.type, before.shape
        known[before] = after
    return new


def _bare(model: ir.Model, weights: Weights) -> ir.Model:
    """The model with its large tensors pointing into the files of made-up numbers. It must not be shared."""
    for value in model.graph.initializers.values():
        placed = None if value.const_value is None else weights.place(value.const_value)
        if placed is not None:
            value.const_value = placed
    return model


def _save(model: ir.Model, path: Path) -> None:
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
