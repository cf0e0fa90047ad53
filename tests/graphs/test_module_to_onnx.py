"""An optimised module through ``torch.onnx.export``: standard operators, names kept, sites found again as factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import Budget, Options, Settings
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.structured import Structured, StructuredLinear
from lrcompile.linop import densify, parameters
from lrcompile.zoo.export import export_onnx

OPTIONS = Options(max_drift=10.0, latency=False, settings=Settings(align=4, probe_samples=4))


class Mixer(nn.Module):
    """A convolution over tokens, a layer used twice, a layer without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(24, 32, 3, padding=1)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.mT).mT
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x)


def batch(samples: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, tokens, 24)).astype(np.float32)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The optimised module, and the file that it was exported to."""
    torch.manual_seed(0)
    data = [batch(4, 6, seed) for seed in range(4)]
    result: Any = lrcompile.optimize(
        Mixer().eval(), Budget(keep=0.6), calibration=data, evaluation=data[:1], options=OPTIONS
    )
    module, path = result.built.module.eval(), tmp_path_factory.mktemp("export") / "mixer.onnx"
    example = {name: torch.from_numpy(value) for name, value in data[0].items()}
    export_onnx(module, example, path, outputs=("y",), axes={"x": {0: "batch", 1: "tokens"}})
    return module, path


def structured(module: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in module.named_modules() if isinstance(each, Structured)}


def test_it_computes_the_same_at_other_sizes(made: tuple[Any, Path]):
    module, path = made
    assert len(structured(module)) >= 3
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for samples, tokens in ((1, 9), (5, 3)):
        feeds = batch(samples, tokens, 7)
        with torch.no_grad():
            wanted = module(torch.from_numpy(feeds["x"])).numpy()
        (found,) = session.run(None, feeds)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_it_holds_standard_operators_only(made: tuple[Any, Path]):
    model = onnx.load(made[1])
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert {each.domain for each in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}


def test_sites_come_back_as_factors_under_their_names(made: tuple[Any, Path]):
    module, path = made
    graph = OnnxGraph.load(path)
    found = {site.name: site for site in graph.linear_sites()}
    linear = {name: each for name, each in structured(module).items() if isinstance(each, StructuredLinear)}
    assert len(linear) >= 2
    for name, each in linear.items():
        (site,) = [site for other, site in found.items() if other == name or other.startswith(f"{name}.")]
        assert site.shape == each.operator.shape and not site.frozen
        assert parameters([site.operator]) == parameters([each.operator])
        assert torch.allclose(densify(site.operator), densify(each.operator), rtol=1e-4, atol=1e-5)
