"""ONNX to exported programs: the same numbers as ONNX Runtime at sizes of all kinds, the same sites, names kept."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

import lrcompile
from lrcompile import Budget, Options, Settings, to_program, zoo
from lrcompile.errors import GateError, InvalidInputError, LrcompileWarning, UnsupportedError, UsageError
from lrcompile.frontend import open_graph
from lrcompile.graphs.onnx.torched.table import RULES
from lrcompile.linop import Product, densify
from tests.e2e.running import images
from tests.graphs.test_gradients import cases

OPTIONS = Options(max_drift=10.0, latency=False, settings=Settings(align=4, probe_samples=4))


class Attention(nn.Module):
    """One causal layer over embedded tokens, written so that an exporter computes shapes in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 12), nn.Embedding(32, 12)
        self.query, self.key, self.value = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 5, bias=False)

    def heads(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x).view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.words(ids) + self.places(torch.arange(length))[None]
        q, k, v = (self.heads(x, layer) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.out(mixed.expand(batch, length, 12))[:, : length // 2]


class Convolutions(nn.Module):
    """Padding, steps, a norm, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.norm, self.third, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = nn.functional.max_pool2d(self.third(torch.sigmoid(self.norm(x))), 2)
        return self.head(x.mean((2, 3)))


def written(module: nn.Module, example: Tensor, axes: dict[int, str], path: Path) -> Path:
    """What the older exporter of torch writes: nameless transposed weights, shapes computed by nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (example,), str(path), input_names=["x"], output_names=["y"],
            dynamic_axes={"x": axes}, dynamo=False,
        )  # fmt: skip
    return path


def run(program: ExportedProgram, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = program.module()(*[torch.from_numpy(array) for array in feeds.values()])
    return {name: value.numpy() for name, value in found.items()}


def agree(program: ExportedProgram, path: Any, feeds: dict[str, np.ndarray]) -> None:
    wanted, found = open_graph(path).run(feeds), run(program, feeds)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4)


def sites(model: Any) -> list[tuple[Any, ...]]:
    return [(site.name, site.shape, len(site.uses), bool(site.frozen)) for site in open_graph(model).linear_sites()]


@pytest.fixture(scope="module")
def digits() -> Path:
    return zoo.exported("digits_vit")


@functools.cache
def program_of(path: Path) -> ExportedProgram:
    return to_program(path)


def test_the_vit_keeps_numbers_names_and_sites(digits: Path):
    program = program_of(digits)
    model = zoo.load("digits_vit")
    for samples in (1, 2, 5):
        agree(program, digits, images(model, samples))
    assert [(spec.name, spec.shape[1:]) for spec in open_graph(program).input_specs] == [("images", (1, 8, 8))]
    assert sites(program) == sites(digits)
    weights = {name for name, _ in model.module().named_parameters()}
    assert {name for name, _ in program.named_parameters()} >= {name for name in weights if name.endswith("weight")}


def test_both_are_compressed_alike(digits: Path):
    """The same sites are chosen, and the results drift alike."""
    model = zoo.load("digits_vit")
    found = []
    for each in (digits, program_of(digits)):
        result = lrcompile.optimize(
            each, Budget(keep=0.5), calibration=model.calibration(), evaluation=model.evaluation()[:1], options=OPTIONS
        )
        found.append((sorted(result.graph.replacements), result.report.drift.relative_l2))  # type: ignore[union-attr]
        if each is digits:
            optimised_is_carried_over(result)
    assert found[0][0] == found[1][0] and len(found[0][0]) >= 8
    assert found[0][1] == pytest.approx(found[1][1], rel=0.2)


def optimised_is_carried_over(result: Any) -> None:
    """Factors stay factors, from the model in memory and from the graph alike."""
    program, again = to_program(result.model), to_program(result.graph)
    assert list(program.state_dict) == list(again.state_dict)
    agree(program, result.model, images(zoo.load("digits_vit"), 3))
    assert sites(program) == sites(result.model)
    products = [site for site in open_graph(program).linear_sites() if isinstance(site.operator, Product)]
    assert len(products) >= 4
    for site in products:
        assert {f"{site.name}.factors.left.weight", f"{site.name}.factors.right.weight"} <= program.state_dict.keys()
    stored = sum(each.numel() for each in program.state_dict.values() if each.is_floating_point())
    assert stored <= result.built.parameters


def test_shapes_that_nodes_compute_stay_free(tmp_path: Path):
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 7))
    path = written(Attention(), ids, {0: "batch", 1: "length"}, tmp_path / "attention.onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"Shape", "Concat", "ConstantOfShape", "Range", "Expand", "Slice"} <= kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error", LrcompileWarning)
        program = to_program(path, {"x": ids.numpy()})
    for samples, length in ((3, 7), (1, 9), (5, 5), (4, 4), (2, 32)):
        agree(program, path, {"x": np.random.default_rng(0).integers(0, 20, (samples, length))})
    assert sites(program) == sites(path)
    assert {"query.weight", "query.bias", "out.weight", "words.weight"} <= {n for n, _ in program.named_parameters()}


