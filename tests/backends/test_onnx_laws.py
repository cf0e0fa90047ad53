"""The laws that every operator keeps on its way into ONNX and back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lrcompile.backends.onnxruntime import lower
from lrcompile.errors import UnsupportedError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import (
    BlockSparse,
    Choose,
    Dense,
    Diagonal,
    Identity,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    Select,
    SemiSparse,
    Transposed,
    apply,
    densify,
    leaves,
    low_rank,
    macs,
    nbytes,
    same,
    simplify,
    structure,
    transpose,
)
from lrcompile.linop.dense import dtype_of
from lrcompile.linop.tree import map_children
from tests.graphs.nets import built, model, node, normal, run
from tests.laws.market import MARKET, operators

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
TOLERANCE = {np.float32: 2e-5, np.float64: 2e-6, np.float16: 2e-2}


def everywhere(op: LinearOperator, dtype: type = np.float32, opset: int = 21) -> onnx.ModelProto:
    """A model that applies matrices of the operator's shape to inputs of 2, 3 and 4 axes, and as convolutions.

    ONNX Runtime has no convolutions in float64 on the CPU, so there are none in that type.
    """
    out, into = op.shape
    inputs = {"x2": ("n", into), "x3": ("n", "t", into), "x4": ("n", "h", "t", into)}
    outputs = {"y2": ("n", out), "y3": ("n", "t", out), "y4": ("n", "h", "t", out)}
    weights = {f"w{rank}": normal(into, out, seed=rank, dtype=dtype) for rank in (2, 3, 4)}
    nodes = [node("MatMul", f"x{rank} w{rank}", f"y{rank}") for rank in (2, 3, 4)]
    if dtype != np.float64:
        inputs |= {"image": ("n", into, "h", "w"), "signal": ("n", into, "t")}
        outputs |= {"spots": ("n", out, "h", "w"), "samples": ("n", out, None), "corners": ("n", out, None, None)}
        nodes += [node("Conv", "image plain", "spots"), node("Conv", "signal line bias", "samples", strides=[3])]
        nodes.append(node("Conv", "image strided bias", "corners", strides=[2, 3]))
        for seed, (name, tail) in enumerate({"plain": (1, 1), "line": (1,), "strided": (1, 1)}.items()):
            weights[name] = normal(out, into, *tail, seed=seed, dtype=dtype)
        weights["bias"] = np.arange(out, dtype=dtype)
    return model(nodes, inputs, outputs, weights, opset=opset, dtype=dtype)


def feeds(proto: onnx.ModelProto, batch: int, dtype: type) -> dict[str, np.ndarray]:
    """Inputs whose dynamic axes differ from each other."""
    sizes = {"n": batch, "h": 5, "w": 4, "t": 3}
    shapes = {
        v.name: [d.dim_value or sizes[d.dim_param] for d in v.type.tensor_type.shape.dim] for v in proto.graph.input
    }
    return {name: normal(*shape, seed=index, dtype=dtype) for index, (name, shape) in enumerate(shapes.items())}


def expected(op: LinearOperator, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``x @ W.T`` in float64; leaves are cast up before anything is computed from them."""
    turned = apply(op, torch.eye(op.shape[1], dtype=torch.float64)).numpy()
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    results = {f"y{rank}": wide[f"x{rank}"] @ turned for rank in (2, 3, 4)}
    if "image" in wide:
        image, signal = np.moveaxis(wide["image"], 1, -1), np.moveaxis(wide["signal"], 1, -1)
        bias = np.arange(op.shape[0])
        results["spots"] = np.moveaxis(image @ turned, -1, 1)
        results["corners"] = np.moveaxis(image[:, ::2, ::3] @ turned + bias, -1, 1)
        results["samples"] = np.moveaxis(signal[:, ::3] @ turned + bias, -1, 1)
    return results


