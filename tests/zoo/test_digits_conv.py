"""The shipped convolutional network is what its page says: sizes, accuracy, and one model in two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lrcompile import Budget, Options, optimize, zoo
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings
from lrcompile.zoo import digits_conv
from lrcompile.zoo.digits_vit.data import digits
from lrcompile.zoo.digits_vit.train import accuracy


@pytest.fixture(scope="module")
def model() -> zoo.ZooModel:
    return zoo.load("digits_conv")


def test_the_page_counts_the_parameters(model: zoo.ZooModel):
    module = model.module()
    pointwise = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    total, inside = sum(p.numel() for p in module.parameters()), sum(m.weight.numel() for m in pointwise)
    assert f"{total:,} parameters, {inside:,} of them in the seven 1×1 convolutions" in model.documentation
    assert len(pointwise) == 7


def test_the_file_has_folded_norms_and_rewritable_pointwise_convolutions():
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(digits_conv.ONNX).graph.node}
    sites = OnnxGraph.load(digits_conv.ONNX).linear_sites()
    shapes = [site.shape for site in sites if not site.frozen]
    block = [(256, 64), (64, 256)]
    assert shapes == [(64, 9), *block * 3, (256, 64), (10, 256)]
    assert [site.shape for site in sites if site.frozen] == [(256, 2304)] * 3  # depthwise


def test_everything_shipped_stays_near_one_megabyte():
    assert sum(path.stat().st_size for path in digits_conv.FOLDER.iterdir() if path.is_file()) < 1.1 * 1024**2


def test_a_fresh_export_equals_the_shipped_graph(model: zoo.ZooModel, tmp_path: Path):
    model.export(tmp_path / "again.onnx")
    fresh, shipped = onnx.load(tmp_path / "again.onnx").graph, onnx.load(digits_conv.ONNX).graph
    assert [node.op_type for node in fresh.node] == [node.op_type for node in shipped.node]
    for again, kept in zip(fresh.initializer, shipped.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(again), onnx.numpy_helper.to_array(kept), rtol=1e-6)


def _pointwise(path: Path) -> int:
    """Number of 1x1 convolutions in the file."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: tuple(tensor.dims[2:]) for tensor in graph.initializer}
    return sum(node.op_type == "Conv" and sizes[node.input[1]] == (1, 1) for node in graph.node)


def test_pointwise_convolutions_become_pairs_that_keep_the_answers(model: zoo.ZooModel, tmp_path: Path):
    out, settings = tmp_path / "smaller.onnx", Settings(cache=tmp_path)
    data = {"calibration": model.calibration(), "evaluation": model.evaluation()}
    optimize(digits_conv.ONNX, Budget(keep=0.6), options=Options(latency=False, settings=settings), out=out, **data)
    assert _pointwise(out) >= _pointwise(digits_conv.ONNX) + 4
    assert out.stat().st_size < 0.7 * digits_conv.ONNX.stat().st_size
    assert model.metric(zoo.onnx_run(out))["accuracy"] >= 0.97


@pytest.fixture
def one_thread():
    """Images this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_is_deterministic_and_learns(one_thread: None):
    from lrcompile.zoo.digits_conv import train
    from lrcompile.zoo.digits_conv.network import Config

    images, labels = digits("calibration")
    pair = torch.from_numpy(images[:64]), torch.from_numpy(labels[:64])
    config = Config(width=8, strides=(2, 1), last=32)
    recipe = train.Recipe(epochs=60, batch=32, rate=1e-2)
    first, again = (train.train(*pair, recipe, config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    untrained = train.train(*pair, train.Recipe(epochs=1, rate=0.0), config)
    assert accuracy(first, *pair)[1] < 0.5 * accuracy(untrained, *pair)[1]
