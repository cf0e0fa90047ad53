"""Small deterministic ONNX models for tests, built with ``onnx.helper`` alone.

Weights have a decaying spectrum, as trained ones do, so that a low-rank pass has something to gain and something to
lose. Every builder writes a file and returns what is true about it, so that a test compares with facts and not with
the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DType = Literal["float32", "float64", "float16", "bfloat16"]
OPSET: dict[DType, int] = {"float32": 20, "float64": 20, "float16": 20, "bfloat16": 22}  # Conv takes bfloat16 since 22
IR_VERSION = 10
ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
NUMPY = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Linear:
    """What is true of one linear site of a built model.

    Attributes:
        output: name of the graph output (or interior value) that holds the result, bias included.
        initializer: the stored weight's name; of a Constant node the name of its output.
        weight: effective weight (out, in) in float64, factors such as Gemm's ``alpha`` included.
        bias: effective bias (out,) in float64, Gemm's ``beta`` included, or ``None``.
        operator: the operator that applies it.
        uses: how many nodes read the initializer.
    """

    output: str
    initializer: str
    weight: np.ndarray
    bias: np.ndarray | None
    operator: str
    uses: int = 1


@dataclass(frozen=True, eq=False)
class Built:
    """A written model: its file, its dtype, the shape of each input (dynamic axes by name), its linears."""

    path: Path
    dtype: DType
    inputs: Mapping[str, tuple[int | str, ...]]
    linears: Mapping[str, Linear]

    def example(self, batch: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
        """Standard normal inputs; every dynamic axis gets ``batch``."""
        random = np.random.default_rng(seed)
        shapes = {
            name: [batch if isinstance(size, str) else size for size in shape] for name, shape in self.inputs.items()
        }
        return {name: random.standard_normal(shape).astype(NUMPY[self.dtype]) for name, shape in shapes.items()}


def weight(out: int, inp: int, seed: int, *, decay: float = 0.8, rank: int | None = None) -> np.ndarray:
    """A matrix (out, in) in float64 whose singular values fall like ``i ** -decay``, scaled like a trained layer.

    Args:
        out: rows.
        inp: columns.
        seed: of the random singular vectors.
        decay: exponent of the power law; 0 is a flat spectrum.
        rank: exact rank, by default full.

    Outputs for standard normal inputs have mean square 1.
    """
    random = np.random.default_rng(seed)
    full = min(out, inp)
    left = np.linalg.qr(random.standard_normal((out, full)))[0]
    right = np.linalg.qr(random.standard_normal((inp, full)))[0]
    values = np.arange(1, full + 1, dtype=np.float64) ** -decay
    values[rank if rank is not None else full :] = 0.0
    matrix = (left * values) @ right.T
    return matrix * np.sqrt(out) / np.linalg.norm(matrix)


def bias(size: int, seed: int) -> np.ndarray:
    """A small bias (size,) in float64."""
    return 0.1 * np.random.default_rng(seed).standard_normal(size)


class Builder:
    """Collects initializers and nodes of one graph; stored values are rounded to the dtype before they become facts."""

    def __init__(self, dtype: DType) -> None:
        self.dtype: DType = dtype
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.linears: dict[str, Linear] = {}

    def tensor(self, name: str, value: np.ndarray) -> onnx.TensorProto:
        """A tensor of the model's dtype."""
        array = np.ascontiguousarray(value).astype(NUMPY[self.dtype])
        return helper.make_tensor(name, ELEMENT[self.dtype], array.shape, array.tobytes(), raw=True)

    def rounded(self, value: np.ndarray) -> np.ndarray:
        """What the model's dtype keeps of ``value``, in float64."""
        return value.astype(NUMPY[self.dtype]).astype(np.float64)

    def store(self, name: str, value: np.ndarray) -> str:
        """Add an initializer and return its name."""
        self.initializers.append(self.tensor(name, value))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node named like its only output and return that name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{output}_node", **attributes))
        return output

    def fact(self, name: str, linear: Linear) -> None:
        """Record a linear under the name of its disguise."""
        self.linears[name] = linear

    def write(
        self,
        path: Path,
        inputs: Mapping[str, tuple[int | str, ...]],
        outputs: Mapping[str, tuple[int | str, ...]],
        *,
        external: bool,
    ) -> Built:
        """Check and save; with ``external`` all initializers go to ``<file>.data`` beside it."""
        element = ELEMENT[self.dtype]
        ins = [helper.make_tensor_value_info(name, element, shape) for name, shape in inputs.items()]
        outs = [helper.make_tensor_value_info(name, element, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, Path(path).stem, ins, outs, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET[self.dtype])],
            ir_version=IR_VERSION,
            producer_name="tests",
        )
        onnx.checker.check_model(model, full_check=True)
        data = f"{Path(path).name}.data"
        Path(path).with_name(data).unlink(missing_ok=True)  # onnx appends to an external file that exists
        onnx.save_model(model, path, save_as_external_data=external, location=data, size_threshold=0)
        return Built(Path(path), self.dtype, dict(inputs), dict(self.linears))


