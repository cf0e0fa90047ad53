"""Graphs of the tests of row tiles, written by hand: free dimensions, masks, computed shapes, bodies."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

WIDTH, HEADS = 16, 2


def weights(model: onnx.ModelProto, seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """The model with normal weights of these shapes."""
    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        array = (generator.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def _parsed(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}')


ATTENTION = """
    size = Shape (x)
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    rest = Constant <value = int64[1] {-1}> ()
    eight = Constant <value = int64[1] {8}> ()
    scale = Constant <value = float {0.35}> ()
    b = Gather (size, zero)
    n = Gather (size, one)
    split = Concat <axis = 0> (b, n, rest, eight)
    flat = Concat <axis = 0> (b, n, rest)
    q0 = MatMul (x, wq)
    k0 = MatMul (x, wk)
    v0 = MatMul (x, wv)
    q1 = Reshape (q0, split)
    k1 = Reshape (k0, split)
    v1 = Reshape (v0, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    raw = MatMul (q, k)
    scores = Mul (raw, scale)
"""
REST = """
    p = Softmax <axis = -1> (masked)
    o1 = MatMul (p, v)
    o2 = Transpose <perm = [0, 2, 1, 3]> (o1)
    o3 = Reshape (o2, flat)
    o4 = MatMul (o3, wo)
    h = Add (o4, x)
    up = MatMul (h, w1)
    root = Constant <value = float {1.4142135}> ()
    half = Constant <value = float {0.5}> ()
    unit = Constant <value = float {1.0}> ()
    d = Div (up, root)
    e = Erf (d)
    f = Add (e, unit)
    g = Mul (up, f)
    act = Mul (g, half)
    down = MatMul (act, w2)
    y = Add (down, h)
"""
BLOCK = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "w1": (16, 96), "w2": (96, 16)}


def masked() -> onnx.ModelProto:
    """Attention under a mask over keys and an MLP; batch and tokens are free, shapes are computed."""
    ends = "float[batch, tokens, 16] x, float[batch, tokens] attention_mask"
    text = f"""block ({ends}) => (float[batch, tokens, 16] y) {{
        {ATTENTION}
        axes = Constant <value = int64[2] {{1, 2}}> ()
        wide = Unsqueeze (attention_mask, axes)
        high = Constant <value = float {{10000.0}}> ()
        low = Constant <value = float {{-10000.0}}> ()
        up0 = Mul (wide, high)
        bias = Add (up0, low)
        masked = Add (scores, bias)
        {REST}
    }}"""
    return weights(_parsed(text), **BLOCK)


def causal() -> onnx.ModelProto:
    """A decoder's block: the mask over rows and columns is made of positions."""
    text = f"""block (float[batch, tokens, 16] x) => (float[batch, tokens, 16] y) {{
        {ATTENTION}
        start = Constant <value = int64 {{0}}> ()
        step = Constant <value = int64 {{1}}> ()
        end = Squeeze (n)
        places = Range (start, end, step)
        columns = Unsqueeze (places, zero)
        rows = Unsqueeze (places, one)
        seen = LessOrEqual (columns, rows)
        never = Constant <value = float {{-3e38}}> ()
        masked = Where (seen, scores, never)
        {REST}
    }}"""
    return weights(_parsed(text), **BLOCK)


def mixer() -> onnx.ModelProto:
    """An MLP across tokens and one across channels, of fixed sizes."""
    text = """mixer (float[1, 32, 16] x) => (float[1, 32, 16] y) {
        t = Transpose <perm = [0, 2, 1]> (x)
        a = MatMul (t, wa)
        b = Relu (a)
        c = MatMul (b, wb)
        d = Transpose <perm = [0, 2, 1]> (c)
        e = Add (x, d)
        f = LayerNormalization <axis = -1> (e, gain)
        g = MatMul (f, w1)
        h = Relu (g)
        i = MatMul (h, w2)
        y = Add (i, e)
    }"""
    shapes = {"wa": (32, 256), "wb": (256, 32), "gain": (16,), "w1": (16, 256), "w2": (256, 16)}
    return weights(_parsed(text), **shapes)


def branches() -> onnx.ModelProto:
    """A branch that needs much and leaves little, and one that leaves much, in the order that holds both at once."""
    text = """net (float[1, 8, 64] x) => (float[1, 8, 516] y) {
        rows = Constant <value = int64 {1}> ()
        a = MatMul (x, wa)
        b = CumSum (a, rows)
        c = CumSum (b, rows)
        d = MatMul (c, wd)
        e = MatMul (x, we)
        f = CumSum (e, rows)
        y = Concat <axis = 2> (d, f)
    }"""
    return weights(_parsed(text), wa=(64, 1024), wd=(1024, 4), we=(64, 512))


def small_mixer() -> onnx.ModelProto:
    """One MLP across channels: the least that can be compressed, quantised and deployed."""
    text = """mixer (float[1, 8, 16] x) => (float[1, 8, 16] y) {
        a = MatMul (x, w1)
        b = Relu (a)
        c = MatMul (b, w2)
        y = Add (c, x)
    }"""
    return weights(_parsed(text), w1=(16, 64), w2=(64, 16))


def convolutions() -> onnx.ModelProto:
    """A convolution, two 1×1 ones with a wide middle, a pooled head; the batch is free."""
    text = """net (float[batch, 3, 16, 16] x) => (float[batch, 5] y) {
        a = Conv <pads = [1, 1, 1, 1], strides = [1, 1]> (x, k0)
        b = Relu (a)
        c = Conv (b, k1)
        d = Relu (c)
        e = Conv (d, k2)
        f = Add (e, b)
        g = GlobalAveragePool (f)
        h = Flatten (g)
        y = Gemm (h, wh)
    }"""
    return weights(_parsed(text), k0=(8, 3, 3, 3), k1=(64, 8, 1, 1), k2=(8, 64, 1, 1), wh=(8, 5))


def by_data() -> onnx.ModelProto:
    """Rows that the data choose: nothing is known about their number."""
    text = """net (float[n, 16] x) => (float[m, 16] y) {
        one = Constant <value = int64[1] {1}> ()
        s = ReduceSum <keepdims = 0> (x, one)
        zero = Constant <value = float {0.0}> ()
        good = Greater (s, zero)
        t = NonZero (good)
        i = Squeeze (t)
        r = Gather (x, i)
        a = MatMul (r, w1)
        b = Relu (a)
        y = MatMul (b, w2)
    }"""
    return weights(_parsed(text), w1=(16, 256), w2=(256, 16))


def with_body() -> onnx.ModelProto:
    """An MLP whose wide value is also read inside an If."""
    one = helper.make_graph([helper.make_node("ReduceMax", ["wide"], ["m1"], keepdims=0)], "then", [], [_scalar("m1")])
    two = helper.make_graph([helper.make_node("ReduceMin", ["wide"], ["m2"], keepdims=0)], "else", [], [_scalar("m2")])
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["wide"]),
        helper.make_node("MatMul", ["wide", "w2"], ["c"]),
        helper.make_node("If", ["which"], ["m"], then_branch=one, else_branch=two),
        helper.make_node("Add", ["c", "m"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])
    graph = helper.make_graph(nodes, "net", [x, which], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return weights(model, w1=(16, 256), w2=(256, 16))


def _scalar(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [])
