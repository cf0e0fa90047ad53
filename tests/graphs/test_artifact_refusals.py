"""Folders that are damaged, tampered with or of another model are refused, and nothing is left half done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from lrcompile import artifact
from lrcompile.artifact import load, save
from lrcompile.artifact_read import PROGRAM, TARGET, WEIGHTS
from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError, UsageError
from lrcompile.program import lookup
from tests.graphs.modules import edit, encoder, same_outputs, tokens


def fresh() -> nn.Module:
    model = encoder(9)
    model.second.out.weight = model.first.out.weight
    return model


def site(manifest: dict[str, Any], path: str) -> dict[str, Any]:
    return next(entry for entry in manifest["sites"] if entry["path"] == path)


def _retype(manifest: dict[str, Any]) -> None:
    site(manifest, "up")["structure"][0] = "Evil"


def _rename(manifest: dict[str, Any]) -> None:
    site(manifest, "up")["tensors"]["terms.0.left.weight"] = "../../weights"


def _move(manifest: dict[str, Any]) -> None:
    site(manifest, "up")["path"] = "first.norm"


def _nowhere(manifest: dict[str, Any]) -> None:
    site(manifest, "up")["path"] = "__class__.x"


def _drop(manifest: dict[str, Any]) -> None:
    del manifest["aliases"]


def _stride(manifest: dict[str, Any]) -> None:
    site(manifest, "up")["stride"] = ["x"]


def _alias(manifest: dict[str, Any]) -> None:
    manifest["aliases"]["head.bias"] = "up.bias"


def _buffer(manifest: dict[str, Any]) -> None:
    manifest["buffers"]["first"] = "load"


Tamper = Callable[[dict[str, Any]], None]
TAMPERED: dict[Tamper, str] = {
    _retype: "unknown operator 'Evil'",
    _rename: "tensor is missing",
    _move: "expected a Linear",
    _nowhere: "no such module",
    _drop: "malformed entry 'aliases'",
    _stride: "malformed site",
    _alias: "stored as .* the model has",
    _buffer: "malformed entry 'buffers'",
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_tampered_manifest_is_refused_and_changes_nothing(folder: Path, tamper: Tamper):
    manifest = json.loads((folder / TARGET).read_text(encoding="utf-8"))
    tamper(manifest)
    (folder / TARGET).write_text(json.dumps(manifest), encoding="utf-8")
    model = fresh()
    before = list(model.modules())
    with pytest.raises(InvalidInputError, match=TAMPERED[tamper]):
        load(folder, into=model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 3}', "[" * 100_000, '{"schema": "other/1"}'])
def test_a_broken_manifest_is_refused(folder: Path, text: str):
    (folder / TARGET).write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError):
        load(folder)


def test_a_later_schema_is_refused(folder: Path):
    edit(folder / TARGET, schema="lrcompile.artifact/2")
    with pytest.raises(UnsupportedError, match="this version reads"):
        load(folder)


def test_weights_of_another_artefact_are_refused(folder: Path):
    held = load_file(folder / WEIGHTS)
    save_file(held, folder / WEIGHTS, metadata={"lrcompile": "0" * 64})
    with pytest.raises(InvalidInputError, match="does not belong"):
        load(folder)


def test_damaged_weights_are_refused(folder: Path):
    data = (folder / WEIGHTS).read_bytes()
    for bad in (data[: len(data) // 2], b"\xff" * 64, b""):
        (folder / WEIGHTS).write_bytes(bad)
        with pytest.raises(InvalidInputError, match="corrupt weights"):
            load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidInputError, match="no such file"):
        load(folder)


def test_files_outside_of_the_folder_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside") / "weights"
    outside.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    with pytest.raises(InvalidInputError, match="leads out of the folder"):
        load(folder)


def test_indices_out_of_range_are_refused(folder: Path):
    held = load_file(folder / WEIGHTS)
    content = json.loads((folder / TARGET).read_text(encoding="utf-8"))["content"]
    held["up.factors.terms.1.operator.indices"][0, 0] = 16
    save_file(held, folder / WEIGHTS, metadata={"lrcompile": content})
    with pytest.raises(InvalidInputError, match=r"up: indices of SemiSparse are not in 0\.\.15"):
        load(folder, into=fresh())


def test_another_model_is_refused(folder: Path):
    for other in (nn.Linear(3, 3), encoder().first, type(encoder())(width=8)):
        with pytest.raises(InvalidInputError):
            load(folder, into=other)


OPERATIONS = [
    "aten.from_file.default",
    "aten.set_.source_Storage",
    "aten.resize_.default",
    "aten._unsafe_index.Tensor",
    "os.system",
    "operator.attrgetter",
    "aten.linear.__class__",
    "aten.__class__.default",
    "torch.load",
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_beyond_arithmetic_are_refused(folder: Path, name: str):
    with pytest.raises(InvalidInputError):
        lookup(name)
    program = json.loads((folder / PROGRAM).read_text(encoding="utf-8"))
    program["nodes"][0]["op"] = name
    (folder / PROGRAM).write_text(json.dumps(program), encoding="utf-8")
    with pytest.raises(InvalidInputError):
        load(folder)


PROGRAMS: dict[str, Any] = {
    "later node": {"nodes": [{"op": "aten.relu.default", "args": [{"node": 99}]}]},
    "odd argument": {"nodes": [{"op": "aten.relu.default", "args": [{"pickle": "x"}]}]},
    "no type": {"nodes": [{"op": "aten.relu.default", "args": [{"dtype": "load"}]}]},
    "foreign tensor": {"tensors": ["nothing"]},
    "results": {"results": [10**6]},
    "not nodes": {"nodes": 5},
    "not ranges": {"ranges": {"s0": "x"}},
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_malformed_programs_are_refused(folder: Path, case: str):
    edit(folder / PROGRAM, **PROGRAMS[case])
    with pytest.raises(InvalidInputError):
        load(folder)


def test_existing_files_need_force(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        save(encoder(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save(encoder(), folder, force=True)
    same_outputs(encoder(), load(folder, into=encoder(5)), **tokens())


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(artifact, "_write_tensors", fail)
    with pytest.raises(RuntimeError, match="no luck"):
        save(encoder(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_module_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot save a dict"):
        save({}, tmp_path / "a")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    with pytest.raises(LrcompileError):
        load(tmp_path / "missing")
