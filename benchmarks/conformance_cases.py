"""ONNX's own conformance cases, bare and embedded behind constant linear layers that an exact rewrite can shrink.

What is embedded hands the case the values that it expects: all numbers in the added matrices are powers of two,
and together they are the identity. Only a bias between two layers costs a rounding; half precision goes without.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

RANDOM = ("bernoulli", "dropout", "random", "multinomial")
"""Words in the names of cases whose outputs are not determined by their inputs."""
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
INTEGERS = (TensorProto.INT64, TensorProto.INT32)
PREFIX = "lrcompile_case"
LARGEST = 512
"""Elements along the last axis, beyond which the added matrices would say nothing new."""


@functools.cache
def cases() -> list[Any]:
    """The cases of single operators that come with onnx, in order."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they overflow on purpose
        return [case for case in collect_testcases(None) if case.model is not None]  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Embedded:
    """A case behind linear layers."""

    proto: onnx.ModelProto
    feeds: dict[str, Any]
    style: str


def feeds_of(case: Any) -> dict[str, Any]:
    """The case's first inputs by name; an absent optional input has no name."""
    names = [value.name for value in case.model.graph.input]
    return dict(zip(names, case.data_sets[0][0], strict=False))


def embedded(case: Any, index: int) -> Embedded | None:
    """The case with constant linear layers before its first suitable input; None where it has none."""
    feeds = feeds_of(case)
    for kinds in (FLOATS, INTEGERS):
        for value in case.model.graph.input:
            kind = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0
            array = feeds.get(value.name)
            if kind in kinds and isinstance(array, np.ndarray) and _fits(array, kind):
                return _embed(case, value, np.asarray(array), index, feeds)
    return None


def _fits(array: np.ndarray, kind: int) -> bool:
    last = array.shape[-1] if array.ndim else 1
    small = kind in FLOATS or not array.size or np.abs(array.astype(np.float64)).max() < 2**20
    return bool(0 < last <= LARGEST and array.size and small)


def _embed(case: Any, value: onnx.ValueInfoProto, array: np.ndarray, index: int, feeds: dict[str, Any]) -> Embedded:
    proto = onnx.ModelProto.FromString(case.model.SerializeToString())
    floating = array.dtype.kind == "f"
    source, kind = f"{PREFIX}_x", value.type.tensor_type.elem_type if floating else TensorProto.FLOAT
    size = array.shape[-1] if array.ndim else 1
    half = kind == TensorProto.FLOAT16
    styles = [name for name in STYLES if not (half and "bias" in name)]
    style = styles[index % len(styles)]
    nodes, weights = STYLES[style](source, f"{PREFIX}_y", size, helper.tensor_dtype_to_np_dtype(kind))
    shape = list(array.shape) or [1]
    last = f"{PREFIX}_y"
    if not array.ndim:
        nodes.append(helper.make_node("Squeeze" if _opset(proto) < 13 else "Reshape", *_scalar(proto, last, weights)))
        last = f"{PREFIX}_scalar"
    if not floating:
        nodes.append(helper.make_node("Cast", [last], [f"{PREFIX}_cast"], to=value.type.tensor_type.elem_type))
        last = f"{PREFIX}_cast"
    graph = proto.graph
    for node in graph.node:
        _rename(node, value.name, last)
    for output in graph.output:
        if output.name == value.name:
            raise ValueError(f"{case.name} returns its input")
    inputs = [each for each in graph.input if each.name != value.name]
    position = [each.name for each in graph.input].index(value.name)
    inputs.insert(position, helper.make_tensor_value_info(source, kind, shape))
    old = list(graph.node)
    del graph.input[:], graph.node[:]
    graph.input.extend(inputs)
    graph.node.extend([*nodes, *old])
    graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    given = {source if name == value.name else name: array for name, array in feeds.items()}
    given[source] = array.astype(helper.tensor_dtype_to_np_dtype(kind)).reshape(shape)
    return Embedded(proto, given, style)


def _opset(proto: onnx.ModelProto) -> int:
    return next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), 0)


