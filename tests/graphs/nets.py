"""Short ways to write an ONNX model, and to run one without the code under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lrcompile.backends.onnxruntime import lower
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.sites import LinearSite

Shape = Sequence[int | str | None]


def node(op: str, inputs: str, outputs: str, name: str = "", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """``node("MatMul", "x w", "y")``."""
    name = name or f"{outputs.split()[0]}_node"
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, domain=domain, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    weights: Mapping[str, np.ndarray],
    *,
    opset: int = 20,
    ir_version: int = 10,
    dtype: Any = np.float32,
    check: bool = True,
    **more: Any,
) -> onnx.ModelProto:
    """A checked model whose inputs and outputs have one type."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(name, element, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, element, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, **more)
    if check:
        onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model in plain ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(None, dict(feeds)), strict=True)}


def built(graph: OnnxGraph) -> onnx.ModelProto:
    """The lowered model as a message, checked by onnx."""
    import onnx_ir as ir

    proto = ir.to_proto(lower(graph))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def sites(graph: OnnxGraph) -> dict[str, LinearSite]:
    """All sites by name."""
    return {site.name: site for site in graph.linear_sites()}


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


FLOAT = TensorProto.FLOAT
