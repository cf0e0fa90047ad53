"""Elementwise operators and reductions of the standard domain, on tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from lrcompile.graphs.onnx.torched.table import dtype_of, ints, rule

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "And": operator.and_,
    "Or": operator.or_,
    "Xor": operator.xor,
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "BitwiseXor": operator.xor,
}
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Identity": lambda x: x,
    "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan,
    "Tanh": torch.tanh, "HardSwish": F.hardswish, "Mish": F.mish,
}  # fmt: skip
_REDUCE: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, dim, keepdim: x.abs().sum(dim, keepdim=keepdim),
    "ReduceL2": lambda x, dim, keepdim: x.square().sum(dim, keepdim=keepdim).sqrt(),
    "ReduceSumSquare": lambda x, dim, keepdim: x.square().sum(dim, keepdim=keepdim),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceLogSum": lambda x, dim, keepdim: x.sum(dim, keepdim=keepdim).log(),
}

for _name, _function in _BINARY.items():
    rule(_name)(lambda node, a, b, function=_function: function(a, b))
for _name, _unary in _UNARY.items():
    rule(_name)(lambda node, x, function=_unary: function(x))


@rule("Div")
def _div(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@rule("Pow")
def _pow(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


@rule("Mod")
def _mod(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.attributes.get_int("fmod", 0) else torch.remainder(a, b)


@rule("Min")
def _min(node: ir.Node, first: Tensor, *rest: Tensor) -> Tensor:
    for each in rest:
        first = torch.minimum(first, each)
    return first


@rule("Max")
def _max(node: ir.Node, first: Tensor, *rest: Tensor) -> Tensor:
    for each in rest:
        first = torch.maximum(first, each)
    return first


@rule("Sum")
def _sum(node: ir.Node, first: Tensor, *rest: Tensor) -> Tensor:
    for each in rest:
        first = first + each
    return first


@rule("Mean")
def _mean(node: ir.Node, *all_: Tensor) -> Tensor:
    return _sum(node, *all_) / len(all_)


@rule("Where")
def _where(node: ir.Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@rule("Clip")
def _clip(node: ir.Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    lowest = node.attributes.get_float("min", None)  # attributes before opset 11
    highest = node.attributes.get_float("max", None)
    if low is not None or lowest is not None:
        x = torch.maximum(x, low if low is not None else torch.tensor(lowest, dtype=x.dtype))
    if high is not None or highest is not None:
        x = torch.minimum(x, high if high is not None else torch.tensor(highest, dtype=x.dtype))
    return x


@rule("Gelu")
def _gelu(node: ir.Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.attributes.get_string("approximate", "none"))


@rule("LeakyRelu")
def _leaky(node: ir.Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.attributes.get_float("alpha", 0.01))


@rule("Elu")
def _elu(node: ir.Node, x: Tensor) -> Tensor:
    return F.elu(x, node.attributes.get_float("alpha", 1.0))


@rule("PRelu")
def _prelu(node: ir.Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@rule("HardSigmoid")
def _hard_sigmoid(node: ir.Node, x: Tensor) -> Tensor:
    return (x * node.attributes.get_float("alpha", 0.2) + node.attributes.get_float("beta", 0.5)).clamp(0, 1)


@rule("Swish")
def _swish(node: ir.Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * node.attributes.get_float("alpha", 1.0))


@rule("Cast")
def _cast(node: ir.Node, x: Tensor) -> Tensor:
    return x.to(dtype_of(node.attributes["to"].as_int()))


@rule("CastLike")
def _cast_like(node: ir.Node, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@rule("Dropout")
def _dropout(node: ir.Node, x: Tensor, *_: Tensor | None) -> Tensor:
    return x  # evaluation: nothing is dropped


@rule("CumSum")
def _cumsum(node: ir.Node, x: Tensor, axis: Tensor) -> Tensor:
    if node.attributes.get_int("exclusive", 0) or node.attributes.get_int("reverse", 0):
        raise NotImplementedError("CumSum, exclusive or reverse")
    return torch.cumsum(x, ints(axis)[0], dtype=x.dtype)


@rule("ArgMax")
def _argmax(node: ir.Node, x: Tensor) -> Tensor:
    if node.attributes.get_int("select_last_index", 0):
        raise NotImplementedError("ArgMax of the last index")
    axis, keep = node.attributes.get_int("axis", 0), bool(node.attributes.get_int("keepdims", 1))
    return torch.argmax(x, axis, keepdim=keep)


def _reduction(node: ir.Node, x: Tensor, axes: Tensor | None, function: Callable[..., Tensor]) -> Tensor:
    given = ints(axes) if axes is not None else node.attributes.get_ints("axes", None)
    if not given and node.attributes.get_int("noop_with_empty_axes", 0):
        return x
    dims = list(given) if given else list(range(x.ndim))
    return function(x, dim=dims, keepdim=bool(node.attributes.get_int("keepdims", 1)))


for _name, _reduce in _REDUCE.items():
    rule(_name)(lambda node, x, axes=None, function=_reduce: _reduction(node, x, axes, function))
