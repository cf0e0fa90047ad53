"""Every disguise in which a linear layer stands in an ONNX file, with what the file computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from lrcompile.linop import LinearOperator, low_rank
from tests.graphs.nets import Shape, model, node, normal

IN, OUT = 12, 10
X: dict[str, Shape] = {"x": ("n", IN)}
TOKENS: dict[str, Shape] = {"x": ("n", "t", IN)}
IMAGE: dict[str, Shape] = {"x": ("n", IN, "h", "w")}
Apply = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Disguise:
    """A model, its sites and what it computes, in terms of ``linear(site, x) = x @ W.T + shift``."""

    nodes: list[onnx.NodeProto]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    weights: dict[str, np.ndarray]
    sites: dict[str, str]  # name: kind
    compute: Callable[[Apply, dict[str, np.ndarray]], dict[str, np.ndarray]]
    more: dict[str, Any] = field(default_factory=dict)


def w(out: int = OUT, into: int = IN, seed: int = 0) -> np.ndarray:
    return normal(out, into, seed=seed) / into**0.5


def b(size: int = OUT, seed: int = 100) -> np.ndarray:
    return normal(size, seed=seed)


def last(array: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(array, 1, -1)


def first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 1)


def relu(array: np.ndarray) -> np.ndarray:
    return np.maximum(array, 0)


def constant_node(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name), name=f"{name}_node")


LINE: dict[str, Shape] = {"y": ("n", OUT)}
LINES: dict[str, Shape] = {"y": ("n", "t", OUT)}
MAP: dict[str, Shape] = {"y": ("n", OUT, None, None)}

DISGUISES: dict[str, Disguise] = {
    "matmul": Disguise(
        [node("MatMul", "x fc.weight", "y")], TOKENS, LINES, {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "matmul on a vector": Disguise(
        [node("MatMul", "x fc.weight", "y")], {"x": (IN,)}, {"y": (OUT,)}, {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "matmul and add": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "p fc.bias", "y")], TOKENS, LINES,
        {"fc.weight": w().T, "fc.bias": b()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "bias first": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "fc.bias p", "y")], TOKENS, LINES,
        {"fc.weight": w().T, "fc.bias": b()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "turned weight": Disguise(
        [node("Transpose", "fc.weight", "t", perm=[1, 0]), node("MatMul", "x t", "y")], TOKENS, LINES,
        {"fc.weight": w()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "weight behind an identity": Disguise(
        [node("Identity", "fc.weight", "t"), node("MatMul", "x t", "y")], X, LINE,
        {"fc.weight": w().T}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "gemm": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transB=1)], X, LINE, {"fc.weight": w(), "fc.bias": b()},
        {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "gemm without bias": Disguise(
        [node("Gemm", "x fc.weight", "y")], X, LINE, {"fc.weight": w().T}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"])},
    ),
    "gemm with alpha and beta": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transB=1, alpha=0.5, beta=3.0)], X, LINE,
        {"fc.weight": w(), "fc.bias": b()}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + 3 * b()},
    ),
    "gemm that turns its input": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", transA=1, transB=1)], {"x": (IN, "n")}, LINE,
        {"fc.weight": w(), "fc.bias": b()}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"].T) + b()},
    ),
    "gemm with a scalar bias": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y", beta=2.0)], X, LINE,
        {"fc.weight": w().T, "fc.bias": np.array(0.5, np.float32)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + 1},
    ),
    "gemm with a matrix of biases": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y")], {"x": (4, IN)}, {"y": (4, OUT)},
        {"fc.weight": w().T, "fc.bias": normal(4, OUT, seed=3)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + normal(4, OUT, seed=3)},
    ),
    "gemm with a bias for each row": Disguise(
        [node("Gemm", "x fc.weight fc.bias", "y")], {"x": (OUT, IN)}, {"y": (OUT, OUT)},
        {"fc.weight": w().T, "fc.bias": normal(OUT, 1, seed=3)}, {"fc": "Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + normal(OUT, 1, seed=3)},
    ),
    "gemm with a computed bias": Disguise(
        [node("Relu", "x", "r"), node("Gemm", "x fc.weight r", "y", beta=0.5)], X, {"y": ("n", IN)},
        {"fc.weight": w(IN).T}, {"fc": "Gemm"}, lambda f, i: {"y": f("fc", i["x"]) + 0.5 * relu(i["x"])},
    ),
    "convolution": Disguise(
        [node("Conv", "x fc.weight fc.bias", "y", kernel_shape=[1, 1], pads=[0, 0, 0, 0])], IMAGE, MAP,
        {"fc.weight": w()[:, :, None, None], "fc.bias": b()}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])) + b())},
    ),
    "convolution of a line": Disguise(
        [node("Conv", "x fc.weight", "y", strides=[2])], {"x": ("n", IN, "t")}, {"y": ("n", OUT, None)},
        {"fc.weight": w()[:, :, None]}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])[:, ::2]))},
    ),
    "convolution of a volume": Disguise(
        [node("Conv", "x fc.weight fc.bias", "y", strides=[1, 2, 3])], {"x": ("n", IN, "d", "h", "w")},
        {"y": ("n", OUT, None, None, None)},
        {"fc.weight": w()[:, :, None, None, None], "fc.bias": b()}, {"fc": "Conv"},
        lambda f, i: {"y": first(f("fc", last(i["x"])[:, :, ::2, ::3]) + b())},
    ),
    "constant node": Disguise(
        [constant_node("/fc/Constant_output_0", w().T), node("MatMul", "x /fc/Constant_output_0", "y", "/fc/MatMul")],
        X, LINE, {}, {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"])},
    ),
    "one weight in two nodes": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "p", "r"), node("Gemm", "r fc.weight fc.bias", "y")],
        X, {"y": ("n", IN)}, {"fc.weight": w(IN).T, "fc.bias": b(IN)}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", relu(f("fc", i["x"]))) + b(IN)},
    ),
    "one weight stored twice, once turned": Disguise(
        [node("MatMul", "x fc.weight", "y"), node("Gemm", "x copy", "z", transB=1)], X, {**LINE, "z": ("n", OUT)},
        {"fc.weight": w().T, "copy": w()}, {"fc": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]), "z": f("fc", i["x"])},
    ),
    "a square weight and its transpose": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "p", "r"), node("MatMul", "r back.weight", "y")],
        X, {"y": ("n", IN)}, {"fc.weight": w(IN).T, "back.weight": w(IN)}, {"fc": "MatMul", "back": "MatMul"},
        lambda f, i: {"y": f("back", relu(f("fc", i["x"])))},
    ),
    "adapter": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("MatMul", "x a", "xa"), node("MatMul", "xa bb", "xab"),
         node("Mul", "xab scale", "s"), node("Add", "p s", "sum"), node("Add", "sum fc.bias", "y")],
        TOKENS, LINES,
        {"fc.weight": w().T, "a": w(3, IN, 1).T, "bb": w(OUT, 3, 2).T, "scale": np.array(2, "f4"), "fc.bias": b()},
        {"fc": "MatMul+Mul+Add"}, lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "two layers in a row": Disguise(
        [node("MatMul", "x fc.left", "p"), node("Gemm", "p fc.right bias", "y")], X, LINE,
        {"fc.left": w(5, IN).T, "fc.right": w(OUT, 5, 1).T, "bias": b()}, {"fc": "MatMul+Gemm"},
        lambda f, i: {"y": f("fc", i["x"]) + b()},
    ),
    "two convolutions in a row": Disguise(
        [node("Conv", "x fc.left", "p", strides=[2, 1]), node("Conv", "p fc.right bias", "y")], IMAGE, MAP,
        {"fc.left": w(5, IN)[:, :, None, None], "fc.right": w(OUT, 5, 1)[:, :, None, None], "bias": b()},
        {"fc": "Conv"}, lambda f, i: {"y": first(f("fc", last(i["x"])[:, ::2]) + b())},
    ),
    "side by side": Disguise(
        [node("MatMul", "x one", "p"), node("MatMul", "x two", "q"), node("Concat", "p q", "y", axis=2)],
        TOKENS, {"y": ("n", "t", 2 * OUT)}, {"one": w().T, "two": w(seed=1).T}, {"one": "MatMul+Concat"},
        lambda f, i: {"y": f("one", i["x"])},
    ),
    "a residual is not swallowed": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Add", "p x", "y")], X, {"y": ("n", IN)}, {"fc.weight": w(IN).T},
        {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"]) + i["x"]},
    ),
    "two layers of different inputs": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("Relu", "x", "r"), node("MatMul", "r gate.weight", "q"),
         node("Add", "p q", "y")],
        X, LINE, {"fc.weight": w().T, "gate.weight": w(seed=1).T}, {"fc": "MatMul", "gate": "MatMul"},
        lambda f, i: {"y": f("fc", i["x"]) + f("gate", relu(i["x"]))},
    ),
    "an interior output ends an expression": Disguise(
        [node("MatMul", "x fc.weight", "p"), node("MatMul", "p head.weight", "y")], X, {**LINE, "p": ("n", IN)},
        {"fc.weight": w(IN).T, "head.weight": w(seed=1).T}, {"fc": "MatMul", "head": "MatMul"},
        lambda f, i: {"y": f("head", f("fc", i["x"])), "p": f("fc", i["x"])},
    ),
    "a bias that two layers share": Disguise(
        [node("Gemm", "x a.weight bias", "p"), node("Gemm", "x b.weight bias", "q"), node("Mul", "p q", "y")], X, LINE,
        {"a.weight": w().T, "b.weight": w(seed=1).T, "bias": b()}, {"a": "Gemm", "b": "Gemm"},
        lambda f, i: {"y": (f("a", i["x"]) + b()) * (f("b", i["x"]) + b())},
    ),
    "a norm between": Disguise(
        [node("Mul", "x scale", "s"), node("MatMul", "s fc.weight", "y")], X, LINE,
        {"scale": b(IN), "fc.weight": w().T}, {"fc": "MatMul"}, lambda f, i: {"y": f("fc", i["x"] * b(IN))},
    ),
}  # fmt: skip


def made(case: Disguise) -> onnx.ModelProto:
    return model(case.nodes, case.inputs, case.outputs, case.weights, **case.more)


def feeds(case: Disguise) -> dict[str, np.ndarray]:
    sizes = {"n": 3, "t": 5, "d": 4, "h": 5, "w": 4}
    shapes = {name: [sizes.get(str(dim), dim) for dim in shape] for name, shape in case.inputs.items()}
    return {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}  # type: ignore[misc]


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=atol * max(np.abs(array).max(), 1), err_msg=name)


def random_operator(site: Any, seed: int = 0) -> tuple[LinearOperator, torch.Tensor]:
    out, into = site.shape
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator)
    return low_rank(left / 2, right / into**0.5), torch.randn(out, generator=generator)