def check(op: LinearOperator, dtype: type = np.float32, opset: int = 21) -> None:
    """Every output of a model in which all sites hold the operator."""
    proto = everywhere(op, dtype, opset)
    graph = OnnxGraph.from_proto(proto)
    for site in graph.linear_sites():
        graph.replace(site, op)
    lowered = built(graph)
    assert len(graph.linear_sites()) == (3 if dtype == np.float64 else 6)
    for batch in (1, 4):
        given = feeds(proto, batch, dtype)
        found = run(lowered, given)
        for name, wanted in expected(op, given).items():
            assert found[name].dtype == dtype
            scale = max(np.abs(wanted).max(), 1.0)
            np.testing.assert_allclose(found[name] / scale, wanted / scale, atol=TOLERANCE[dtype], err_msg=name)


@pytest.mark.parametrize("name", MARKET)
def test_market(name: str) -> None:
    check(MARKET[name](0))


@pytest.mark.parametrize("name", ["low-rank", "everything", "block-sparse-full", "mixed-dtypes", "quantized-symmetric"])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions(name: str, dtype: type) -> None:
    check(MARKET[name](1), dtype)


@pytest.mark.parametrize("name", ["low-rank", "lora", "masa", "stack-shared-right"])
@pytest.mark.parametrize("opset", [7, 9, 13])
def test_old_operator_sets(name: str, opset: int) -> None:
    check(MARKET[name](1), opset=opset)


@pytest.mark.parametrize("name", ["quantized", "quantized-ragged-4bit", "semi-sparse", "everything"])
@pytest.mark.parametrize("opset", [16, 18])
def test_forms_for_older_operator_sets(name: str, opset: int) -> None:
    check(MARKET[name](1), opset=opset)


def test_what_an_old_operator_set_cannot_say_is_refused() -> None:
    op = MARKET["semi-sparse-repeats"](0)
    graph = OnnxGraph.from_proto(single(op, opset=13))
    graph.replace(graph.linear_sites()[0], op)
    with pytest.raises(UnsupportedError, match="opset 16"):
        lower(graph)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(operators())
def test_random_expressions(op: LinearOperator) -> None:
    check(op, np.float64)


# -- there and back -----------------------------------------------------------------------------

STAYS_APART = {
    "no weight in it": "identity diagonal diagonal-float64 select select-wider-uint8 selects transposed-select",
    "what is computed once for several readers ends an expression": "identity-gauge masa stack-shared-right "
    "shared-product everything everything-float64 transposed-everything",
    "what touches the input element by element belongs to what stands before": "dense-columns nested-sums "
    "nested-stacks identity-in-product",
    "slices of one value are different inputs": "transposed-stack",
    "a Kronecker product is written with reshapes": "kron channel-form tucker",
    "a weight behind a Cast keeps the type of its storage": "mixed-dtypes",
    "a kernel that is a turned kernel": "tied",
}
APART = {name for names in STAYS_APART.values() for name in names.split()}


def single(op: LinearOperator, convolution: bool = False, opset: int = 21) -> onnx.ModelProto:
    """A model with one site of the operator's shape and type."""
    out, into = op.shape
    dtype = torch.empty(0, dtype=dtype_of(op)).numpy().dtype
    tail = ("h", "w") if convolution else ()
    stored = normal(out, into, 1, 1, dtype=dtype) if convolution else normal(into, out, dtype=dtype)
    nodes = [node("Conv" if convolution else "MatMul", "x w", "y")]
    return model(nodes, {"x": ("n", into, *tail)}, {"y": ("n", out, *tail)}, {"w": stored}, opset=opset, dtype=dtype)


def lowered(op: LinearOperator, convolution: bool = False) -> onnx.ModelProto:
    graph = OnnxGraph.from_proto(single(op, convolution))
    graph.replace(graph.linear_sites()[0], op)
    return built(graph)


def bound(op: LinearOperator) -> LinearOperator:
    """The operator as a file holds it: of a choice only what is picked."""
    return bound(op.operators[int(op.index)]) if isinstance(op, Choose) else map_children(op, bound)