def _scalar(proto: onnx.ModelProto, last: str, weights: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    if _opset(proto) < 13:
        return [last], [f"{PREFIX}_scalar"]
    weights[f"{PREFIX}_shape"] = np.array([], np.int64)
    return [last, f"{PREFIX}_shape"], [f"{PREFIX}_scalar"]


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    node.input[:] = [new if name == old else name for name in node.input]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                _rename(inner, old, new)


# -- what is put before a case -----------------------------------------------------------------

Style = Callable[[str, str, int, Any], tuple[list[onnx.NodeProto], dict[str, np.ndarray]]]


def _order(size: int, seed: int) -> np.ndarray:
    return np.eye(size)[np.random.default_rng(seed).permutation(size)]


def _wide(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices (n, 2n) and (2n, n) of powers of two whose product is the identity."""
    one, two = _order(size, 1), _order(size, 2)
    return np.hstack((2 * one, 4 * two)), np.vstack((one.T / 4, two.T / 8))


def _named(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{PREFIX}_{name}": array for name, array in arrays.items()}


def _node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, [f"{PREFIX}_{n}" for n in inputs], [f"{PREFIX}_{output}"], **attributes)


def _two_layers(source: str, root: str, size: int, dtype: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Two layers with nothing between them."""
    left, right = _wide(size)
    nodes = [_node("MatMul", ["x", "left"], "middle"), _node("MatMul", ["middle", "right"], "y")]
    return nodes, _named(left=left.astype(dtype), right=right.astype(dtype))


def _with_bias(source: str, root: str, size: int, dtype: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Two layers with a bias between them that the second one cancels."""
    left, right = _wide(size)
    bias = np.concatenate((np.full(size, 2.0), np.full(size, -4.0)))
    nodes = [_node("MatMul", ["x", "left"], "middle"), _node("Add", ["middle", "bias"], "moved")]
    nodes.append(_node("MatMul", ["moved", "right"], "y"))
    return nodes, _named(left=left.astype(dtype), right=right.astype(dtype), bias=bias.astype(dtype))


def _adapter(source: str, root: str, size: int, dtype: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """A layer and an un-merged adapter of rank 1, each with one half of the last channel."""
    a, b = np.zeros((size, 1)), np.zeros((1, size))
    a[-1], b[0, -1] = 2.0, 0.0625
    base = np.eye(size)
    base[-1, -1] = 0.5
    nodes = [
        _node("MatMul", ["x", "base"], "p"),
        _node("MatMul", ["x", "a"], "xa"),
        _node("MatMul", ["xa", "b"], "xab"),
    ]
    nodes += [_node("Mul", ["xab", "scale"], "s"), _node("Add", ["p", "s"], "y")]
    arrays = {"base": base, "a": a, "b": b, "scale": np.array(4.0)}
    return nodes, _named(**{name: array.astype(dtype) for name, array in arrays.items()})


def _scaled(source: str, root: str, size: int, dtype: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """A layer whose channels are scaled afterwards."""
    scale = 2.0 ** (np.arange(size) % 3 - 1)
    nodes = [_node("MatMul", ["x", "weight"], "p"), _node("Mul", ["p", "scale"], "y")]
    return nodes, _named(weight=np.diag(1 / scale).astype(dtype), scale=scale.astype(dtype))


STYLES: dict[str, Style] = {
    "two layers": _two_layers,
    "two layers, bias between": _with_bias,
    "adapter": _adapter,
    "scale": _scaled,
}


# -- running -----------------------------------------------------------------------------------


def outputs(proto: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[str, list[Any]] | None:
    """What ONNX Runtime computes, else what onnx's reference does; None where neither can."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        content = proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return "ONNX Runtime", list(session.run(None, feeds))
    except Exception:  # half a dozen unrelated types
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "reference", list(ReferenceEvaluator(proto).run(None, feeds))  # type: ignore[arg-type]
    except Exception:
        return None


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs agree to rounding; NaN equals NaN."""
    if a is None or isinstance(a, list | tuple | dict):
        same = type(a) is type(b) and (a is None or len(a) == len(b))
        if isinstance(a, dict):
            return same and all(equal(a[key], b.get(key)) for key in a)
        return same and (a is None or all(equal(x, y) for x, y in zip(a, b, strict=True)))
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind in "OSU":
        return bool((a == b).all())
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    coarse = a.dtype.itemsize < 4 and a.dtype.kind not in "iub"
    return np.allclose(a.astype(wide), b.astype(wide), 2e-3 if coarse else 1e-4, 1e-5, equal_nan=True)
