"""What a rewritten file keeps of the one that came in, in every precision and with data beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from lrcompile.backends.onnxruntime import OnnxModel, OnnxRuntime
from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify, low_rank
from tests import models
from tests.graphs.nets import model, node, normal

DTYPES: list[models.DType] = ["float32", "float64", "float16", "bfloat16"]
TORCH = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-2, "bfloat16": 5e-2}


def publish(graph: OnnxGraph, target: Path) -> OnnxModel:
    with AtomicSet(target) as files:
        return OnnxRuntime().build(graph, out=files)


def halve(graph: OnnxGraph, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Replaces every site by factors of rank 4; returns their matrices in float64."""
    matrices = {}
    for seed, site in enumerate(graph.linear_sites()):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(*shape, generator=generator) for shape in ((site.shape[0], 4), (4, site.shape[1])))
        op = low_rank((left / 2).to(TORCH[dtype]), (right / site.shape[1] ** 0.5).to(TORCH[dtype]))
        graph.replace(site, op)
        matrices[site.name] = op.left.weight.double().numpy() @ op.right.weight.double().numpy()  # type: ignore[attr-defined]
    return matrices


def bias_of(linear: models.Linear) -> np.ndarray:
    assert linear.bias is not None
    return linear.bias


def close(found: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    scale = max(np.abs(wanted).max(), 1)
    np.testing.assert_allclose(found.astype(np.float64) / scale, wanted / scale, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("external", [False, True], ids=["one file", "data beside"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(tmp_path: Path, dtype: models.DType, external: bool) -> None:
    built = models.two_layer_mlp(tmp_path / "in.onnx", dtype=dtype, external=external)
    graph = OnnxGraph.load(built.path)
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in graph._tensors()) == external
    matrices = halve(graph, dtype)
    (tmp_path / "out").mkdir()
    result = publish(graph, tmp_path / "out" / "model.onnx")
    files = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert len(files) == (2 if external else 1) and ".onnx" in files
    loaded = OnnxGraph.load(tmp_path / "out" / "model.onnx")
    assert loaded.nbytes == result.nbytes < graph.nbytes
    assert loaded.parameters == result.parameters
    assert {tensor.dtype for tensor in loaded._tensors()} == {ir.DataType.from_numpy(models.NUMPY[dtype])}
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    feeds = built.example()
    up, down = built.linears["up"], built.linears["down"]
    hidden = np.maximum(feeds["x"].astype(np.float64) @ matrices["up"].T + bias_of(up), 0)
    wanted = hidden @ matrices["down"].T + bias_of(down)
    for each in (OnnxModel(result.model, tmp_path / "out" / "model.onnx").run(feeds), loaded.run(feeds)):
        close(each["y"], wanted, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_disguises_in_one_file(tmp_path: Path, dtype: models.DType) -> None:
    built = models.disguises(tmp_path / "in.onnx", dtype=dtype, external=True)
    graph = OnnxGraph.load(built.path)
    names = {site.name: site for site in graph.linear_sites()}
    assert len(names) == 9  # ten forms, of which one weight is stored twice
    for name, linear in built.linears.items():
        site = names.get(linear.initializer.removesuffix(".weight"))
        if site is not None:
            np.testing.assert_array_equal(densify(site.operator).double().numpy(), linear.weight, err_msg=name)
    matrices = halve(graph, dtype)
    feeds = built.example()
    outputs = publish(graph, tmp_path / "out.onnx").run(feeds)
    x, tokens = feeds["x"].astype(np.float64), feeds["tokens"].astype(np.float64)
    close(outputs["constant"], x @ matrices["constant"].T, dtype)
    close(outputs["matmul"], tokens @ matrices["matmul"].T + bias_of(built.linears["matmul"]), dtype)
    close(outputs["gemm_scaled"], x @ matrices["gemm_scaled"].T + bias_of(built.linears["gemm_scaled"]), dtype)
    close(outputs["twin_gemm"], x @ matrices["twin_matmul"].T, dtype)
    shared = np.maximum(x @ matrices["shared"].T, 0) @ matrices["shared"].T
    close(outputs["shared"], shared, dtype)


def described() -> onnx.ModelProto:
    """A model that says much about itself."""
    nodes = [
        node("MatMul", "tokens fc", "hidden"),
        node("Relu", "hidden", "kept"),
        node("MatMul", "kept head", "logits"),
    ]
    nodes[2].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'head', 'linear']")
    nodes[1].doc_string = "a node"
    inputs, outputs = (
        {"tokens": ("batch", "length", 8)},
        {"logits": ("batch", "length", 6), "kept": (None, "length", 8)},
    )
    weights = {"fc": normal(8, 8), "head": normal(8, 6), "unused": normal(3)}
    proto = model(nodes, inputs, outputs, weights, opset=18, ir_version=9, doc_string="a model")
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "maker", "1.2", "org.x", 7
    proto.graph.doc_string = "a graph"
    proto.graph.input[0].doc_string = "an input"
    proto.graph.initializer[0].doc_string = "a weight"
    helper.set_model_props(proto, {"license": "free", "labels": "a,b"})
    proto.graph.metadata_props.add(key="graph", value="told")
    return proto


@pytest.mark.parametrize("replaced", [True, False])
def test_what_is_kept(tmp_path: Path, replaced: bool) -> None:
    proto = described()
    graph = OnnxGraph.from_proto(proto)
    if replaced:
        halve(graph)
    publish(graph, tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(found, full_check=True)
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(found, name) == getattr(proto, name), name
    assert {each.domain: each.version for each in found.opset_import} == {"": 18, "custom": 1}
    assert {each.key: each.value for each in found.metadata_props} == {"license": "free", "labels": "a,b"}
    assert list(found.graph.input) == list(proto.graph.input)
    assert list(found.graph.output) == list(proto.graph.output)
    assert (found.graph.name, found.graph.doc_string) == ("net", "a graph")
    assert [each.value for each in found.graph.metadata_props] == ["told"]
    assert next(each for each in found.graph.node if each.op_type == "Relu").doc_string == "a node"
    scopes = [each.value for last in found.graph.node if last.op_type == "MatMul" for each in last.metadata_props]
    assert scopes == ["['', 'head', 'linear']"] * (2 if replaced else 1)
    if not replaced:
        for old, new in zip(proto.graph.node, found.graph.node, strict=True):
            new.domain = old.domain
            assert old == new
        assert list(found.graph.initializer) == list(proto.graph.initializer)


def test_nothing_replaced_means_the_same(tmp_path: Path) -> None:
    built = models.disguises(tmp_path / "in.onnx")
    publish(OnnxGraph.load(built.path), tmp_path / "out.onnx")
    feeds = built.example()
    before, after = (onnxruntime.InferenceSession(tmp_path / name).run(None, feeds) for name in ("in.onnx", "out.onnx"))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    built = models.disguises(tmp_path / "in.onnx", external=True)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        graph = OnnxGraph.load(built.path)
        halve(graph)
        publish(graph, tmp_path / name / "model.onnx")
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 2


def test_weights_stay_on_disk_until_they_are_used(tmp_path: Path) -> None:
    built = models.two_layer_mlp(tmp_path / "in.onnx", external=True)
    graph = OnnxGraph.load(built.path)
    (up, _) = graph.linear_sites()
    data = (tmp_path / "in.onnx.data").read_bytes()
    weight = densify(up.operator)
    assert weight.untyped_storage().data_ptr() % 4096 in {start % 4096 for start in range(0, len(data), 4)}
    before = weight.clone()
    weight += 1  # a private mapping: the file stays as it is
    assert (tmp_path / "in.onnx.data").read_bytes() == data
    np.testing.assert_array_equal(before.numpy(), built.linears["up"].weight.astype(np.float32))


def test_external_constants_of_nodes_and_bodies_come_along(tmp_path: Path) -> None:
    """They have no place in the new data file, so they move into the message."""

    def outside(name: str, array: np.ndarray, start: int) -> onnx.TensorProto:
        tensor = numpy_helper.from_array(array, name)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "w.bin", "offset": str(start), "length": str(array.nbytes)}.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    arrays = [normal(8, 8, seed=seed) for seed in range(3)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    info: Any = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", "p inner", "t")], "then", [], [info("t", 1, None)], [outside("inner", arrays[1], 256)]
    )
    other = helper.make_graph([node("Identity", "p", "e")], "else", [], [info("e", 1, None)])
    choice = helper.make_node("If", ["which"], ["q"], then_branch=body, else_branch=other)
    extra = helper.make_node("Constant", [], ["c"], value=outside("c", arrays[2], 512))
    nodes = [node("MatMul", "x fc", "p"), choice, extra, node("Add", "q c", "y")]
    inputs = [info("x", 1, (8, 8)), info("which", 9, ())]
    graph = helper.make_graph(nodes, "net", inputs, [info("y", 1, (8, 8))], [outside("fc", arrays[0], 0)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "in" / "model.onnx").write_bytes(proto.SerializeToString())

    loaded = OnnxGraph.load(tmp_path / "in" / "model.onnx")
    halved = halve(loaded)
    (tmp_path / "out").mkdir()
    publish(loaded, tmp_path / "out" / "model.onnx")
    (tmp_path / "in" / "w.bin").unlink()
    x = normal(8, 8, seed=9)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for which in (True, False):
        found = np.asarray(session.run(None, {"x": x, "which": np.array(which)})[0])
        wanted = x @ halved["fc"].T @ (halved["inner"].T if which else np.eye(8)) + arrays[2]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# -- hygiene -----------------------------------------------------------------------------------


def cleaned(nodes: list[onnx.NodeProto], outputs: dict[str, Any], weights: dict[str, np.ndarray]) -> OnnxGraph:
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 8)}, outputs, weights))
    assert graph.clean()[0]
    graph.verify()
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
    return graph