def two_layer_mlp(
    path: Path,
    *,
    dtype: DType = "float32",
    external: bool = False,
    features: int = 64,
    hidden: int = 96,
    classes: int = 10,
    rank: int | None = None,
    decay: float = 0.8,
    seed: int = 0,
) -> Built:
    """``x (batch, features) -> MatMul + Add -> Relu -> Gemm(transB=1) -> y (batch, classes)``.

    Linears: ``up`` (``up.weight`` is stored (in, out)) and ``down`` (``down.weight`` is stored (out, in)).
    ``rank`` makes the first weight exactly that rank in float64, for exact passes.
    """
    b = Builder(dtype)
    w1, w2 = weight(hidden, features, seed, decay=decay, rank=rank), weight(classes, hidden, seed + 1, decay=decay)
    c1, c2 = bias(hidden, seed + 2), bias(classes, seed + 3)
    b.node("MatMul", ["x", b.store("up.weight", w1.T)], "up.product")
    b.node("Add", ["up.product", b.store("up.bias", c1)], "up")
    b.node("Relu", ["up"], "relu")
    b.node("Gemm", ["relu", b.store("down.weight", w2), b.store("down.bias", c2)], "y", transB=1)
    b.fact("up", Linear("up", "up.weight", b.rounded(w1), b.rounded(c1), "MatMul"))
    b.fact("down", Linear("y", "down.weight", b.rounded(w2), b.rounded(c2), "Gemm"))
    return b.write(path, {"x": ("batch", features)}, {"y": ("batch", classes)}, external=external)


FEATURES, OUT, SIDE = 24, 32, 3  # sizes of the disguises: inputs, outputs, image side


def disguises(path: Path, *, dtype: DType = "float32", external: bool = False, seed: int = 0) -> Built:
    """One graph with every form in which a constant linear layer occurs in ONNX files, one graph output each.

    Inputs: ``x`` (batch, 24), ``tokens`` (batch, 7, 24), ``image`` (batch, 24, 3, 3). The keys of ``linears``
    name the forms, the graph outputs are called the same:

    * ``matmul``: MatMul(tokens, W), Add(·, b), W stored (in, out).
    * ``bias_first``: Add(b, MatMul(x, W)).
    * ``matmul_transpose``: MatMul(tokens, Transpose(W)), W stored (out, in).
    * ``gemm_scaled``: Gemm(x, W, b, transB=1, alpha=0.5, beta=2).
    * ``gemm_trans_a``: Gemm(Transpose(x), W, transA=1), W stored (in, out), no bias.
    * ``conv1x1``: Conv(image, W, b) with a 1x1 window, W stored (out, in, 1, 1).
    * ``constant``: MatMul(x, W) with W from a Constant node.
    * ``shared_first``, ``shared``: MatMul(x, W), Relu, MatMul(·, W): one square initializer used twice.
    * ``twin_matmul``, ``twin_gemm``: the same weight stored twice, (in, out) for a MatMul and (out, in) for a Gemm.
    """
    b = Builder(dtype)
    _matmuls(b, seed)
    _gemms(b, seed + 20)
    _shares(b, seed + 40)
    wide: dict[str, tuple[int | str, ...]] = {
        name: ("batch", FEATURES if name.startswith("shared") else OUT) for name in b.linears
    }
    wide |= {name: ("batch", 7, OUT) for name in ("matmul", "matmul_transpose")}
    wide["conv1x1"] = ("batch", OUT, SIDE, SIDE)
    inputs: dict[str, tuple[int | str, ...]] = {
        "x": ("batch", FEATURES),
        "tokens": ("batch", 7, FEATURES),
        "image": ("batch", FEATURES, SIDE, SIDE),
    }
    return b.write(path, inputs, wide, external=external)


