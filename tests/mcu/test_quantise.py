"""Quantised models: the Q/DQ file is sound, and integers agree with ONNX Runtime's run of it."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.quantise import is_quantised, quantise
from lrcompile.zoo import digits_vit
from tests.mcu.nets import Convolutions, Encoder, made
from tests.mcu.quantised import operators, outputs, runtime, unit_differences

NETS = {"encoder": (Encoder, (1, 7, 24)), "convolutions": (Convolutions, (1, 3, 16, 16))}


@cache
def float_model(name: str) -> ir.Model:
    kind, shape = NETS[name]
    return OnnxGraph.from_proto(made(kind, *shape)).model


def samples(name: str, count: int = 12, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(NETS[name][1]).astype(np.float32)} for _ in range(count)]


@cache
def quantised(name: str) -> ir.Model:
    return quantise(float_model(name), samples(name))


@pytest.mark.parametrize("name", NETS)
def test_the_file_is_sound_and_small(name: str):
    proto = ir.to_proto(quantised(name))
    onnx.checker.check_model(proto, full_check=True)
    assert is_quantised(quantised(name))
    assert not is_quantised(float_model(name))
    weights = [each for each in proto.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(each.dims)) for each in weights) <= 120  # biases, gains and scales


@pytest.mark.parametrize("name", NETS)
def test_rounding_costs_little(name: str):
    for sample in samples(name, 4, seed=1):
        real, rounded = runtime(float_model(name), sample)["y"], runtime(quantised(name), sample)["y"]
        assert np.linalg.norm(real - rounded) <= 0.1 * np.linalg.norm(real)


@pytest.mark.parametrize("name", NETS)
def test_every_unit_is_within_one_of_onnx_runtime(name: str):
    for sample in samples(name, 3, seed=2):
        differences = unit_differences(quantised(name), sample)
        assert len(differences) > 8
        assert max(value for unit, value in differences.items() if unit != "y") <= 1
        assert differences["y"] < 1e-4  # the bias is rounded to the unit of the sum


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_left_in_float(name: str):
    found = operators(quantised(name), samples(name, 1)[0])
    assert found.count("QuantizeLinear") == 1  # of the input
    assert "DequantizeLinear" not in found
    kinds = {"encoder": {"*Linear", "*Product", "*Softmax", "*LayerNorm", "*Lookup", "*Add", "*Mean"}}
    assert kinds.get(name, {"*Convolution", "*Linear", "*Multiply", "*Lookup", "*Add", "*Mean"}) <= set(found)


def test_the_trained_model_keeps_its_accuracy():
    images, labels = digits_vit.digits("test")
    model = OnnxGraph.load(digits_vit.ONNX).model
    rounded = quantise(model, digits_vit.calibration())
    whole = runtime(rounded, {"images": images})["logits"].argmax(-1)
    exact = runtime(model, {"images": images})["logits"].argmax(-1)
    ours = np.concatenate([outputs(rounded, {"images": each[None]})["logits"] for each in images[:40]]).argmax(-1)
    assert np.mean(exact == labels) - np.mean(whole == labels) <= 0.01
    assert np.mean(ours == whole[:40]) >= 0.97


def test_values_without_a_type_are_rounded_too():
    """As the nodes that a rewrite puts in leave them."""
    model = float_model("encoder").clone()
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = None
    rounded = quantise(model, samples("encoder"))
    assert operators(rounded, samples("encoder", 1)[0]) == operators(quantised("encoder"), samples("encoder", 1)[0])


def test_without_samples_it_is_refused():
    with pytest.raises(InvalidInputError, match=r"no calibration samples.*--calib"):
        quantise(float_model("encoder"), [])


def test_samples_that_are_not_numbers_are_refused():
    with pytest.raises(InvalidInputError, match="not a number"):
        quantise(float_model("encoder"), [{"x": np.full((1, 7, 24), np.nan, np.float32)}])


def test_a_model_without_products_is_refused():
    x = onnx.helper.make_tensor_value_info("x", 1, [2])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [onnx.helper.make_tensor_value_info("y", 1, [2])]
    )
    model = OnnxGraph.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])).model
    with pytest.raises(UnsupportedError, match="nothing to quantise"):
        quantise(model, [{"x": np.zeros(2, np.float32)}])