def test_clean_removes_what_is_unused_or_repeated() -> None:
    twin = normal(8, 40)
    nodes = [node("Identity", "x", "i"), node("MatMul", "i a", "p"), node("MatMul", "x b", "q")]
    nodes += [node("Relu", "p", "r"), node("Relu", "q", "s"), node("Add", "r s", "t"), node("Identity", "t", "y")]
    nodes += [node("Sigmoid", "x", "nobody")]
    graph = cleaned(nodes, {"y": ("n", 40)}, {"a": twin, "b": twin.copy(), "unused": twin + 1})
    assert [each.op_type for each in graph.model.graph] == ["MatMul", "Relu", "Add"]
    assert list(graph.model.graph.initializers) == ["a"]
    x = normal(3, 8, seed=4)
    np.testing.assert_allclose(graph.run({"x": x})["y"], 2 * np.maximum(x @ twin, 0), atol=1e-5)


def test_clean_keeps_what_only_looks_repeated() -> None:
    nodes = [node("RandomNormalLike", "x", "p"), node("RandomNormalLike", "x", "q"), node("Sub", "p q", "d")]
    nodes += [node("Bernoulli", "d", "m"), node("Bernoulli", "d", "k"), node("Sub", "m k", "y")]
    nodes += [node("Relu", "x", "one"), node("Relu", "x", "two"), node("Identity", "y", "dead")]
    outputs = {"y": ("n", 8), "one": ("n", 8), "two": ("n", 8)}
    graph = cleaned(nodes, outputs, {})
    kinds = [each.op_type for each in graph.model.graph]
    assert kinds.count("RandomNormalLike") == kinds.count("Bernoulli") == kinds.count("Relu") == 2
    assert "Identity" not in kinds