def test_convolutions_keep_their_windows(tmp_path: Path):
    torch.manual_seed(0)
    axes = {0: "batch", 2: "height", 3: "width"}
    path = written(Convolutions(), torch.randn(2, 3, 16, 14), axes, tmp_path / "net.onnx")
    program = to_program(path, {"x": np.ones((1, 3, 16, 14), np.float32)})
    for shape in ((1, 3, 16, 14), (3, 3, 16, 14), (2, 3, 21, 10)):
        agree(program, path, {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)})
    assert sites(program) == sites(path)
    theirs = {site.name: site for site in open_graph(path).linear_sites()}
    for site in open_graph(program).linear_sites():
        assert site.window == theirs[site.name].window
        torch.testing.assert_close(densify(site.operator), densify(theirs[site.name].operator))


def test_a_saved_program_is_read_again(tmp_path: Path, digits: Path):
    torch.export.save(program_of(digits), tmp_path / "digits.pt2")
    assert sites(tmp_path / "digits.pt2") == sites(digits)


def model_of(nodes: list[Any], shape: list[Any], out: list[Any], held: dict[str, np.ndarray], kind: int = 1) -> Any:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", kind, out)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_program_owns_its_weights():
    weight = np.eye(4, dtype=np.float32)
    proto = model_of([helper.make_node("MatMul", ["x", "up.weight"], ["y"])], ["n", 4], ["n", 4], {"up.weight": weight})
    graph = open_graph(proto)
    program = to_program(graph)
    with torch.no_grad():
        program.state_dict["up.weight"].zero_()
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(graph.run({"x": x})["y"], x)


def test_a_size_that_the_model_cannot_vary_is_fixed_and_said():
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["flat"]), helper.make_node("Relu", ["flat"], ["y"])]
    proto = model_of(nodes, ["n", 4], [2, 6], {"shape": np.array([2, 6])})
    with pytest.warns(LrcompileWarning, match="fixes axis 0 of x at 3"):
        program = to_program(proto, {"x": np.zeros((3, 4), np.float32)})
    agree(program, proto, {"x": np.arange(12, dtype=np.float32).reshape(3, 4) - 5})


def test_an_operator_without_counterpart_is_named_with_its_node():
    proto = model_of([helper.make_node("Det", ["x"], ["y"], name="middle")], ["n", 3, 3], ["n"], {})
    with pytest.raises(UnsupportedError, match="middle: operator Det"):
        to_program(proto, {"x": np.zeros((2, 3, 3), np.float32)})


def test_a_size_that_is_data_stays_data():
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["size"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["size", "zero"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["y"], name="filling"),
    ]
    proto = model_of(nodes, ["n"], ["m"], {"zero": np.array([0])})
    program = to_program(proto, {"x": np.array([1, 2, 3], np.float32)})
    agree(program, proto, {"x": np.array([4, 7, 5, 0, 2], np.float32)})


def test_half_precision_is_refused():
    half = np.ones((4, 4), np.float16)
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 4], ["n", 4], {"w": half}, 10)
    with pytest.raises(UnsupportedError, match="16-bit"):
        to_program(proto)


def test_a_wrong_program_is_never_given_out(monkeypatch: pytest.MonkeyPatch):
    proto = model_of([helper.make_node("Relu", ["x"], ["y"])], ["n", 4], ["n", 4], {})
    monkeypatch.setitem(RULES, ("", "Relu"), lambda node, x: x.abs())
    with pytest.raises(GateError, match="computes something else"):
        to_program(proto, {"x": -np.ones((3, 4), np.float32)})


def test_conformance_cases_are_carried_over_or_refused():
    """One in eighteen of the suite; the comparison with ONNX Runtime never fails."""
    carried = 0
    for case in cases()[::18]:
        feeds = dict(zip([value.name for value in case.model.graph.input], case.data_sets[0][0], strict=False))
        if not feeds or not all(isinstance(array, np.ndarray) for array in feeds.values()):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                to_program(case.model, feeds)
            carried += 1
        except (UnsupportedError, InvalidInputError):
            pass
    assert carried >= 30


