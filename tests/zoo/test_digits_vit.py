"""The shipped digits ViT is what its page says: sizes, split, accuracy, and one model in two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lrcompile import zoo
from lrcompile.zoo import digits_vit
from lrcompile.zoo.digits_vit import data

PARTS = ("calibration", "evaluation", "test")


@pytest.fixture(scope="module")
def model() -> zoo.ZooModel:
    return zoo.load("digits_vit")


@pytest.fixture(scope="module")
def runs(model: zoo.ZooModel) -> dict[str, zoo.Run]:
    return {"torch": zoo.module_run(model.module(), model.outputs), "onnx": zoo.onnx_run(zoo.exported("digits_vit"))}


def test_the_metric_notices_wrong_answers(model: zoo.ZooModel, runs: dict[str, zoo.Run]):
    worse = model.metric(lambda batch: {"logits": np.roll(runs["onnx"](batch)["logits"], 1, axis=1)})
    assert worse["accuracy"] < 0.2
    assert worse["cross_entropy"] > 1


def test_everything_shipped_stays_under_one_megabyte():
    files = [path for path in digits_vit.FOLDER.iterdir() if path.is_file()]
    assert {"model.safetensors", "model.onnx", "digits.npz"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 1024**2


def test_parts_share_no_image():
    rows = {part: {image.tobytes() for image in data.digits(part)[0]} for part in PARTS}
    assert {part: len(row) for part, row in rows.items()} == {"calibration": 256, "evaluation": 180, "test": 359}
    for first, second in (("calibration", "evaluation"), ("calibration", "test"), ("evaluation", "test")):
        assert rows[first].isdisjoint(rows[second])


def test_the_split_is_disjoint_complete_and_stratified():
    labels = np.repeat(np.arange(10), 50)
    parts = data.split(labels)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(500))
    for name, size in (("train", 35), ("validation", 5), ("test", 10)):
        assert np.bincount(labels[parts[name]]).tolist() == [size] * 10
    assert not np.array_equal(parts["test"], data.split(labels, seed=1)["test"])


def test_the_shipped_digits_are_the_split_of_the_source():
    pytest.importorskip("sklearn", reason="scikit-learn carries the source")
    images, labels = data.source()
    parts = data.split(labels)
    for part, index in zip(PARTS, (parts["train"][:256], parts["validation"], parts["test"]), strict=True):
        found, answers = data.digits(part)
        assert np.array_equal(found, data.scaled(images[index]))
        assert np.array_equal(answers, labels[index])


def test_attention_projections_are_separate_linears(model: zoo.ZooModel):
    linears = {name for name, module in model.module().named_modules() if isinstance(module, torch.nn.Linear)}
    block = {f"attention.{p}" for p in "qkvo"} | {"up", "down"}
    assert linears == {f"blocks.{i}.{name}" for i in range(2) for name in block} | {"head"}


def test_batches_are_keyed_by_the_graph_input(model: zoo.ZooModel, tmp_path: Path):
    calibration, evaluation = model.calibration(), model.evaluation()
    assert {key for batch in (*calibration, *evaluation) for key in batch} == {"images"}
    assert sum(len(batch["images"]) for batch in evaluation) == 180
    written = digits_vit.write_npz(tmp_path)
    for path, batches in zip(written, (calibration, evaluation), strict=True):
        with np.load(path) as file:
            assert np.array_equal(file["images"], np.concatenate([batch["images"] for batch in batches]))


def test_a_fresh_export_equals_the_shipped_graph(model: zoo.ZooModel, tmp_path: Path):
    model.export(tmp_path / "again.onnx")
    fresh, shipped = onnx.load(tmp_path / "again.onnx").graph, onnx.load(digits_vit.ONNX).graph
    assert [node.op_type for node in fresh.node] == [node.op_type for node in shipped.node]
    assert [t.raw_data for t in fresh.initializer] == [t.raw_data for t in shipped.initializer]


@pytest.fixture
def one_thread():
    """Matrices this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_is_deterministic_and_learns(one_thread: None):
    from lrcompile.zoo.digits_vit import train
    from lrcompile.zoo.digits_vit.network import Config

    images, labels = data.digits("calibration")
    pair = torch.from_numpy(images[:64]), torch.from_numpy(labels[:64])
    recipe, config = train.Recipe(epochs=120, batch=32, rate=1e-2, average=0.8), Config(width=16, depth=1, mlp=32)
    first, again = (train.train(*pair, recipe, config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    untrained = train.train(*pair, train.Recipe(epochs=1, rate=0.0), config)
    assert train.accuracy(first, *pair)[1] < 0.7 * train.accuracy(untrained, *pair)[1]
