"""Samples from every container, and every way in which they do not fit the model."""

from __future__ import annotations

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from lrcompile.data import Batches, InputSpec, castable
from lrcompile.data_sources import NpzPart
from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError

IDS = np.arange(40, dtype=np.int64).reshape(10, 4)
MASK = np.ones((10, 4), np.float32)
SPECS = [InputSpec("ids", np.dtype("int64"), ("n", 4)), InputSpec("mask", np.dtype("float32"), ("n", "t"))]
ONE = [InputSpec("x", np.dtype("float32"), ("n", 3))]
X = np.arange(30, dtype=np.float32).reshape(10, 3)


class Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self) -> None:
        self.rows = iter(range(0, 10, 2))

    def get_next(self) -> dict[str, np.ndarray] | None:
        start = next(self.rows, None)
        return None if start is None else {"ids": IDS[start : start + 2], "mask": MASK[start : start + 2]}


def sources(folder: Path) -> dict[str, object]:
    np.savez(folder / "plain.npz", ids=IDS, mask=MASK)
    np.savez_compressed(folder / "packed.npz", ids=IDS, mask=MASK)
    (folder / "many").mkdir()
    for start in range(0, 10, 3):
        np.savez(folder / "many" / f"{start}.npz", ids=IDS[start : start + 3], mask=MASK[start : start + 3])
    return {
        "plain": folder / "plain.npz",
        "packed": str(folder / "packed.npz"),
        "folder": folder / "many",
        "mapping": {"ids": IDS, "mask": MASK},
        "dicts": [{"ids": IDS[:7], "mask": MASK[:7]}, {"ids": IDS[7:], "mask": MASK[7:]}],
        "generator": ({"ids": row[None], "mask": MASK[:1]} for row in IDS),
        "tuples": [(IDS[:5], MASK[:5]), (IDS[5:], MASK[5:])],
        "tensors": [{"ids": torch.from_numpy(IDS), "mask": torch.from_numpy(MASK).requires_grad_()}],
        "bfloat16": [(torch.from_numpy(IDS), torch.from_numpy(MASK).bfloat16())],
        "reader": Reader(),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "packed",
        "folder",
        "mapping",
        "dicts",
        "generator",
        "tuples",
        "tensors",
        "bfloat16",
        "reader",
    ],
)
@pytest.mark.parametrize("batch", [1, 4, 10, 64])
def test_every_source_yields_the_same(tmp_path, kind, batch):
    found = Batches(sources(tmp_path)[kind], batch=batch).check(SPECS)
    assert found.samples == 10
    for _ in range(2):
        chunks = list(found)
        assert [len(chunk["ids"]) for chunk in chunks] == [min(batch, 10 - at) for at in range(0, 10, batch)]
        assert all(list(chunk) == ["ids", "mask"] for chunk in chunks)
        assert np.array_equal(np.concatenate([chunk["ids"] for chunk in chunks]), IDS)
        assert np.array_equal(np.concatenate([chunk["mask"] for chunk in chunks]), MASK)
        assert all(chunk["mask"].dtype == np.float32 for chunk in chunks)


def test_the_digest_depends_on_the_samples_only(tmp_path):
    found = sources(tmp_path)
    digests = {Batches(found[kind]).sha256 for kind in ("plain", "packed", "folder", "mapping", "dicts", "reader")}
    assert len(digests) == 1
    changed = {"ids": IDS + (IDS == 39), "mask": MASK}
    others = [Batches(changed), Batches({"ids": IDS[:9], "mask": MASK[:9]}), Batches({"idz": IDS, "mask": MASK})]
    assert len(digests | {other.sha256 for other in others}) == 4


def test_npy_for_one_input(tmp_path):
    np.save(tmp_path / "x.npy", X)
    chunks = list(Batches(tmp_path / "x.npy", batch=4).check(ONE))
    assert [chunk["x"].shape for chunk in chunks] == [(4, 3), (4, 3), (2, 3)]
    with pytest.raises(InvalidInputError, match=r"1 unnamed array\(s\) for 2 inputs.*ids, mask"):
        Batches(tmp_path / "x.npy").check(SPECS)