def test_a_single_number_is_an_input():
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    proto = model_of(nodes, [4], [], {})
    agree(to_program(proto, {"x": np.ones(4, np.float32)}), proto, {"x": np.arange(4, dtype=np.float32)})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"x": np.ones((2, 5), np.float32)}, "has shape"),
        ({"x": np.ones((2, 4), np.complex64)}, "complex64"),
        ({"z": np.ones((2, 4), np.float32)}, "no input"),
        ({}, "lacks"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(sample: dict[str, np.ndarray], message: str):
    proto = model_of([helper.make_node("Relu", ["x"], ["y"])], ["n", 4], ["n", 4], {})
    with pytest.raises(InvalidInputError, match=message):
        to_program(proto, sample)


def test_expressions_of_several_weights_keep_their_names():
    """A scale behind a weight, and an adapter beside one."""
    held = {
        name: np.random.default_rng(index).standard_normal(shape).astype(np.float32)
        for index, (name, shape) in enumerate(
            {"b.fc.weight": (4, 4), "b.scale": (4,), "up.weight": (4, 4), "up.lora_A.weight": (4, 2),
             "up.lora_B.weight": (2, 4)}.items()
        )
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "b.fc.weight"], ["h"]),
        helper.make_node("Mul", ["h", "b.scale"], ["s"]),
        helper.make_node("Tanh", ["s"], ["t"]),
        helper.make_node("MatMul", ["t", "up.weight"], ["main"]),
        helper.make_node("MatMul", ["t", "up.lora_A.weight"], ["low"]),
        helper.make_node("MatMul", ["low", "up.lora_B.weight"], ["side"]),
        helper.make_node("Add", ["main", "side"], ["y"]),
    ]
    proto = model_of(nodes, ["n", 4], ["n", 4], held)
    program = to_program(proto, {"x": np.ones((3, 4), np.float32)})
    assert {"up.weight", "up.lora_A.weight", "up.lora_B.weight"} <= program.state_dict.keys()
    assert sites(program) == sites(proto)


def test_odd_names_are_made_fit():
    """What Python or a ``.pt2`` file cannot hold; a tensor named like the module of another one."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["input.1", "onnx::MatMul_7"], ["h"], name="/block/fc/MatMul"),
            helper.make_node("Add", ["h", "w"], ["s"]),
            helper.make_node("Add", ["s", "w.b c"], ["training"]),
        ],
        "g",
        [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("input.1", "lambda")],
        [helper.make_tensor_value_info("training", 1, ["n", 4])],
        [
            numpy_helper.from_array(np.full((4, 4), 0.5, np.float32), "onnx::MatMul_7"),
            numpy_helper.from_array(np.arange(4, dtype=np.float32), "w"),
            numpy_helper.from_array(np.arange(4, dtype=np.float32), "w.b c"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.ones((3, 4), np.float32)
    program = to_program(proto, {"input.1": x, "lambda": x})
    agree(program, proto, {"input.1": x * 2, "lambda": x})
    assert [name for name, _ in program.named_parameters()] == ["block.fc.weight", "w.weight", "w.b_c"]
    assert [spec.name for spec in open_graph(program).input_specs] == ["input_1", "lambda_"]
    assert sites(program)[0][0] == sites(proto)[0][0] == "block.fc"


def test_a_size_that_is_a_sum_of_others_stays_free():
    graph = helper.make_graph(
        [helper.make_node("Concat", ["past", "x"], ["all"], axis=1), helper.make_node("Mul", ["all", "mask"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info(name, 1, ["n", size])
            for name, size in {"x": "new", "past": "old", "mask": "old + new"}.items()
        ],
        [helper.make_tensor_value_info("y", 1, ["n", "old + new"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def feeds(samples: int, new: int, old: int) -> dict[str, np.ndarray]:
        sizes = {"x": new, "past": old, "mask": old + new}
        return {name: np.random.default_rng(0).random((samples, size), np.float32) for name, size in sizes.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("error", LrcompileWarning)
        program = to_program(proto, feeds(2, 1, 4))
    for sizes in ((2, 1, 4), (3, 3, 3), (1, 2, 9)):
        agree(program, proto, feeds(*sizes))


def test_only_onnx_models_are_taken():
    with pytest.raises(UsageError, match="no ONNX model"):
        to_program(nn.Linear(2, 2))
