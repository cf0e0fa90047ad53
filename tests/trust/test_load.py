"""Files that are no model, and models whose structure is unsound or a trap."""

from __future__ import annotations

import os
import time
import zipfile

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx import load
from lrcompile.graphs.onnx.load import Limits, read
from tests.trust.models import WEIGHT, X, Y, chain, model, refused, weight, write


def test_reads_a_good_model(tmp_path):
    found = read(write(tmp_path, model()))
    assert [node.op_type for node in found.graph] == ["MatMul"]
    assert np.array_equal(weight(found).numpy(), WEIGHT)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.995])
def test_truncated(tmp_path, keep):
    path = write(tmp_path, model())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "truncated|no graph|no operator set")


@pytest.mark.parametrize("pieces", [False, True])
def test_every_prefix_of_a_model_is_refused(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(load, "LARGE", 0 if pieces else 2**30)
    path = write(tmp_path, model())
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InvalidInputError):
            read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "safetensors"),
        (b'{"irVersion": 8}', "text"),
        (b"\x80\x04K\x01.", "pickle"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(30), "TensorFlow Lite"),
        (bytes(range(256)), "truncated"),
    ],
)
def test_foreign(tmp_path, content, words):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, words)


@pytest.mark.parametrize(
    ("member", "words"),
    [("m/data.pkl", "checkpoint"), ("m/archive_format", "pt2"), ("x.npy", "npz"), ("a.txt", "zip archive")],
)
def test_foreign_archives(tmp_path, member, words):
    path = tmp_path / "model.onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"")
    refused(path, words)


def test_missing_folder_and_special_files(tmp_path):
    write(tmp_path, model())
    refused(tmp_path / "modle.onnx", "no such file.*did you mean 'model.onnx'")
    refused(tmp_path, "folder")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")


def test_parsing_in_pieces_gives_the_same_model(tmp_path, monkeypatch):
    weights = [numpy_helper.from_array(np.full((8,), i, np.float32), f"w{i}") for i in range(9)]
    path = write(tmp_path, model(initializers=[numpy_helper.from_array(WEIGHT, "w"), *weights]))
    whole = ir.to_proto(read(path)).SerializeToString(deterministic=True)
    monkeypatch.setattr(load, "LARGE", 0)
    monkeypatch.setattr(load, "PIECE", 50)
    assert ir.to_proto(read(path)).SerializeToString(deterministic=True) == whole


def test_cycles(tmp_path):
    refused(write(tmp_path, model(chain(("b", "a"), ("a", "b"), ("a", "y")))), "cycle: .*make_a.*make_b")
    refused(write(tmp_path, model(chain(("a", "a"), ("a", "y")))), "cycle")


def test_a_cycle_through_a_subgraph(tmp_path):
    inner = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    branch = helper.make_graph(chain(("y", "t")), "b", [], [inner])
    nodes = [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch), *chain(("z", "y"))]
    refused(write(tmp_path, model(nodes, [numpy_helper.from_array(np.array(True), "c")])), "cycle")


def test_unsorted_nodes_are_sorted(tmp_path):
    found = read(write(tmp_path, model(chain(("b", "y"), ("a", "b"), ("x", "a")))))
    assert [node.outputs[0].name for node in found.graph] == ["a", "b", "y"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (chain(("x", "y"), ("x", "y")), "'y' is defined twice"),
        (chain(("x", "x"), ("x", "y")), "'x' is defined twice"),
        (chain(("x", "w"), ("w", "y")), "'w' is defined twice"),
        (chain(("nowhere", "y")), "make_y: input 'nowhere' is defined nowhere"),
        (chain(("x", "z")), "y: graph output is computed by no node"),
    ],
)
def test_names(tmp_path, nodes, words):
    refused(write(tmp_path, model(nodes)), words)


def test_repeated_inputs_outputs_and_initializers(tmp_path):
    weight = numpy_helper.from_array(WEIGHT, "w")
    refused(write(tmp_path, model(inputs=[X, X])), "x: input name occurs 2 times")
    refused(write(tmp_path, model(outputs=[Y, Y])), "y: output name occurs 2 times")
    refused(write(tmp_path, model(initializers=[weight, weight])), "w: initializer name occurs 2 times")


def doubling(levels: int) -> list[onnx.FunctionProto]:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]

    def body(level: int) -> list[onnx.NodeProto]:
        callee, domain = (f"F{level - 1}", "f") if level else ("Relu", "")
        return [
            helper.make_node(callee, ["x"], ["m"], domain=domain),
            helper.make_node(callee, ["m"], ["y"], domain=domain),
        ]

    return [helper.make_function("f", f"F{level}", ["x"], ["y"], body(level), opsets) for level in range(levels)]


def test_doubling_functions(tmp_path):
    call = helper.make_node("F39", ["x"], ["y"], domain="f")
    path = write(tmp_path, model([call], [], functions=doubling(40)))
    assert path.stat().st_size < 10_000
    start = time.perf_counter()
    refused(path, "nodes once functions are expanded", UnsupportedError)
    assert time.perf_counter() - start < 2
    few = model([helper.make_node("F3", ["x"], ["y"], domain="f")], [], functions=doubling(4))
    assert len(read(write(tmp_path, few)).functions) == 4


def test_the_expansion_is_counted_exactly(tmp_path):
    proto = model([helper.make_node("F1", ["x"], ["y"], domain="f")], [], functions=doubling(2))
    path = write(tmp_path, proto)  # F0: 2, F1: 2 + 2 * 2, main: 1 + 6
    assert read(path, limits=Limits(nodes=7))
    with pytest.raises(UnsupportedError):
        read(path, limits=Limits(nodes=6))


def test_functions_that_call_themselves(tmp_path):
    functions = doubling(2)
    functions[0].node[0].op_type, functions[0].node[0].domain = "F1", "f"
    call = helper.make_node("F1", ["x"], ["y"], domain="f")
    refused(write(tmp_path, model([call], [], functions=functions)), "calls itself")
    refused(write(tmp_path, model([call], [], functions=[*doubling(2), doubling(2)[1]])), "defined twice")


def test_deep_subgraphs(tmp_path):
    def nest(depth: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"o{depth}", TensorProto.FLOAT, None)
        if not depth:
            return helper.make_graph(chain(("x", "o0")), "leaf", [], [out])
        inner = nest(depth - 1)
        node = helper.make_node("If", ["c"], [f"o{depth}"], then_branch=inner, else_branch=inner)
        return helper.make_graph([node], f"g{depth}", [], [out])

    def packed(depth: int) -> onnx.ModelProto:
        graph = nest(depth)
        return model(list(graph.node), [numpy_helper.from_array(np.array(True), "c")], outputs=list(graph.output))

    assert read(write(tmp_path, packed(3)), limits=Limits(depth=3))
    with pytest.raises(UnsupportedError, match="nested more than 2"):
        read(write(tmp_path, packed(3)), limits=Limits(depth=2))


def test_sparse_initializers_maps_and_later_versions(tmp_path):
    proto = model()
    values, indices = helper.make_tensor("s", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    refused(write(tmp_path, proto), "sparse", UnsupportedError)
    mapping = onnx.ValueInfoProto(name="y")
    mapping.type.map_type.key_type = TensorProto.INT64
    mapping.type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    refused(write(tmp_path, model(outputs=[mapping])), r"[Mm]ap", UnsupportedError)
    refused(write(tmp_path, model(ir_version=999)), "IR version 999", UnsupportedError)
    refused(write(tmp_path, model(opset_imports=[helper.make_opsetid("", 999)])), "opset 999", UnsupportedError)
