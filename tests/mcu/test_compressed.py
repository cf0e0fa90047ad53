"""What compressed weights take in firmware: sparse entries with narrow indices, codes of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.cli.app import run
from lrcompile.dataflow import interpret
from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.formulas import build
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.load import from_proto
from lrcompile.linop import Dense, Product, Quantized, SemiSparse

FLOAT = onnx.TensorProto.FLOAT


def model(node: onnx.NodeProto, shape: list[int], out: list[int], **constants: np.ndarray) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, FLOAT, sizes) for name, sizes in (("x", shape), ("y", out))]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def scattered(rows: int, columns: int, most: int) -> np.ndarray:
    """At most so many entries in each column, in the second none."""
    random = np.random.default_rng(rows)
    matrix = np.zeros((rows, columns), np.float32)
    for column in range(columns):
        if column != 1:
            chosen = random.choice(rows, random.integers(1, most + 1), replace=False)
            matrix[chosen, column] = random.standard_normal(len(chosen))
    return matrix


@pytest.mark.parametrize(("rows", "index"), [(12, "uint8"), (256, "uint8"), (257, "uint16")])
def test_products_are_what_dense_ones_are(rows: int, index: str):
    matrix, bias = scattered(rows, 9, 3), np.arange(9, dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((2, 5, rows)).astype(np.float32)
    made = build(from_proto(model(helper.make_node("MatMul", ["x", "w"], ["y"]), [2, 5, rows], [2, 5, 9], w=matrix)))
    assert {array.dtype.name for array in made.constants.values()} == {index, "float32"}
    assert max(array.size for array in made.constants.values()) <= 9 * 3
    np.testing.assert_allclose(interpret.run(made, {"x": x})["y"], x @ matrix, rtol=1e-5, atol=1e-6)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=0.5, beta=2.0)
    made = build(from_proto(model(node, [5, rows], [5, 9], w=matrix.T.copy(), b=bias)))
    assert index in {array.dtype.name for array in made.constants.values()}
    np.testing.assert_allclose(
        interpret.run(made, {"x": x[0]})["y"], 0.5 * x[0] @ matrix + 2 * bias, rtol=1e-5, atol=1e-6
    )


def test_what_is_not_sparse_enough_or_stands_the_other_way_stays_dense():
    half = scattered(12, 9, 3)
    half[:6, 4] = 1.0
    made = build(from_proto(model(helper.make_node("MatMul", ["x", "w"], ["y"]), [5, 12], [5, 9], w=half)))
    assert [array.shape for array in made.constants.values()] == [(12, 9)]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    made = build(from_proto(model(node, [12, 5], [5, 9], w=scattered(12, 9, 3))))
    x = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)
    np.testing.assert_allclose(interpret.run(made, {"x": x})["y"], x.T @ scattered(12, 9, 3), rtol=1e-5, atol=1e-6)


def test_a_dictionary_with_sparse_codes_takes_its_own_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generator = torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 128)).astype(np.float32)
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    onnx.save(model(helper.make_node("MatMul", ["x", "w"], ["y"]), [4, 64], [4, 128], w=weight), dense)
    graph = OnnxGraph.load(dense)
    codes = torch.randint(0, 32, (128, 8), generator=generator, dtype=torch.uint8)
    left = SemiSparse(torch.randn(128, 8, generator=generator), codes, 32)
    graph.replace(graph.linear_sites()[0], Product(left, Dense(torch.randn(32, 64, generator=generator))))
    with AtomicSet(small) as files:
        OnnxRuntime().build(graph, out=files)
    np.savez(tmp_path / "x.npz", x=random.standard_normal((4, 64)).astype(np.float32))
    found = {}
    for file in (dense, small):
        capsys.readouterr()
        words = ["deploy", file, "--to", "c", "-o", tmp_path / file.stem, "--run", tmp_path / "x.npz", "--json"]
        assert run([*map(str, words)]) == 0
        found[file.stem] = json.loads(capsys.readouterr().out)
    most = max(len(set(row)) for row in codes.tolist())  # repeated columns add up
    assert found["small"]["flash"]["weights"] == 4 * 32 * 64 + (4 + 1) * 128 * most
    assert found["small"]["instructions"] < 0.8 * found["dense"]["instructions"]
    assert found["small"]["relative_l2"] < 1e-6


def test_codes_of_weights_stay_bytes_where_activations_are_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    random = np.random.default_rng(0)
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    weight = random.standard_normal((64, 128)).astype(np.float32)
    onnx.save(model(helper.make_node("MatMul", ["x", "w"], ["y"]), [4, 64], [4, 128], w=weight), dense)
    graph = OnnxGraph.load(dense)
    scale = torch.rand(128, 1, generator=torch.Generator().manual_seed(0)) / 100
    codes = torch.from_numpy(random.integers(-127, 128, (128, 64))).to(torch.int8)
    graph.replace(graph.linear_sites()[0], Quantized(codes, scale, None, group=64))
    with AtomicSet(small) as files:
        OnnxRuntime().build(graph, out=files)
    np.savez(tmp_path / "x.npz", x=random.standard_normal((4, 64)).astype(np.float32))
    words = ["deploy", small, "--to", "c", "-o", tmp_path / "out", "--run", tmp_path / "x.npz", "--json"]
    assert run([*map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flash"]["weights"] == 128 * 64 + 4 * 128
    assert found["relative_l2"] < 1e-6
