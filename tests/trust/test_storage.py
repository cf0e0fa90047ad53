"""Tensors that lie about their size or whose data lies where it must not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx import load
from lrcompile.graphs.onnx.load import Limits, read
from lrcompile.graphs.onnx.tensors import to_torch
from tests.trust.models import WEIGHT, Y, external, model, refused, weight, write


def test_external_data_is_lazy_and_bare_names_mean_the_same(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = write(tmp_path, external("w.bin"))
    monkeypatch.chdir(tmp_path)
    bare, full = read("model.onnx"), read(path)
    monkeypatch.chdir("/")
    for found in (bare, full):
        tensor = weight(found)
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.raw is None
        assert np.array_equal(to_torch(tensor).numpy(), WEIGHT)


@pytest.mark.parametrize("location", ["../w.bin", "sub/../../w.bin", "..\\w.bin", "", "C:\\w.bin", "a\0b"])
def test_external_path_leaves_the_folder(tmp_path, monkeypatch, location):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    path = write(folder, external(location))
    refused(path, "unsafe external data path")
    monkeypatch.chdir(folder)
    refused(Path("model.onnx"), "unsafe external data path")


def test_external_path_absolute(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    refused(write(tmp_path, external(str(tmp_path / "w.bin"))), "unsafe external data path")


def test_external_path_in_memory_marker(tmp_path):
    (tmp_path / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (tmp_path / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(64))
    refused(write(tmp_path, external("*/_ORT_MEM_ADDR_/*")), "unsafe external data path")


@pytest.mark.parametrize("through", ["file", "folder"])
def test_external_symlink(tmp_path, through):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    folder.mkdir()
    (outside / "w.bin").write_bytes(bytes(64))
    (folder / "link").symlink_to(outside / "w.bin" if through == "file" else outside)
    refused(write(folder, external("link" if through == "file" else "link/w.bin")), "leads out of the folder")


def test_external_symlink_that_stays_inside_is_read(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "link").symlink_to("w.bin")
    tensor = weight(read(write(tmp_path, external("link"))))
    assert np.array_equal(to_torch(tensor).numpy(), WEIGHT)


def test_external_hard_link(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    os.link(tmp_path / "secret", tmp_path / "w.bin")
    refused(write(tmp_path, external("w.bin")), "hard links")


def test_external_missing(tmp_path):
    refused(write(tmp_path, external("w.bin")), "w: external data 'w.bin' cannot be read")
    (tmp_path / "w.bin").mkdir()
    refused(write(tmp_path, external("w.bin")), "is not a file")


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [
        (1, 64, "ends at byte 65"),
        (64, None, "ends at byte 128"),
        (2**63 - 1, 64, "ends at byte"),
        (2**63, 64, "64-bit"),
        (2**64 - 32, 64, "64-bit"),
        (-1, 64, "64-bit"),
        (0, -64, "64-bit"),
        (0, 60, "60 bytes, the shape needs 64"),
        (0, 2**63 - 1, "the shape needs 64"),
        ("9" * 5000, 64, "64-bit"),
        ("0x10", 64, "64-bit"),
    ],
)
def test_external_offsets(tmp_path, offset, length, words):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    refused(write(tmp_path, external("w.bin", offset=offset, length=length)), words)


def test_external_data_in_attributes_subgraphs_and_functions_is_checked_and_bound(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())

    def constant(location: str) -> onnx.NodeProto:
        tensor = external(location).graph.initializer[0]
        return helper.make_node("Constant", [], ["w"], value=tensor)

    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])

    def packed(kind: str, location: str) -> onnx.ModelProto:
        if kind == "attribute":
            return model([constant(location), matmul], [])
        if kind == "function":
            function = helper.make_function(
                "f", "F", ["x"], ["y"], [constant(location), matmul], [helper.make_opsetid("", 20)]
            )
            return model([helper.make_node("F", ["x"], ["y"], domain="f")], [], functions=[function])
        branch = helper.make_graph([matmul], "b", [], [Y], list(external(location).graph.initializer))
        branch.output[0].name = matmul.output[0]
        nodes = [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)]
        condition = numpy_helper.from_array(np.array(True), "c")
        return model(nodes, [condition], outputs=[helper.make_tensor_value_info("z", 1, None)])

    for kind in ("attribute", "function", "subgraph"):
        refused(write(tmp_path, packed(kind, "../w.bin")), "unsafe external data path")
        found = [t for _, t in load.tensors(read(write(tmp_path, packed(kind, "w.bin")))) if t.name == "w"]
        assert found, kind
        assert all(np.array_equal(to_torch(tensor).numpy(), WEIGHT) for tensor in found)


@pytest.mark.parametrize("place", ["input", "initializer", "value_info", "attribute", "function"])
@pytest.mark.parametrize(
    ("dims", "error"),
    [([2**40], UnsupportedError), ([2**20, 2**20], UnsupportedError), ([-1, 4], InvalidInputError)],
)
def test_dimensions(tmp_path, place, dims, error):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"")
    info = helper.make_tensor_value_info("x" if place == "input" else "v", TensorProto.FLOAT, dims)
    if place == "input":
        proto = model(inputs=[info])
    elif place == "initializer":
        proto = model(initializers=[tensor])
    elif place == "attribute":
        proto = model([helper.make_node("Constant", [], ["y"], value=tensor)], [])
    elif place == "function":
        node = helper.make_node("Relu", ["x"], ["y"])
        function = helper.make_function(
            "f", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 20)], value_info=[info]
        )
        proto = model(functions=[function])
    else:
        proto = model()
        proto.graph.value_info.append(info)
    refused(write(tmp_path, proto), "dimension|elements", error)


@pytest.mark.parametrize("size", [0, 60, 68])
def test_data_that_disagrees_with_the_shape(tmp_path, size):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], raw_data=bytes(size))
    refused(write(tmp_path, model(initializers=[tensor])), f"w: {size} bytes of data")
    typed = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], float_data=[0.0] * (size // 4))
    refused(write(tmp_path, model(initializers=[typed])), "w: .* values of data")


def test_unknown_types_and_total_bytes(tmp_path):
    tensor = TensorProto(name="w", data_type=99, dims=[4, 4], raw_data=bytes(64))
    refused(write(tmp_path, model(initializers=[tensor])), "unknown data type 99")
    with pytest.raises(UnsupportedError, match="more than 63 bytes"):
        read(write(tmp_path, model()), limits=Limits(bytes=63))
    assert read(write(tmp_path, model()), limits=Limits(bytes=64))


def test_typed_fields_of_every_width_are_accepted(tmp_path):
    tensors = [
        helper.make_tensor(f"t{kind}", kind, [3], [1, 0, 1])
        for kind in range(1, 24)
        if kind not in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128)
    ]
    tensors.append(TensorProto(name="s", data_type=TensorProto.STRING, dims=[2], string_data=[b"a", b"b"]))
    tensors.append(TensorProto(name="c", data_type=TensorProto.COMPLEX64, dims=[2], float_data=[0, 1, 2, 0]))
    found = read(write(tmp_path, model(initializers=[numpy_helper.from_array(WEIGHT, "w"), *tensors])))
    assert len(found.graph.initializers) == len(tensors) + 1
