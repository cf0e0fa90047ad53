"""Products, convolutions, norms, pooling and attention."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from lrcompile.graphs.onnx.torched.table import rule

_MICROSOFT = "com.microsoft"


@rule("MatMul")
def _matmul(node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@rule("Gemm")
def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    left, turned = a.T if node.attributes.get_int("transA", 0) else a, bool(node.attributes.get_int("transB", 0))
    if turned and alpha == beta == 1.0 and (c is None or c.shape == b.shape[:1]):
        return F.linear(left, b, c)
    right = b.T if turned else b
    result = left @ right if alpha == 1.0 else left @ right * alpha
    return result if c is None else result + (c if beta == 1.0 else c * beta)


@rule("Einsum")
def _einsum(node: ir.Node, *operands: Tensor) -> Tensor:
    return torch.einsum(node.attributes["equation"].as_string(), *operands)


def _padded(node: ir.Node, x: Tensor, kernel: list[int], value: float = 0.0) -> Tensor:
    """The input with a window's padding made explicit, since ONNX may pad the two sides differently."""
    spatial = x.ndim - 2
    strides = node.attributes.get_ints("strides", [1] * spatial)
    dilations = node.attributes.get_ints("dilations", [1] * spatial)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = list(node.attributes.get_ints("pads", [0] * 2 * spatial))
        before, after = pads[:spatial], pads[spatial:]
    elif auto == "VALID":
        return x
    else:
        need = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
        ]
        small, large = [n // 2 for n in need], [n - n // 2 for n in need]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@rule("Conv")
def _conv(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    spatial = x.ndim - 2
    pads = list(node.attributes.get_ints("pads", [0] * 2 * spatial))
    even = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET" and pads[:spatial] == pads[spatial:]
    x = x if even else _padded(node, x, list(weight.shape[2:]))
    around = tuple(pads[:spatial]) if even else 0
    strides = node.attributes.get_ints("strides", [1] * spatial)
    dilations = node.attributes.get_ints("dilations", [1] * spatial)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    return convolve(x, weight, bias, tuple(strides), around, tuple(dilations), node.attributes.get_int("group", 1))


@rule("AveragePool")
def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    kernel = list(node.attributes["kernel_shape"].as_ints())
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
    if node.attributes.get_int("ceil_mode", 0) or any(d != 1 for d in node.attributes.get_ints("dilations", [])):
        raise NotImplementedError("AveragePool with ceil_mode or dilations")
    strides = tuple(node.attributes.get_ints("strides", [1] * len(kernel)))
    total = pool(_padded(node, x, kernel), tuple(kernel), strides)
    if node.attributes.get_int("count_include_pad", 0):
        return total
    share = pool(_padded(node, torch.ones_like(x), kernel), tuple(kernel), strides)
    return total / share


@rule("MaxPool")
def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    kernel = list(node.attributes["kernel_shape"].as_ints())
    if node.attributes.get_int("ceil_mode", 0) or len(node.outputs) > 1:
        raise NotImplementedError("MaxPool with ceil_mode or indices")
    strides = tuple(node.attributes.get_ints("strides", [1] * len(kernel)))
    dilations = tuple(node.attributes.get_ints("dilations", [1] * len(kernel)))
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[x.ndim - 2]
    return pool(_padded(node, x, kernel, -math.inf), tuple(kernel), strides, 0, dilations)


@rule("GlobalAveragePool")
def _global_average(node: ir.Node, x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


@rule("GlobalMaxPool")
def _global_max(node: ir.Node, x: Tensor) -> Tensor:
    return x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)


@rule("Softmax")
def _softmax(node: ir.Node, x: Tensor) -> Tensor:
    return torch.softmax(x, node.attributes.get_int("axis", -1))


@rule("LogSoftmax")
def _log_softmax(node: ir.Node, x: Tensor) -> Tensor:
    return torch.log_softmax(x, node.attributes.get_int("axis", -1))


@rule("LayerNormalization")
def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = node.attributes.get_int("axis", -1) % x.ndim
    if scale.shape == x.shape[axis:]:
        return F.layer_norm(x, x.shape[axis:], scale, bias, node.attributes.get_float("epsilon", 1e-5))
    normal = F.layer_norm(x, x.shape[axis:], eps=node.attributes.get_float("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


@rule("RMSNormalization")
@rule("SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", _MICROSOFT)
def _rms_norm(node: ir.Node, x: Tensor, scale: Tensor) -> Tensor:
    axis = node.attributes.get_int("axis", -1) % x.ndim
    return F.rms_norm(x, x.shape[axis:], eps=node.attributes.get_float("epsilon", 1e-5)) * scale


@rule("BatchNormalization")
def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=node.attributes.get_float("epsilon", 1e-5))


@rule("InstanceNormalization")
def _instance_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.attributes.get_float("epsilon", 1e-5))


@rule("GroupNormalization")
def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.attributes["num_groups"].as_int()
    if len(scale) != x.shape[1]:
        raise NotImplementedError("GroupNormalization with a scale for each group")
    return F.group_norm(x, groups, scale, bias, node.attributes.get_float("epsilon", 1e-5))


@rule("LpNormalization")
def _lp_norm(node: ir.Node, x: Tensor) -> Tensor:
    return F.normalize(x, node.attributes.get_int("p", 2), node.attributes.get_int("axis", -1))


@rule("Attention")
def _attention(
    node: ir.Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Tensor | None
) -> Tensor:
    unusual = set(node.attributes) - {"scale", "is_causal"}
    if q.ndim != 4 or any(each is not None for each in rest) or len(node.outputs) > 1 or unusual:
        raise NotImplementedError(
            f"Attention with packed inputs, a cache, or {', '.join(sorted(unusual)) or 'a window'}"
        )
    scale = node.attributes.get_float("scale", None)
    causal = bool(node.attributes.get_int("is_causal", 0))
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
