"""Small models, good and bad, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import InvalidInputError
from lrcompile.graphs.onnx.load import read

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def model(nodes=None, initializers=None, inputs=(X,), outputs=(Y,), functions=(), **options) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")] if nodes is None else nodes
    initializers = [numpy_helper.from_array(WEIGHT, "w")] if initializers is None else initializers
    graph = helper.make_graph(nodes, "g", list(inputs), list(outputs), initializers)
    domains = {"": 20} | {function.domain: 1 for function in functions}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    options = {"ir_version": 10, "opset_imports": opsets, "functions": list(functions)} | options
    return helper.make_model(graph, **options)


def write(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def external(location: str, *, offset: object = 0, length: object = 64) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return model(initializers=[tensor])


def chain(*pairs: tuple[str, str]) -> list[onnx.NodeProto]:
    return [helper.make_node("Relu", [source], [target], name=f"make_{target}") for source, target in pairs]


def weight(found: ir.Model) -> ir.TensorProtocol:
    tensor = found.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor


def refused(path: Path, words: str, error: type[Exception] = InvalidInputError) -> None:
    with pytest.raises(error, match=words):
        read(path)