def test_arrays_are_views_and_npz_members_are_never_read_whole(tmp_path, monkeypatch):
    assert all(np.shares_memory(chunk["x"], X) for chunk in Batches(X, batch=4).check(ONE))
    np.savez_compressed(tmp_path / "x.npz", x=X)
    rows = []
    real = NpzPart._read
    monkeypatch.setattr(NpzPart, "_read", lambda self, s, name, n: rows.append(n) or real(self, s, name, n))
    assert len(list(Batches(tmp_path / "x.npz", batch=4).check(ONE))) == 3
    assert max(rows) == 4


def test_sequences_of_different_lengths_are_not_joined():
    batches = [np.ones((3, 5), np.float32), np.ones((3, 5), np.float32), np.ones((2, 7), np.float32)]
    found = Batches(batches, batch=4).check([InputSpec("x", None, ("n", "t"))])
    assert [chunk["x"].shape for chunk in found] == [(4, 5), (2, 5), (2, 7)]


# -- splitting -----------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "held"), [(2, 1), (4, 1), (5, 1), (9, 1), (10, 2), (100, 20)])
def test_the_last_fifth_is_held_out(samples, held):
    x = np.arange(samples * 3, dtype=np.float32).reshape(samples, 3)
    calibration, evaluation = Batches(x, batch=4).check(ONE).split()
    assert (calibration.samples, evaluation.samples) == (samples - held, held)
    joined = np.concatenate([chunk["x"] for part in (calibration, evaluation) for chunk in part])
    assert np.array_equal(joined, x)
    assert calibration.sha256 != evaluation.sha256
    assert calibration.sha256 == Batches({"0": x[: samples - held]}).sha256


def test_splitting_across_files(tmp_path):
    calibration, evaluation = Batches(sources(tmp_path)["folder"], batch=4).check(SPECS).split(0.5)
    assert [chunk["ids"][:, 0].tolist() for chunk in calibration] == [[0, 4, 8, 12], [16]]
    assert [chunk["ids"][:, 0].tolist() for chunk in evaluation] == [[20, 24, 28, 32], [36]]


def test_too_few_samples_to_split():
    with pytest.raises(UsageError, match="too few") as caught:
        Batches(X[:1]).split()
    assert caught.value.code == 2
    with pytest.raises(UsageError, match="too few"):
        Batches(X).split(at_least=10)
    with pytest.raises(UsageError, match="between 0 and 1"):
        Batches(X).split(1.0)
    with pytest.raises(UsageError, match="at least 1"):
        Batches(X, batch=0)


def fixed(size: int) -> list[InputSpec]:
    return [InputSpec("x", np.dtype("float32"), (size, 3))]


def test_a_fixed_batch_drops_the_remainder_with_a_note():
    found = Batches([X[:3], X[3:]], batch=64).check(fixed(4))
    assert [chunk["x"].shape for chunk in found] == [(4, 3), (4, 3)]
    assert found.samples == 8
    assert found.notes == ["dropped 2 of 10 samples: the model's batch is fixed at 4"]
    calibration, evaluation = found.split()
    assert (calibration.samples, evaluation.samples) == (4, 4)
    assert np.array_equal(next(iter(evaluation))["x"], X[4:8])
    assert Batches(X).check(fixed(5)).notes == []
    with pytest.raises(UsageError, match="too few"):
        Batches(X).check(fixed(8)).split()


def test_a_fixed_batch_that_cannot_be_filled():
    with pytest.raises(InvalidInputError, match="fixed at 16, there are 10"):
        Batches(X).check(fixed(16))
    parts = [np.ones((3, 5), np.float32), np.ones((5, 7), np.float32)]
    with pytest.raises(InvalidInputError, match="pad all samples"):
        Batches(parts).check([InputSpec("x", None, (2, "t"))])
    with pytest.raises(UnsupportedError, match="different fixed leading"):
        Batches({"a": X, "b": X}).check([InputSpec("a", None, (2, 3)), InputSpec("b", None, (5, 3))])


