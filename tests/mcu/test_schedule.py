"""Scheduling on graphs of several structures: right results in little memory, found from the graph alone."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lrcompile.backends.c import host
from lrcompile.backends.c.emit import emit
from lrcompile.dataflow.fuse import fuse, refine
from lrcompile.dataflow.interpret import run
from lrcompile.dataflow.schedule import Schedule, plain
from lrcompile.dataflow.search import Search
from lrcompile.dataflow.stage import Formulas
from lrcompile.graphs.onnx.formulas import build
from lrcompile.graphs.onnx.load import from_proto
from tests.mcu.graphs import BertTiny, ConvAttention, Mixer, OddViT
from tests.mcu.nets import Convolutions, Encoder

pytest.importorskip("tvm")
IMAGE = torch.zeros(1, 3, 32, 32)
SMALL = {
    "encoder": (Encoder, (torch.zeros(1, 7, 24),), 0.75),
    "convolutions": (Convolutions, (torch.zeros(1, 3, 16, 16),), 1.0),
    "bert": (
        lambda: BertTiny(words=50, d=32, heads=2, depth=1, tokens=16),
        (torch.zeros(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.int64)),
        0.75,
    ),
    "mixer": (lambda: Mixer(d=16, inner=8, depth=1), (IMAGE,), 0.5),
    "conv-attention": (lambda: ConvAttention(d=12, heads=2, depth=1), (IMAGE,), 0.75),
    "odd-heads": (lambda: OddViT(d=18, heads=3, depth=1, patch=8), (IMAGE,), 0.75),
    "no-class-token": (lambda: OddViT(d=16, heads=2, depth=1, cls=False, patch=8), (IMAGE,), 0.75),
}
"""Name → (builder, sample inputs, largest share of the memory of the plain order that the search may need)."""


@cache
def proto(name: str) -> onnx.ModelProto:
    kind, inputs, _ = SMALL[name]
    torch.manual_seed(0)
    stream = io.BytesIO()
    names = ["ids", "mask"] if len(inputs) == 2 else ["x"]
    torch.onnx.export(
        kind().eval(), inputs, stream, input_names=names, output_names=["y"], opset_version=18, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    return onnx.load_model_from_string(stream.getvalue())


@cache
def formulas(name: str) -> Formulas:
    return refine(fuse(build(from_proto(proto(name)))))


def samples(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {}
    for key, (shape, dtype) in formulas(name).inputs.items():
        made[key] = rng.standard_normal(shape).astype(dtype) if dtype == "float32" else rng.integers(0, 2, shape, dtype)
    return made


def reference(name: str) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(proto(name).SerializeToString()).run(None, samples(name))[0]


@cache
def limited(name: str) -> tuple[Schedule, int]:
    """The schedule under a limit that the plain order does not meet, and the limit."""
    limit = int(SMALL[name][2] * plain(formulas(name)).arena)
    found = Search(formulas(name), limit).run()
    found.stack = 0  # all pieces in the arena
    return found, limit


def computed(schedule: Schedule, folder: Path, name: str) -> np.ndarray:
    program = emit(schedule)
    return host.call(host.build(program, folder), program, samples(name))["y"]


@pytest.mark.parametrize("name", SMALL)
def test_formulas_compute_what_onnx_runtime_computes(name: str):
    np.testing.assert_allclose(run(formulas(name), samples(name))["y"], reference(name), atol=2e-6)


@pytest.mark.parametrize("name", SMALL)
def test_a_plan_under_a_limit_computes_the_same(name: str, tmp_path: Path):
    (schedule, limit), whole = limited(name), plain(formulas(name))
    np.testing.assert_allclose(computed(whole, tmp_path / "plain", name), reference(name), atol=2e-6)
    np.testing.assert_allclose(computed(schedule, tmp_path / "small", name), reference(name), atol=2e-6)
    assert schedule.bound <= schedule.arena
    assert schedule.arena <= limit


def test_buffers_that_live_at_once_do_not_overlap():
    slots = list(limited("encoder")[0].slots.values())
    for at, a in enumerate(slots):
        for b in slots[:at]:
            if a.first <= b.last and b.first <= a.last:
                assert a.offset >= b.offset + b.nbytes or b.offset >= a.offset + a.nbytes, (a, b)


def test_more_memory_never_costs_more_work():
    least, _ = limited("encoder")
    room = plain(formulas("encoder")).arena * 2
    assert Search(formulas("encoder"), room).run().work <= least.work


def test_a_joint_projection_is_separated_and_only_what_is_read_is_computed():
    shapes = {name: stage.shape for name, stage in formulas("odd-heads").stages.items()}
    assert sum(shape == (1, 17, 18) for shape in shapes.values()) < 8
    assert any(shape == (1, 1, 72) for shape in shapes.values())  # the last MLP, for the class token alone
