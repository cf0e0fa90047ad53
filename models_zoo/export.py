"""ONNX export that is the same file every time: dynamic axes, no traces of the machine that wrote it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

OPSET = 20  # 23 has fewer nodes, but ONNX Runtime runs some of its rotary and attention forms at batch 1 only
_MARK = "zoo_output_"
# The exporter folds transposed weights into nameless values; these two entries give their names back.
_KEPT = ("pkg.torch.onnx.fx_node", "pkg.torch.onnx.name_scopes")


def export_onnx(
    module: nn.Module,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Write ``module`` as one ONNX file with the weights inside.

    Args:
        module: in eval mode.
        example: an input batch by argument name; these become the names of the graph inputs.
        path: the file, replaced at once when it is complete.
        outputs: names of the graph outputs.
        axes: per input, the dynamic axes and their names. Use sizes of at least 2 in the example.
    """
    import torch

    dims = {name: torch.export.Dim(name) for sizes in axes.values() for name in sizes.values()}
    shapes: dict[str, Any] = {key: {axis: dims[name] for axis, name in sizes.items()} for key, sizes in axes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            args=(),
            kwargs=dict(example),
            input_names=list(example),
            output_names=[_MARK + name for name in outputs],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    write_atomic(_anonymous(_named(program.model_proto)), path)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the outputs their names; the exporter would not look whether an interior value has one of them."""
    outputs = {output.name: output.name.removeprefix(_MARK) for output in model.graph.output}
    renamed = {new: f"{new}_interior" for new in outputs.values()} | outputs
    for values in (model.graph.output, model.graph.value_info):
        for value in values:
            value.name = renamed.get(value.name, value.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    return model


def _anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop metadata that holds paths of this machine or bulk; keep what names the folded weights."""
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, model):
        kept = [(entry.key, entry.value) for entry in item.metadata_props if entry.key in _KEPT]
        del item.metadata_props[:]
        for key, value in kept:
            item.metadata_props.add(key=key, value=value)
    for node in graph.node:
        node.doc_string = ""
    return model


def write_atomic(model: onnx.ModelProto, path: Path) -> None:
    """Write a deterministic serialisation beside ``path`` and rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString(deterministic=True))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