@pytest.mark.parametrize("convolution", [False, True], ids=["matmul", "conv"])
@pytest.mark.parametrize("name", sorted(MARKET.keys() - APART))
def test_round_trip(name: str, convolution: bool) -> None:
    op = MARKET[name](0)
    (site,) = OnnxGraph.from_proto(lowered(op, convolution)).linear_sites()
    wanted, found = simplify(bound(op)), simplify(site.operator)
    assert site.name == "w"
    torch.testing.assert_close(densify(found), densify(wanted))
    if name in ("diagonals", "nested-scales"):  # simplify multiplies them in another order
        assert structure(found) == structure(wanted)
    elif name != "quantized-symmetric-float16":  # no file type has 3 bits: they come back as 8
        assert same(found, wanted)


@pytest.mark.parametrize("name", sorted(APART - {"tied"}))
def test_what_stays_apart_is_still_found_in_parts(name: str) -> None:
    op = MARKET[name](0)
    weights = [leaf for leaf in leaves(simplify(bound(op))) if isinstance(leaf, Dense)]
    found = [leaf for site in OnnxGraph.from_proto(lowered(op)).linear_sites() for leaf in leaves(site.operator)]
    dense = [leaf for leaf in found if isinstance(leaf, Dense)]
    for weight in weights:
        if weight.weight.dtype == dtype_of(op):
            assert any(same(weight, leaf) or same(weight, transpose(leaf)) for leaf in dense)


# -- what it costs -----------------------------------------------------------------------------


