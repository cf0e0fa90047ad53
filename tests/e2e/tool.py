"""The command line as a test calls it: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lrcompile.cli.app import run

ROOT = Path(__file__).resolve().parents[2]
HEAD = ["schema", "status", "seconds", "versions"]


@dataclass(frozen=True)
class Said:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        found = json.loads(self.out)
        assert list(found)[:4] == HEAD
        assert isinstance(found["seconds"], float | int)
        assert found["versions"]["lrcompile"]
        return found

    @property
    def error(self) -> dict[str, Any]:
        """The error of a failed ``--json`` command, which stderr tells too, in one line and a hint."""
        error = self.json["error"]
        assert sorted(error) == ["code", "hint", "message", "where"]
        assert error["code"] == self.code
        line = f"error: {error['where']}: {error['message']}" if error["where"] else f"error: {error['message']}"
        lines = [text for text in self.err.splitlines() if not text.startswith("lrcompile: ")]
        assert lines[0] == " ".join(line.split())
        assert lines[1:] == ([f"hint: {' '.join(error['hint'].split())}"] if error["hint"] else [])
        return error


class Cli:
    """Runs commands in a folder; ``--json`` is added by :meth:`json`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *words: object) -> Said:
        """A command as a person types it."""
        self._capsys.readouterr()
        code = run([str(word) for word in words])
        out, err = self._capsys.readouterr()
        return Said(code, str(out), str(err))

    def json(self, *words: object) -> Said:
        """The same with ``--json``, without progress where the verb has any."""
        quiet = ["-q"] if words and words[0] in ("optimize", "plan") else []
        return self(*words, *quiet, "--json")

    def listing(self) -> dict[str, tuple[int, int]]:
        """Every file with its size and time of change: what a failed command must leave as it was."""
        files = (path for path in self.folder.rglob("*"))
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: importable from the repository, no colours asked for."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def process(*words: object, folder: Path, code: str = "from lrcompile.cli import main; main()", **more: str) -> Said:
    """The command line in its own process; ``code`` may prepare something first."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False, timeout=100
    )
    return Said(done.returncode, done.stdout, done.stderr)
