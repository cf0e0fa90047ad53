"""Old or new, never half: exceptions, interrupts, full disks and kills in the middle of writing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrcompile import files as module
from lrcompile.errors import GateError, LrcompileError, ResourceError, UsageError
from lrcompile.files import AtomicSet, sha256

ROOT = Path(__file__).parents[2]


def publish(target: Path, content: bytes, *, report: bytes = b"report", force: bool = False) -> str:
    """A set as the command line writes it: a graph that names its data file, and a report."""
    with AtomicSet(target, force=force) as files:
        data = files.stage_data()
        data.write_bytes(content)
        location = files.seal(data)
        files.path.write_text(f"graph of {location} {hashlib.sha256(content).hexdigest()}")
        files.stage("report.json").write_bytes(report)
    return location


def whole(target: Path) -> bytes:
    """The content that the graph refers to, checked against the digest in the graph."""
    location, digest = target.read_text().split()[2:]
    content = (target.parent / location).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    return content


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "model.onnx"


def test_sha256_streams(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    assert sha256(tmp_path / "a") == hashlib.sha256(bytes(3_000_000)).hexdigest()


def test_nothing_is_visible_before_the_end_and_everything_after(target):
    with AtomicSet(target) as files:
        files.path.write_bytes(b"graph")
        files.stage("report.json").write_bytes(b"{}")
        assert all(name.startswith(".") for name in names(target.parent))
        assert files.path.suffix == ".onnx"
    assert snapshot(target.parent) == {"model.onnx": b"graph", "report.json": b"{}"}


def test_data_is_in_place_for_checks_and_replaced_data_is_removed(target):
    old = publish(target, b"old")
    with AtomicSet(target, force=True) as files:
        data = files.stage_data()
        data.write_bytes(b"new")
        new = files.seal(data)
        assert (target.parent / new).read_bytes() == b"new"
        assert whole(target) == b"old"
        files.path.write_text(f"graph of {new} {hashlib.sha256(b'new').hexdigest()}")
    assert old != new
    assert whole(target) == b"new"
    assert names(target.parent) == sorted([new, "model.onnx", "report.json"])


def test_the_same_data_twice(target):
    first = publish(target, b"same")
    assert publish(target, b"same", force=True) == first
    assert whole(target) == b"same"
    assert names(target.parent) == sorted([first, "model.onnx", "report.json"])


def test_data_that_another_graph_uses_is_kept(target):
    old = publish(target, b"old")
    copy = target.with_name("copy.onnx")
    copy.write_bytes(target.read_bytes())
    publish(target, b"new", force=True)
    assert (target.parent / old).exists()
    assert whole(copy) == b"old"


def test_data_of_another_naming_is_never_removed(target):
    target.write_text("graph of weights.bin")
    (target.parent / "weights.bin").write_bytes(b"theirs")
    publish(target, b"new", force=True)
    assert (target.parent / "weights.bin").read_bytes() == b"theirs"


@pytest.mark.parametrize("failure", [GateError("drift"), KeyboardInterrupt(), SystemExit(1), ValueError("bug")])
@pytest.mark.parametrize("before", [False, True])
def test_an_exception_leaves_no_trace(target, failure, before):
    if before:
        publish(target, b"old")
    earlier = snapshot(target.parent)
    with pytest.raises(type(failure)), AtomicSet(target, force=True) as files:
        data = files.stage_data()
        data.write_bytes(b"new")
        files.seal(data)
        files.stage_data().write_bytes(b"more")
        files.stage("report.json").write_bytes(b"new")
        raise failure
    assert snapshot(target.parent) == earlier


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_at_any_step_of_publishing_restores_everything(target, monkeypatch, failure, call, before):
    if before:
        publish(target, b"old")
    elif call == "link":
        pytest.skip("nothing is replaced, so nothing is linked")
    earlier = snapshot(target.parent)
    real, failed = getattr(os, call), 0
    for step in range(1, 9):
        count = 0

        def failing(*args, step=step, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise failure
            return real(*args, **kwargs)

        monkeypatch.setattr(module.os, call, failing)
        try:
            publish(target, b"new", force=before)
        except (LrcompileError, KeyboardInterrupt) as error:
            failed += 1
            monkeypatch.setattr(module.os, call, real)
            assert isinstance(error, KeyboardInterrupt | ResourceError)
            assert snapshot(target.parent) == earlier, (call, step)
        else:
            break
    monkeypatch.setattr(module.os, call, real)
    assert whole(target) == b"new"
    assert not [name for name in names(target.parent) if name.startswith(".")]
    # without hard links a set is still published; an interrupt there is an interrupt all the same
    assert failed >= 2 or (call == "link" and isinstance(failure, OSError))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_while_the_caller_writes(target, code):
    with pytest.raises(ResourceError, match="free some space") as caught, AtomicSet(target) as files:
        files.path.write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert caught.value.code == 7
    assert names(target.parent) == []


def test_errors_that_are_not_about_the_output_pass_through(target):
    with pytest.raises(FileNotFoundError), AtomicSet(target):
        (target.parent / "input.npz").read_bytes()
    assert names(target.parent) == []


def test_wrong_places(target, tmp_path):
    with pytest.raises(UsageError, match="create the folder first"), AtomicSet(tmp_path / "none" / "m.onnx"):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot write"), AtomicSet(tmp_path / "file" / "m.onnx"):
        pass
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match="is a folder"), AtomicSet(tmp_path / "folder.onnx", force=True):
        pass
    with pytest.raises(UsageError, match="needs a file name"), AtomicSet(target) as files:
        files.stage("../escape")
    assert names(tmp_path) == ["file", "folder.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="may write"), AtomicSet(tmp_path / "m.onnx"):
        pass
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission_simulated(target, monkeypatch, code):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(UsageError, match="may write"), AtomicSet(target):
        pass


def test_existing_output_needs_force(target):
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match=r"exists already.*--force") as caught, AtomicSet(target):
        pass
    assert caught.value.code == 2
    (target.parent / "report.json").write_bytes(b"old")
    with pytest.raises(UsageError, match="exists already"), AtomicSet(target.with_name("n.onnx")) as files:
        files.stage("report.json")
    assert snapshot(target.parent) == {"model.onnx": b"old", "report.json": b"old"}


def test_an_output_that_appears_meanwhile_is_not_replaced(target):
    with pytest.raises(UsageError, match="exists already"), AtomicSet(target) as files:
        files.path.write_bytes(b"new")
        target.write_bytes(b"somebody else's")
    assert snapshot(target.parent) == {"model.onnx": b"somebody else's"}


@pytest.mark.parametrize("how", ["same", "symlink", "hard link", "dotted"])
def test_output_that_is_the_input(target, how):
    target.write_bytes(b"input")
    out = target.with_name("out.onnx")
    if how == "symlink":
        out.symlink_to(target)
    elif how == "hard link":
        os.link(target, out)
    else:
        out = target if how == "same" else target.parent / "." / "model.onnx"
    with pytest.raises(UsageError, match=r"output is the input.*--force"), AtomicSet(out, inputs=[target]):
        pass
    with AtomicSet(out, inputs=[target], force=True) as files:
        files.path.write_bytes(b"output")
    assert out.read_bytes() == b"output"
    assert target.read_bytes() == (b"input" if "link" in how else b"output")


def test_permissions_of_a_replaced_file_are_kept(target):
    publish(target, b"old")
    target.chmod(0o640)
    publish(target, b"new", force=True)
    assert target.stat().st_mode & 0o777 == 0o640


LIMITED = """
import resource, signal, sys
from lrcompile.errors import ResourceError
from lrcompile.files import AtomicSet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with AtomicSet(sys.argv[1], force=True) as files:
        with open(files.stage_data(), "wb") as stream:
            for _ in range(100):
                stream.write(bytes(1000))
