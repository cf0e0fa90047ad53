"""What holds for every shipped classifier of digits: stated accuracy, one model in two files, clean files."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np
import onnx
import pytest

from lrcompile import zoo
from lrcompile.zoo import digits_conv, digits_vit
from lrcompile.zoo.digits_vit.data import digits

LEAST = {"digits_vit": 0.975, "digits_conv": 0.97}
"""Accuracy on the test part."""
FILES: dict[str, ModuleType] = {"digits_vit": digits_vit, "digits_conv": digits_conv}


@pytest.fixture(scope="module", params=list(LEAST))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> zoo.ZooModel:
    return zoo.load(name)


@pytest.fixture(scope="module")
def runs(name: str, model: zoo.ZooModel) -> dict[str, zoo.Run]:
    return {"torch": zoo.module_run(model.module(), model.outputs), "onnx": zoo.onnx_run(zoo.exported(name))}


def test_both_files_have_the_stated_accuracy(name: str, model: zoo.ZooModel, runs: dict[str, zoo.Run]):
    stated = re.search(r"test \| 359 \| ([\d.]+) %", model.documentation)
    assert stated
    scores = {kind: model.metric(run) for kind, run in runs.items()}
    assert scores["torch"]["accuracy"] == scores["onnx"]["accuracy"]
    assert scores["torch"]["accuracy"] >= LEAST[name]
    assert f"{100 * scores['onnx']['accuracy']:.2f}" == stated[1]
    assert scores["torch"]["cross_entropy"] == pytest.approx(scores["onnx"]["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_torch_and_onnx_agree_at_every_batch(batch: int, runs: dict[str, zoo.Run]):
    images = {"images": digits("test")[0][:batch]}
    torch_logits, onnx_logits = runs["torch"](images)["logits"], runs["onnx"](images)["logits"]
    assert onnx_logits.shape == (batch, 10)
    np.testing.assert_allclose(torch_logits, onnx_logits, atol=1e-4)


def test_the_onnx_file_carries_no_trace_of_a_machine_and_one_dynamic_axis(name: str):
    content = FILES[name].ONNX.read_bytes()
    assert b".py" not in content
    graph = onnx.load(FILES[name].ONNX).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"images": ["batch", 1, 8, 8], "logits": ["batch", 10]}
