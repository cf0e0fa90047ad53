"""``.pt2`` files that are broken, of another kind, or made to run code: refused before torch reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError
from lrcompile.frontend import open_graph
from lrcompile.graphs.fx.archive import PROGRAM, SAMPLES, WEIGHTS, load
from lrcompile.graphs.fx.checks import check_guard, check_operator, check_symbolic
from tests.graphs.exported import attending, exported


class Evil:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, program, _ = attending()
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    torch.export.save(program, path)
    return path


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """A copy of an archive with changed members; None leaves one out."""
    reader, writer = torch._C.PyTorchFileReader(str(source)), torch._C.PyTorchFileWriter(str(target))
    members = {name: reader.get_record(name) for name in reader.get_all_records() if not name.startswith(".data")}
    for name, data in {**members, **more}.items():
        changed = change(name, data)
        if changed is not None and name != "byteorder":
            writer.write_record(name, changed, len(changed))
    writer.write_end_of_file()
    return target


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], None], member: str = PROGRAM) -> Path:
    """A copy whose program (or another JSON member) went through ``edit``."""

    def change(name: str, data: bytes) -> bytes:
        if name != member:
            return data
        spec = json.loads(data)
        edit(spec)
        return json.dumps(spec).encode()

    return rewritten(source, target, change)


def test_what_torch_wrote_is_read(good: Path, tmp_path: Path):
    assert str(load(good).graph) == str(torch.export.load(good).graph)
    copied = rewritten(good, tmp_path / "copy.pt2", lambda name, data: data)
    assert open_graph(copied).files == [copied]


# -- broken and foreign files ----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(good: Path, tmp_path: Path, share: float):
    data = good.read_bytes()
    path = tmp_path / "part.pt2"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InvalidInputError) as caught:
        open_graph(path)
    assert caught.value.where == str(path) and caught.value.hint


def test_foreign_files(tmp_path: Path):
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter/text.txt", "hello")
    with pytest.raises(InvalidInputError):
        load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidInputError, match="lacks archive_format"):
        load(path)
    path.write_bytes(b"\x00" * 1000)
    with pytest.raises(InvalidInputError, match=r"is no \.pt2 archive"):
        load(path)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load(tmp_path / "missing.pt2")


def test_other_kinds_of_archives(good: Path, tmp_path: Path):
    extra = tmp_path / "extra.pt2"
    torch.export.save(load(good), extra, extra_files={"note.txt": "mine"})
    with pytest.raises(UnsupportedError, match="extra files"):
        load(extra)
    compiled = rewritten(good, tmp_path / "compiled.pt2", lambda n, d: d, **{"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(UnsupportedError, match="compiled code"):
        load(compiled)
    unknown = rewritten(good, tmp_path / "unknown.pt2", lambda n, d: d, **{"data/constants/opaque_obj_0": b"x"})
    with pytest.raises(InvalidInputError, match="opaque_obj_0"):
        load(unknown)


def test_a_container_of_another_package(tmp_path: Path):
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"a": x + 1}

    path = tmp_path / "pair.pt2"
    torch.export.save(exported(Pair(), torch.randn(2, 3)), path)

    def rename(spec: dict[str, Any]) -> None:
        signature = spec["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = signature["out_spec"].replace("builtins.dict", "somewhere.Output")

    with pytest.raises(UnsupportedError, match=r"somewhere\.Output"):
        load(edited(path, tmp_path / "renamed.pt2", rename))


# -- files that would run code ---------------------------------------------------------------


def refused(path: Path, mark: Path) -> LrcompileError:
    with pytest.raises((InvalidInputError, UnsupportedError)) as caught:
        load(path)
    assert not mark.exists()
    return caught.value


@pytest.mark.parametrize("how", [pickle.dumps, lambda value: _saved(value)], ids=["pickle", "torch.save"])
def test_pickled_sample_inputs_do_not_run(good: Path, tmp_path: Path, how: Any):
    mark = tmp_path / "executed"
    evil = how(((Evil(mark),), {}))
    path = rewritten(good, tmp_path / "evil.pt2", lambda name, data: evil if name == SAMPLES else data)
    assert "sample inputs" in str(refused(path, mark))
    if how is not pickle.dumps:  # the file is a real one: torch alone runs it
        with pytest.raises(Exception):  # noqa: B017 - whatever torch says afterwards
            torch.export.load(path)
        assert mark.exists()


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_pickled_weights_do_not_run(good: Path, tmp_path: Path):
    mark = tmp_path / "executed"

    def pickled(spec: dict[str, Any]) -> None:
        spec["config"]["up.bias"].update(use_pickle=True, path_name="weight_0")

    first = edited(good, tmp_path / "first.pt2", pickled, WEIGHTS)
    evil = _saved(Evil(mark))
    path = rewritten(first, tmp_path / "evil.pt2", lambda name, data: evil if name == "data/weights/weight_0" else data)
    assert "up.bias" in str(refused(path, mark))


def test_tensors_larger_than_what_is_stored(good: Path, tmp_path: Path):
    def grown(spec: dict[str, Any]) -> None:
        spec["config"]["up.bias"]["tensor_meta"]["sizes"] = [{"as_int": 2**50}]

    path = edited(good, tmp_path / "grown.pt2", grown, WEIGHTS)
    assert "larger than what is stored" in str(refused(path, tmp_path / "none"))


CODE = "__import__('os').mkdir({mark!r})"


@pytest.mark.parametrize("place", ["guard", "symbol", "node name", "operator", "default", "key", "tensor name"])
def test_text_that_torch_would_execute(good: Path, tmp_path: Path, place: str):
    mark = tmp_path / "executed"
    code = CODE.format(mark=str(mark))

    def edit(spec: dict[str, Any]) -> None:
        module = spec["graph_module"]
        node = next(each for each in module["graph"]["nodes"] if each["target"].endswith("linear.default"))
        match place:
            case "guard":
                spec["guards_code"] = [f"{code} is None"]
            case "symbol":
                next(iter(module["graph"]["sym_int_values"].values()))["as_expr"]["expr_str"] = code
            case "node name":
                node["outputs"][0]["as_tensor"]["name"] = f"x); {code}; (y"
            case "operator":
                node["target"] = "torch.hub._load_local"
            case "default":
                module["graph"]["inputs"][-1] = {"as_string": f"'+{code}+'"}
            case "key":
                signature = module["module_call_graph"][0]["signature"]
                signature["in_spec"] = signature["in_spec"].replace("memory", f"m=({code})")
            case "tensor name":
                module["signature"]["input_specs"][0]["parameter"]["parameter_name"] = f'a"), {code}, ("b'

    error = refused(edited(good, tmp_path / "evil.pt2", edit), mark)
    assert error.hint and "evil.pt2" in error.where


@pytest.mark.parametrize(
    "text",
    ["Symbol('s23', positive=True, integer=True)", "Mul(Integer(4), Symbol('s0'))",
     "FloorDiv(Add(Symbol('s1'), Integer(-1)), Integer(2))", "Pow(Symbol('s0'), Integer(2))",
     "Max(Integer(1), Symbol('u0'))"],
)  # fmt: skip
def test_plain_expressions(text: str):
    check_symbolic(text)


@pytest.mark.parametrize(
    "text",
    ["print(1)", "Symbol('x).__class__')", "Symbol('s0').__class__", "Mul(eval('1'), 2)", "lambda: 0",
     "[x for x in ()]", "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "9**9**9", "Symbol(Symbol)",
     "Integer(*Symbol)", "(" * 500, "", "f''"],
)  # fmt: skip
def test_other_expressions(text: str):
    with pytest.raises(InvalidInputError, match="not a plain one"):
        check_symbolic(text)


def test_guards():
    for fine in (
        "L['x'].size()[0] == 3",
        "(80*L['mem'].size()[0]) == (80*L['ids'].size()[0])",
        "2 <= L['a']['b'][0].size()[1] % 4 and True",
    ):
        check_guard(fine)
    for wrong in (
        "L['x'].__class__",
        "L.clear()",
        "__import__('os')",
        "math.os",
        "L['x\"+y'].size()[0] == 1",
        "L['x'].size(*L)",
    ):
        with pytest.raises(InvalidInputError, match="not a plain one"):
            check_guard(wrong)


def test_operators():
    check_operator("torch.ops.aten.linear.default")
    check_operator("_operator.mul")
    for wrong in ("torch.load", "_operator.attrgetter", "math.os", "torch.ops.aten.from_file.default",
                  "torch.ops.mine.op.default", "#other:op", "os.system"):  # fmt: skip
        with pytest.raises(LrcompileError):
            check_operator(wrong)