# -- what does not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"idz": IDS, "mask": MASK}, "'idz' is no input.*did you mean 'ids'"),
        ({"ids": IDS}, "lacks the input.*mask"),
        ({"ids": IDS, "mask": MASK, "labels": IDS}, "'labels' is no input"),
        ({"ids": IDS[:, :3], "mask": MASK}, r"ids: has shape \(10, 3\), the model takes \(n, 4\)"),
        ({"ids": IDS[:, 0], "mask": MASK}, "first dimension counts samples"),
        ({"ids": IDS[None], "mask": MASK[:1]}, "has shape"),
        ({"ids": IDS.astype(np.float32), "mask": MASK}, "holds float32, the model takes int64.*astype"),
        ({"ids": IDS, "mask": MASK.astype(np.int64)}, "holds int64, the model takes float32"),
        ({"ids": IDS, "mask": MASK.astype(bool)}, "holds bool, the model takes float32"),
        ({"ids": IDS.astype(np.uint64), "mask": MASK}, "holds uint64"),
        ({"ids": IDS, "mask": np.where(IDS == 22, np.nan, MASK)}, "mask: sample 5 holds NaN"),
        ({"ids": IDS, "mask": np.where(IDS == 39, np.inf, MASK)}, "mask: sample 9 holds NaN or inf"),
        ({"ids": IDS, "mask": MASK.astype(np.float64) * 1e300}, "leaves the range of float32"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_samples_that_do_not_fit(tmp_path, arrays, words, packed):
    if packed:
        np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InvalidInputError, match=words) as caught:
        Batches(tmp_path / "x.npz" if packed else arrays, batch=3).check(SPECS)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (X[:0], "zero samples"),
        ([], "zero samples"),
        ({}, "holds no array"),
        ({"ids": IDS, "mask": MASK[:9]}, r"differ in their number of samples \(ids: 10, mask: 9\)"),
        ({"x": np.array(1.0)}, "no dimension of samples"),
        ({"x": np.array([object()])}, "not numbers"),
        ({"x": np.array(["a"])}, "not numbers"),
        ({"x": [[1, 2], [3]]}, "cannot be read"),
        (3, "cannot take samples from int"),
    ],
)
def test_sources_without_samples(source, words):
    with pytest.raises(InvalidInputError, match=words):
        Batches(source)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint32"])
def test_integers_are_widened(dtype):
    found = Batches({"ids": IDS.astype(dtype), "mask": MASK}).check(SPECS)
    assert all(chunk["ids"].dtype == np.int64 for chunk in found)


def test_which_types_are_accepted():
    floats = [np.dtype(name) for name in ("float16", "float32", "float64")]
    assert all(castable(have, want) for have in floats for want in [*floats, np.dtype(ml_dtypes.bfloat16)])
    for have, want in [
        ("int64", "int32"),
        ("uint8", "int8"),
        ("bool", "int64"),
        ("int8", "bool"),
        ("int32", "float64"),
    ]:
        assert not castable(np.dtype(have), np.dtype(want))


def test_parts_of_different_types_are_joined_without_loss():
    big = np.array([[2**62 + 1] * 4], np.int64)
    found = Batches([(big, MASK[:1]), (IDS[:1].astype(np.uint32), MASK[:1])], batch=2).check(SPECS)
    assert next(iter(found))["ids"].tolist() == [[2**62 + 1] * 4, [0, 1, 2, 3]]


# -- files ---------------------------------------------------------------------------------


def test_missing_and_foreign_files(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pt").write_bytes(b"")
    for name, content in (("a.npz", b"not a zip"), ("a.npy", b""), ("b.npy", b"\x93NUMPY\x01\x00")):
        (tmp_path / name).write_bytes(content)
    cases = {"none.npz": "no such file", "empty": "holds no .npz", "x.pt": "from .npz and .npy"}
    for name, words in (cases | dict.fromkeys(["a.npz", "a.npy", "b.npy"], "cannot be read")).items():
        with pytest.raises(InvalidInputError, match=words):
            Batches(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_archives(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, x=np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32))
    data = path.read_bytes()
    for keep in range(0, len(data), 37):
        path.write_bytes(data[:keep])
        with pytest.raises(InvalidInputError):
            Batches(path).check(ONE)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 4]) + data[middle + 4 :])
    with pytest.raises(InvalidInputError, match="cannot be read"):
        list(Batches(path))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_are_not_executed(tmp_path):
    bomb = np.empty(2, object)
    bomb[:] = [Bomb(), Bomb()]
    np.save(tmp_path / "x.npy", bomb)
    np.savez(tmp_path / "x.npz", x=bomb)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("x.npy", "x.npz", "y.npy"):
        with pytest.raises(InvalidInputError, match=r"(?i)pickle"):
            Batches(tmp_path / name)
