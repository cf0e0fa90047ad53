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
    arguments: tuple[Any, ...] | None = None,
) -> None:
    """Write ``module`` as one ONNX file with the weights inside.

    Args:
        module: in eval mode.
        example: an input batch by argument name; these become the names of the graph inputs.
        path: the file, replaced at once when it is complete.
        outputs: names of the graph outputs.
        axes: per input, the dynamic axes and their names. Use sizes of at least 2 in the example. A name may be a
            sum of others, such as ``past + sequence``: sums need ``arguments``.
        arguments: the example's tensors in the order and the lists in which forward() takes them by position; by
            default each is passed by its name.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            args=arguments or (),
            kwargs=None if arguments else dict(example),
            input_names=list(example),
            output_names=[_MARK + name for name in outputs],
            dynamic_shapes=_by_position(arguments, example, axes) if arguments else _by_name(axes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = _named(program.model_proto)
    write_atomic(_anonymous(_sized(model, axes) if arguments else model), path)


def _by_name(axes: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    from torch.export import Dim

    dims = {name: Dim(name) for sizes in axes.values() for name in sizes.values()}
    return {key: {axis: dims[name] for axis, name in sizes.items()} for key, sizes in axes.items()}


def _by_position(arguments: tuple[Any, ...], example: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]):
    """The arguments with each tensor's free axes in its place; torch finds how the sizes depend on each other."""
    from torch.export import Dim
    from torch.utils._pytree import tree_map

    free = {id(tensor): {axis: Dim.AUTO for axis in axes.get(name, {})} for name, tensor in example.items()}
    return tree_map(lambda tensor: free[id(tensor)], arguments)


def _sized(model: onnx.ModelProto, axes: Mapping[str, Mapping[int, str]]) -> onnx.ModelProto:
    """Gives the sizes that torch named their own names, wherever they stand.

    Raises:
        RuntimeError: a size that was to be free is fixed in the graph.
    """
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in axes.get(value.name, {}).items():
            size = value.type.tensor_type.shape.dim[axis]
            if not size.dim_param:
                raise RuntimeError(f"{value.name}: the export fixed axis {axis} at {size.dim_value}")
            names.setdefault(size.dim_param, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = " + ".join(names.get(part, part) for part in size.dim_param.split(" + "))
    return model


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