except ResourceError as error:
    sys.exit(error.code)
"""

FOREVER = """
import hashlib, itertools, sys
from pathlib import Path
from lrcompile.files import AtomicSet
for turn in itertools.count(int(sys.argv[2])):
    content = b"%d" % (turn % 2) * 50_000
    with AtomicSet(sys.argv[1], force=True) as files:
        data = files.stage_data()
        data.write_bytes(content)
        location = files.seal(data)
        files.path.write_text(f"graph of {location} {hashlib.sha256(content).hexdigest()}")
        files.stage("report.json").write_text(str(turn % 2) * 10_000)
    print(turn, flush=True)
"""


EVERY_STEP = """
import hashlib, itertools, os, signal, sys
from pathlib import Path
from lrcompile.files import AtomicSet
target = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # a kill loses no cached page, and this is quicker

def publish(content):
    with AtomicSet(target, force=True) as files:
        data = files.stage_data()
        data.write_bytes(content)
        location = files.seal(data)
        files.path.write_text(f"graph of {location} {hashlib.sha256(content).hexdigest()}")
        files.stage("report.json").write_bytes(content)

def killed_at(step):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        code = frame.f_code
        if not code.co_filename.endswith("files.py") and code.co_name not in ("write_bytes", "write_text"):
            return None
        count += event == "line"
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

for step in itertools.count(1):
    for leftover in target.parent.iterdir():
        leftover.unlink()
    publish(b"old")
    child = os.fork()
    if not child:
        killed_at(step)
        publish(b"new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    location, digest = target.read_text().split()[2:]
    content = (target.parent / location).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest, step
    assert (target.parent / "report.json").read_bytes() in (b"old", b"new"), step
    print(content.decode(), flush=True)
    if status == 0:
        break
"""


def child(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def test_a_file_size_limit_of_the_system(target):
    publish(target, b"old")
    earlier = snapshot(target.parent)
    process = child(LIMITED, target)
    process.communicate(timeout=30)
    assert process.returncode == 7
    assert snapshot(target.parent) == earlier


def test_a_kill_at_every_step_leaves_old_or_new(target):
    process = child(EVERY_STEP, target)
    output = process.communicate(timeout=100)[0].decode().split()
    assert process.returncode == 0
    assert output.count("old") > 100  # steps before the graph is switched …
    assert output.count("new") > 10  # … and after it, until nothing is left to do
    assert output == sorted(output, reverse=True)


def test_a_kill_while_writing_in_a_loop_leaves_old_or_new(target):
    publish(target, b"0" * 50_000, report=b"0" * 10_000)
    seen = set()
    for attempt in range(6):
        process = child(FOREVER, target, attempt)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.0013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        content, report = whole(target), (target.parent / "report.json").read_bytes()
        assert content in (b"0" * 50_000, b"1" * 50_000)
        assert report in (b"0" * 10_000, b"1" * 10_000)
        seen.add(content[:1])
    assert seen == {b"0", b"1"}