def test_clean_leaves_the_results_of_bodies_inside_them() -> None:
    info: Any = helper.make_tensor_value_info
    bodies: dict[str, Any] = {
        "then_branch": helper.make_graph([node("Identity", "p", "t")], "then", [], [info("t", 1, None)]),
        "else_branch": helper.make_graph([node("Relu", "i", "e")], "else", [], [info("e", 1, None)]),
    }
    choice = helper.make_node("If", ["which"], ["y"], **bodies)
    nodes = [node("Relu", "x", "p"), node("Identity", "p", "i"), choice]
    inputs = [info("x", 1, ("n", 8)), info("which", 9, ())]
    body = helper.make_graph(nodes, "net", inputs, [info("y", 1, (None, None))])
    graph = OnnxGraph.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert graph.clean()[0]
    x = normal(3, 8)
    for which in (True, False):
        found = graph.run({"x": x, "which": np.array(which)})["y"]
        np.testing.assert_array_equal(found, np.maximum(x, 0))


def test_clean_can_be_taken_back_and_sites_follow() -> None:
    nodes = [node("Identity", "x", "i"), node("MatMul", "i a", "p"), node("Identity", "p", "y")]
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 8)}, {"y": ("n", 8)}, {"a": normal(8, 8)}))
    mark, before = graph.journal.mark(), graph.fingerprint()
    assert graph.linear_sites()[0].input == "i"
    assert graph.clean()[0] and graph.linear_sites()[0].input == "x"
    assert not graph.clean()[0]
    graph.rollback(mark)
    assert graph.fingerprint() == before and graph.linear_sites()[0].input == "i"