def _matmuls(b: Builder, seed: int) -> None:
    w, c = weight(OUT, FEATURES, seed), bias(OUT, seed)
    b.node("MatMul", ["tokens", b.store("matmul.weight", w.T)], "matmul.product")
    b.node("Add", ["matmul.product", b.store("matmul.bias", c)], "matmul")
    b.fact("matmul", Linear("matmul", "matmul.weight", b.rounded(w), b.rounded(c), "MatMul"))

    w, c = weight(OUT, FEATURES, seed + 1), bias(OUT, seed + 1)
    b.node("MatMul", ["x", b.store("bias_first.weight", w.T)], "bias_first.product")
    b.node("Add", [b.store("bias_first.bias", c), "bias_first.product"], "bias_first")
    b.fact("bias_first", Linear("bias_first", "bias_first.weight", b.rounded(w), b.rounded(c), "MatMul"))

    w = weight(OUT, FEATURES, seed + 2)
    b.node("Transpose", [b.store("matmul_transpose.weight", w)], "matmul_transpose.turned", perm=[1, 0])
    b.node("MatMul", ["tokens", "matmul_transpose.turned"], "matmul_transpose")
    b.fact("matmul_transpose", Linear("matmul_transpose", "matmul_transpose.weight", b.rounded(w), None, "MatMul"))

    w = weight(OUT, FEATURES, seed + 3)
    b.node("Constant", [], "constant.weight", value=b.tensor("constant.value", w.T))
    b.node("MatMul", ["x", "constant.weight"], "constant")
    b.fact("constant", Linear("constant", "constant.weight", b.rounded(w), None, "MatMul"))


def _gemms(b: Builder, seed: int) -> None:
    w, c = weight(OUT, FEATURES, seed), bias(OUT, seed)
    operands = ["x", b.store("gemm_scaled.weight", w), b.store("gemm_scaled.bias", c)]
    b.node("Gemm", operands, "gemm_scaled", transB=1, alpha=0.5, beta=2.0)
    scaled = Linear("gemm_scaled", "gemm_scaled.weight", 0.5 * b.rounded(w), 2.0 * b.rounded(c), "Gemm")
    b.fact("gemm_scaled", scaled)

    w = weight(OUT, FEATURES, seed + 1)
    b.node("Transpose", ["x"], "gemm_trans_a.turned", perm=[1, 0])
    b.node("Gemm", ["gemm_trans_a.turned", b.store("gemm_trans_a.weight", w.T)], "gemm_trans_a", transA=1)
    b.fact("gemm_trans_a", Linear("gemm_trans_a", "gemm_trans_a.weight", b.rounded(w), None, "Gemm"))

    w, c = weight(OUT, FEATURES, seed + 2), bias(OUT, seed + 2)
    operands = ["image", b.store("conv1x1.weight", w[:, :, None, None]), b.store("conv1x1.bias", c)]
    b.node("Conv", operands, "conv1x1", kernel_shape=[1, 1])
    b.fact("conv1x1", Linear("conv1x1", "conv1x1.weight", b.rounded(w), b.rounded(c), "Conv"))


def _shares(b: Builder, seed: int) -> None:
    w = weight(FEATURES, FEATURES, seed)
    b.node("MatMul", ["x", b.store("shared.weight", w.T)], "shared_first")
    b.node("Relu", ["shared_first"], "shared.relu")
    b.node("MatMul", ["shared.relu", "shared.weight"], "shared")
    for name in ("shared_first", "shared"):
        b.fact(name, Linear(name, "shared.weight", b.rounded(w), None, "MatMul", uses=2))

    w = weight(OUT, FEATURES, seed + 1)
    b.node("MatMul", ["x", b.store("twin_matmul.weight", w.T)], "twin_matmul")
    b.node("Gemm", ["x", b.store("twin_gemm.weight", w)], "twin_gemm", transB=1)
    b.fact("twin_matmul", Linear("twin_matmul", "twin_matmul.weight", b.rounded(w), None, "MatMul"))
    b.fact("twin_gemm", Linear("twin_gemm", "twin_gemm.weight", b.rounded(w), None, "Gemm"))


def stored(path: Path, name: str) -> np.ndarray:
    """A stored initializer of a file in float64, external data included; independent of the code under test."""
    model = onnx.load(path)
    return next(numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer if t.name == name)
