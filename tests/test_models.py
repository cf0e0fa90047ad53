"""The builders of :mod:`tests.models` tell the truth about the files that they write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from tests.models import Built, DType, Linear, disguises, stored, two_layer_mlp, weight

BUILDERS = [two_layer_mlp, disguises]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}


def outputs(built: Built, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All graph outputs in float64: ONNX Runtime where it has kernels, else the reference evaluator."""
    names = [output.name for output in onnx.load(built.path, load_external_data=False).graph.output]
    if built.dtype in ("float32", "float16"):
        session = onnxruntime.InferenceSession(str(built.path), providers=["CPUExecutionProvider"])
        values = session.run(names, inputs)
    else:
        values = ReferenceEvaluator(str(built.path)).run(names, inputs)
    return {name: np.asarray(value).astype(np.float64) for name, value in zip(names, values, strict=True)}


def applied(linear: Linear, x: np.ndarray) -> np.ndarray:
    """The fact in float64, on the last axis."""
    return x @ linear.weight.T + (0.0 if linear.bias is None else linear.bias)


def expected(built: Built, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = {name: value.astype(np.float64) for name, value in inputs.items()}
    facts = built.linears
    if "up" in facts:
        return {"y": applied(facts["down"], np.maximum(applied(facts["up"], x["x"]), 0))}
    sources = dict.fromkeys(facts, x["x"]) | dict.fromkeys(("matmul", "matmul_transpose"), x["tokens"])
    sources["conv1x1"] = np.moveaxis(x["image"], 1, -1)
    sources["shared"] = np.maximum(applied(facts["shared_first"], x["x"]), 0)
    result = {name: applied(fact, sources[name]) for name, fact in facts.items()}
    return result | {"conv1x1": np.moveaxis(result["conv1x1"], -1, 1)}


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_facts_equal_what_the_file_computes(build, dtype: DType, external: bool, tmp_path: Path):
    built = build(tmp_path / "m.onnx", dtype=dtype, external=external)
    assert (tmp_path / "m.onnx.data").is_file() == external
    for batch in (1, 5):
        inputs = built.example(batch)
        found, truth = outputs(built, inputs), expected(built, inputs)
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert np.linalg.norm(found[name] - value) <= TOLERANCE[dtype] * np.linalg.norm(value), name


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_the_same_seed_writes_the_same_bytes(build, tmp_path: Path):
    content = build(tmp_path / "m.onnx").path.read_bytes()
    assert build(tmp_path / "m.onnx").path.read_bytes() == content
    assert build(tmp_path / "m.onnx", seed=9).path.read_bytes() != content


def test_external_files_do_not_grow_when_written_again(tmp_path: Path):
    sizes = set()
    for _ in range(2):
        two_layer_mlp(tmp_path / "m.onnx", external=True)
        sizes.add((tmp_path / "m.onnx.data").stat().st_size)
    assert len(sizes) == 1


def test_uses_and_twins_are_as_told(tmp_path: Path):
    built = disguises(tmp_path / "m.onnx")
    nodes = onnx.load(built.path).graph.node
    for linear in built.linears.values():
        assert sum(linear.initializer in node.input for node in nodes) == linear.uses
    assert np.array_equal(stored(built.path, "twin_matmul.weight"), stored(built.path, "twin_gemm.weight").T)


def test_weights_have_the_spectrum_that_was_asked_for():
    values = np.linalg.svd(weight(40, 24, 3, decay=0.8, rank=10), compute_uv=False)
    np.testing.assert_allclose(values[:10] / values[0], np.arange(1, 11) ** -0.8, rtol=1e-10)
    assert values[10] < 1e-12 * values[0]
    np.testing.assert_allclose((weight(40, 24, 3) ** 2).sum(), 40)
