"""The command in a process of its own: start-up, signals, full disks, streams."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tool import Cli, environment, process

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "scipy", "matplotlib", "transformers")
MAIN = "from lrcompile.cli import main; main()"
LOSSY = ("optimize", "model.onnx", "--keep", "0.4", "--calib", "calib.npz", "--max-drift", "9", "--no-probes")


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path):
    times = []
    for _ in range(3):
        start = children_seconds()
        said = process("--help", folder=tmp_path, code=MAIN)
        times.append(children_seconds() - start)
        assert said.code == 0 and "optimize" in said.out
    assert min(times) < 0.5
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", MAIN, "optimize", "--help"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--config" in listed.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in listed.stderr.splitlines()}
    assert "lrcompile" in imported and not imported & set(HEAVY)


def test_usage_errors_and_the_version_are_quick_too(tmp_path: Path):
    code = f"import sys, atexit; atexit.register(lambda: print(sorted(set(sys.modules) & set({HEAVY!r})))); {MAIN}"
    for words, expected in (("--version",), 0), (("optimize", "m.onnx", "--kepe", "1"), 2), ((), 2):
        said = process(*words, folder=tmp_path, code=code)
        assert said.code == expected and said.out.endswith("[]\n")


def test_json_is_all_of_stdout(cli: Cli):
    said = process(*LOSSY, "--json", folder=cli.folder)
    assert said.code == 0 and said.json["status"] == "ok"
    assert all(line.startswith("lrcompile: ") for line in said.err.splitlines())
    assert "\x1b" not in said.out + said.err and "\r" not in said.err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_no_bars_on_a_terminal_under_ci(cli: Cli):
    for ci, bars in (("true", False), ("", True)):
        master, slave = os.openpty()
        command = [sys.executable, "-c", MAIN, *LOSSY, "--dry-run"]
        with subprocess.Popen(
            command, cwd=cli.folder, env=environment(CI=ci, TERM="xterm"), stdout=subprocess.DEVNULL, stderr=slave
        ) as child:
            os.close(slave)
            seen = b""
            while True:
                try:
                    piece = os.read(master, 4096)
                except OSError:  # the other end is closed
                    break
                if not piece:
                    break
                seen += piece
        os.close(master)
        assert child.returncode == 0
        assert (b"\x1b[" in seen) is bars


SLOW = """
import time
from lrcompile import planning
real = planning.statistics
def statistics(*args):
    found = real(*args)
    print('lrcompile: now', flush=True)
    time.sleep(60)
    return found
planning.statistics = statistics
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_calibrating(cli: Cli, number: signal.Signals, code: int):
    Path("out.onnx").write_text("old")
    before = cli.listing()
    command = [sys.executable, "-c", SLOW + MAIN, *LOSSY, "-o", "out.onnx", "--force", "--json"]
    with subprocess.Popen(
        command, cwd=cli.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    ) as child:  # fmt: skip
        assert child.stderr is not None
        for line in child.stderr:
            if "now" in line:
                break
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert child.returncode == code and "Traceback" not in err
    if number is signal.SIGINT:
        found = json.loads(out)
        assert (found["status"], found["error"]["code"], found["output"]) == ("interrupted", 130, None)
    assert cli.listing() == before


def test_interrupted_while_publishing(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    Path("out.onnx").write_text("old")
    before = cli.listing()

    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrcompile.files._sync", interrupted)
    said = cli.json(*LOSSY, "-o", "out.onnx", "--force")
    assert said.code == 130 and "interrupted" in said.error["message"]
    assert cli.listing() == before


LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (13_000, 13_000)); {MAIN}"


def test_full_disk(cli: Cli):
    """Files end at a size that the model stays below, its report page does not."""
    assert cli(*LOSSY, "-o", "fits.onnx").code == 0
    assert Path("fits.onnx").stat().st_size < 13_000 < Path("fits.report.html").stat().st_size
    before = cli.listing()
    said = process(*LOSSY, "-o", "out.onnx", "--json", folder=cli.folder, code=LIMITED, PYTHONDONTWRITEBYTECODE="1")
    assert said.code == 7 and "cannot write: File too large" in said.json["error"]["message"]
    assert cli.listing() == before


def test_full_disk_under_a_folder(cli: Cli, bert: Path):
    before = cli.listing()
    words = ("optimize", bert, "--keep", "0.9", "--data-free", "-o", "out", "--json")
    said = process(*words, folder=cli.folder, code=LIMITED, PYTHONDONTWRITEBYTECODE="1")
    assert said.code == 7 and "cannot write: File too large" in said.json["error"]["message"]
    assert cli.listing() == before


def test_a_closed_pipe_is_no_error(cli: Cli):
    command = f"{sys.executable} -c '{MAIN}' plan m.onnx --kepe 1 --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=cli.folder, env=environment(), capture_output=True, text=True)
    assert done.stdout == "{" and "Traceback" not in done.stderr
