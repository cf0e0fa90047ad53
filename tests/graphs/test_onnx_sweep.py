"""Every operator of ONNX on its way through exact rewrites: nothing crashes, nothing computes something else."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import lrcompile
from lrcompile.errors import InvalidInputError

RANDOM = ("bernoulli", "dropout", "random", "multinomial")
LIGHT = Path(str(onnx.__file__)).parent / "backend" / "test" / "data" / "light"


@functools.cache
def cases() -> list[Any]:
    """The conformance cases of single operators that come with onnx."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they overflow on purpose
        return [case for case in collect_testcases(None) if case.model is not None]  # type: ignore[arg-type]


def session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def equal(a: Any, b: Any) -> bool:
    if a is None or isinstance(a, list | tuple | dict):
        same = type(a) is type(b) and (a is None or len(a) == len(b))
        return same and (a is None or all(equal(x, y) for x, y in zip(a, b, strict=True)))
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind in "OSU":
        return bool((a == b).all())
    return a.shape == b.shape and np.allclose(a.astype(complex), b.astype(complex), 1e-4, 1e-5, equal_nan=True)


def outputs(content: bytes, feeds: list[Any]) -> list[Any] | None:
    """What ONNX Runtime computes, or None where it has no kernel for that."""
    try:
        loaded = session(content)
        names = [value.name for value in loaded.get_inputs()]
        return list(loaded.run(None, dict(zip(names, feeds, strict=False))))
    except Exception:  # half a dozen unrelated types
        return None


def sweep(selected: list[Any], folder: Path) -> int:
    """Optimizes each case and compares; returns how many could be compared."""
    compared = 0
    path = folder / "model.onnx"
    for case in selected:
        content = case.model.SerializeToString()
        path.write_bytes(content)
        result = lrcompile.optimize(path)
        onnx.checker.check_model(ir.to_proto(result.model))
        feeds = case.data_sets[0][0]
        before = outputs(content, feeds)
        if before is None or any(word in case.name for word in RANDOM):
            continue
        after = outputs(ir.to_proto(result.model).SerializeToString(), feeds)
        assert after is not None and equal(before, after), case.name
        compared += 1
    return compared


def test_a_sample_of_all_operators(tmp_path: Path) -> None:
    windows = [case for case in cases() if "hammingwindow" in case.name]  # whose only input has no axis
    assert sweep([*cases()[5::20], *windows], tmp_path) > 50


@pytest.mark.parametrize("word", ["matmul", "gemm", "basic_conv", "if_", "loop", "scan", "sequence"])
def test_what_touches_weights_or_bodies(word: str, tmp_path: Path) -> None:
    chosen = [case for case in cases() if word in case.name][:8]
    assert sweep(chosen, tmp_path) > 0


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_whole_networks(name: str, tmp_path: Path) -> None:
    path = LIGHT / f"light_{name}.onnx"
    result = lrcompile.optimize(path)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    before, after = outputs(path.read_bytes(), [image]), outputs(ir.to_proto(result.model).SerializeToString(), [image])
    assert before is not None and equal(before, after)


def test_a_legal_nan_is_still_refused_by_name(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == "test_ai_onnx_ml_tree_ensemble_set_membership")
    (tmp_path / "model.onnx").write_bytes(case.model.SerializeToString())
    with pytest.raises(InvalidInputError, match="membership_values"):
        lrcompile.optimize(tmp_path / "model.onnx")