def stored_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the initializers, without the shapes and axes that ONNX wants as tensors."""
    import onnx_ir as ir

    stored = {name: value.const_value for name, value in ir.from_proto(proto).graph.initializers.items()}
    return sum(tensor.nbytes for name, tensor in stored.items() if tensor and not name.startswith("shape"))


@pytest.mark.parametrize("name", MARKET)
def test_bytes_are_what_the_algebra_says(name: str) -> None:
    op = bound(MARKET[name](0))
    wanted = nbytes(op)
    for leaf in {id(leaf): leaf for leaf in leaves(op)}.values():
        if isinstance(leaf, Quantized) and leaf.bits == 3:
            wanted += leaf.codes.numel() - -(-leaf.codes.numel() * leaf.bits // 8)  # ONNX stores 8 bits
        if isinstance(leaf, Quantized) and leaf.bits == 4 and leaf.zero is not None:
            wanted += -(-leaf.zero.numel() // 2) - leaf.zero.numel()  # zeros have the type of the codes
    assert stored_bytes(lowered(op)) == wanted


def as_run(op: LinearOperator) -> LinearOperator:
    """What multiplies in a file: computed matrices are dense there, element-wise factors count nothing."""
    match op:
        case Scaled(operator=inner):
            return as_run(inner)
        case Diagonal():
            return Identity(op.shape[0])
        case Transposed(operator=Select()) | SemiSparse() | BlockSparse() | Quantized():
            return Dense(densify(op))
        case _:
            return map_children(op, lambda child: known.setdefault(child, as_run(child)))


known: dict[LinearOperator, LinearOperator] = {}


@pytest.mark.parametrize("name", MARKET)
def test_multiplications_are_what_the_algebra_says(name: str) -> None:
    op = bound(MARKET[name](0))
    proto = lowered(op)
    sample = {"x": np.zeros((1, op.shape[1]), np.float32)}
    selections = 5 * 8 if name == "transposed-everything" else 0  # the transpose of a Select is a product, too
    assert OnnxGraph.from_proto(proto).macs(sample) == macs(as_run(op)) + selections
    if all(isinstance(leaf, Dense) for leaf in leaves(op)) and "Scaled" not in str(structure(op)):
        assert macs(as_run(op)) == macs(op)


def three(shared_input: bool = True) -> onnx.ModelProto:
    """Query, key and value of one input, or of three."""
    nodes = [node("MatMul", f"{'x' if shared_input else name} {name}.weight", f"{name}_out") for name in "qkv"]
    inputs = {"x": ("n", 8)} if shared_input else {name: ("n", 8) for name in "qkv"}
    weights = {f"{name}.weight": normal(8, 6, seed=index) for index, name in enumerate("qkv")}
    return model(nodes, inputs, {f"{name}_out": ("n", 6) for name in "qkv"}, weights)


@pytest.mark.parametrize("shared_input", [True, False])
def test_a_shared_right_factor_is_stored_once_and_computed_once_per_input(shared_input: bool) -> None:
    graph = OnnxGraph.from_proto(three(shared_input))
    basis = Dense(torch.randn(3, 8))
    new = [Product(Dense(torch.randn(6, 3)), basis) for _ in range(3)]
    for site, op in zip(graph.linear_sites(), new, strict=True):
        graph.replace(site, op)
    proto = built(graph)
    assert stored_bytes(proto) == nbytes(new) == 4 * (3 * 8 + 3 * 18)
    sample = {value.name: np.zeros((1, 8), np.float32) for value in proto.graph.input}
    pairs = [("x" if shared_input else index, op) for index, op in enumerate(new)]
    assert OnnxGraph.from_proto(proto).macs(sample) == macs(pairs)
    given = {value.name: normal(4, 8, seed=9) for value in proto.graph.input}
    for name, op in zip("qkv", new, strict=True):
        wanted = given["x" if shared_input else name] @ densify(op).T.numpy()
        np.testing.assert_allclose(run(proto, given)[f"{name}_out"], wanted, atol=1e-5)


def test_one_operator_at_two_sites_with_one_input_keeps_both_outputs() -> None:
    graph = OnnxGraph.from_proto(three())
    op = MARKET["low-rank"](0)
    op = Product(Dense(torch.randn(6, 12)), Product(op, Dense(torch.randn(10, 8))))
    for site in graph.linear_sites():
        graph.replace(site, op, torch.full((6,), 2.0) if site.name == "k" else None)
    proto = built(graph)
    assert [value.name for value in proto.graph.output] == ["q_out", "k_out", "v_out"]
    given = {"x": normal(4, 8)}
    found, wanted = run(proto, given), given["x"] @ densify(op).T.numpy()
    for name, extra in (("q", 0), ("k", 2), ("v", 0)):
        np.testing.assert_allclose(found[f"{name}_out"], wanted + extra, rtol=1e-4, atol=1e-4)
    assert sum(each.op_type == "MatMul" for each in proto.graph.node) == 4


def test_views_of_one_tensor_are_told_apart() -> None:
    graph = OnnxGraph.from_proto(three())
    whole = torch.arange(64.0).reshape(8, 8)
    square = Dense(whole[:6, :6])  # the same place and size as its transpose
    pick = Select(torch.arange(6), 8)
    ops = [Product(square, pick), Product(Dense(whole[:6, :6].T), pick), Product(Dense(whole.T[:6, :6]), pick)]
    for site, op in zip(graph.linear_sites(), ops, strict=True):
        graph.replace(site, op)
    given, proto = {"x": normal(4, 8)}, built(graph)
    found = run(proto, given)
    for name, op in zip("qkv", ops, strict=True):
        np.testing.assert_allclose(found[f"{name}_out"], given["x"] @ densify(op).T.numpy(), rtol=1e-4, atol=1e-3)


def test_one_kernel_with_two_strides() -> None:
    nodes = [node("Conv", "x w", "y"), node("Conv", "x w", "z", strides=[2, 2])]
    outputs = {"y": ("n", 6, "h", "w"), "z": ("n", 6, None, None)}
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", 8, "h", "w")}, outputs, {"w": normal(6, 8, 1, 1)}))
    (site,) = graph.linear_sites()
    op = low_rank(torch.randn(6, 2), torch.randn(2, 8))
    graph.replace(site, op)
    given = {"x": normal(2, 8, 5, 5)}
    found = run(built(graph), given)
    wanted = np.moveaxis(np.moveaxis(given["x"], 1, -1) @ densify(op).T.numpy(), -1, 1)
    np.testing.assert_allclose(found["y"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["z"], wanted[:, :, ::2, ::2], atol=1e-5)
