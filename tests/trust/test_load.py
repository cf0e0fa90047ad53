"""Every kind of file that must not be read, and that a good one is read lazily and exactly."""

from __future__ import annotations

import os
import time
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx import load
from lrcompile.graphs.onnx.load import Limits, check_finite, read
from lrcompile.graphs.onnx.tensors import from_torch, to_torch

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


# -- files ---------------------------------------------------------------------------------


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


# -- external data -------------------------------------------------------------------------


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


# -- shapes and data -----------------------------------------------------------------------


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


# -- structure -----------------------------------------------------------------------------


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


# -- NaN and infinity ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outside", [False, True])
def test_weights_that_are_not_finite(tmp_path, dtype, bad, outside):
    values = (WEIGHT + 1).astype(dtype)
    good = write(tmp_path, model(initializers=[ir.to_proto(ir.tensor(values, name="w"))]))
    check_finite(read(good), chunk=3)
    values[2, 3] = bad
    tensor = ir.to_proto(ir.tensor(values, name="w"))
    if outside:
        (tmp_path / "w.bin").write_bytes(values.tobytes())
        tensor = TensorProto(name="w", data_type=tensor.data_type, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
    found = read(write(tmp_path, model(initializers=[tensor])))
    with pytest.raises(InvalidInputError, match=r"w: contains (NaN|infinite)"):
        check_finite(found, chunk=3)


def test_not_finite_in_a_constant_node(tmp_path):
    bad = numpy_helper.from_array(np.array([1, np.nan], np.float32), "c")
    found = read(write(tmp_path, model([helper.make_node("Constant", [], ["y"], value=bad)], [])))
    with pytest.raises(InvalidInputError, match="c: contains NaN"):
        check_finite(found)


def test_masks_and_bounds_may_be_infinite(tmp_path):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    bound = numpy_helper.from_array(np.array(np.inf, np.float32), "bound")
    found = read(write(tmp_path, model(initializers=[numpy_helper.from_array(mask, "w"), bound])))
    check_finite(found, chunk=3)


# -- torch ---------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)])
def test_torch_round_trip_without_copies(dtype, shape):
    source = torch.rand(shape).mul(3).to(dtype)
    tensor = from_torch(source, "w")
    back = to_torch(tensor)
    assert (tensor.name, back.dtype, back.shape) == ("w", source.dtype, source.shape)
    assert torch.equal(back.double(), source.double())
    assert source.numel() == 0 or back.data_ptr() == source.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 3, 4096])
def test_torch_from_files_is_exact_silent_and_safe_to_write(tmp_path, dtype, offset):
    source = torch.randn(4, 4).to(dtype)
    tensor = from_torch(source, "w")
    (tmp_path / "w.bin").write_bytes(bytes(offset) + tensor.tobytes())
    shape = ir.Shape([4, 4])
    outside = ir.ExternalTensor("w.bin", offset, tensor.nbytes, tensor.dtype, shape=shape, name="w", base_dir=tmp_path)
    embedded = ir.from_proto(ir.to_proto(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (outside, embedded):
            back = to_torch(each)
            assert torch.equal(back.view(torch.uint8), source.view(torch.uint8))
            back.zero_()
            assert torch.equal(to_torch(each).view(torch.uint8), source.view(torch.uint8))
    assert (tmp_path / "w.bin").read_bytes()[offset:] == tensor.tobytes()


def test_torch_from_other_layouts(tmp_path):
    source = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True).T
    assert torch.equal(to_torch(from_torch(source, "w")), source)
    four = ir.tensor(np.array([-8, 7, 1], ml_dtypes.int4), name="q")
    assert to_torch(four).tolist() == [-8, 7, 1]
    with pytest.raises(UnsupportedError):
        to_torch(ir.tensor(["a"], name="s"))
    gone = ir.ExternalTensor("w", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="w", base_dir=tmp_path)
    with pytest.raises(InvalidInputError):
        to_torch(gone)
