"""Options from files, the environment and the command line: which one counts, and that a run can be repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tool import Cli

ROWS = 'calib = "calib.npz"\n'


def config(cli: Cli, *words: str) -> dict:
    """The resolved options of a dry run."""
    said = cli.json("optimize", "model.onnx", "--dry-run", "--max-drift", "9", *words)
    assert said.code == 0, said.err
    return said.json["config"]


def test_command_line_then_environment_then_file_then_preset(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    Path("c.toml").write_text(ROWS + "keep = 0.5\nseed = 3\n")
    found = config(cli, "--config", "c.toml")
    assert (found["keep"], found["seed"], found["calibration"]) == (0.5, 3, "calib.npz")
    assert (found["preset"], found["pass"], found["max-drift"]) == ("small", ["low-rank", "conv-low-rank"], 9.0)
    monkeypatch.setenv("LRCOMPILE_KEEP", "0.6")
    assert config(cli, "--config", "c.toml")["keep"] == 0.6
    found = config(cli, "--keep", "0.7", "--config", "c.toml")
    assert (found["keep"], found["seed"]) == (0.7, 3)


def test_a_preset_gives_way_to_the_file(cli: Cli):
    Path("c.toml").write_text(ROWS + 'keep = 0.6\npreset = "safe"\nmax_drift = 0.9\n')
    said = cli.json("optimize", "model.onnx", "--dry-run", "--config", "c.toml")
    assert (said.code, said.json["drift"]["limit"], said.json["preset"]) == (0, 0.9, "safe")
    said = cli.json("optimize", "model.onnx", "--dry-run", "--config", "c.toml", "--max-drift", "1e-7")
    assert (said.code, said.json["drift"]["limit"]) == (5, 1e-7)


def test_every_form_of_a_value(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    Path("c.toml").write_text(
        'evaluation = "eval.npz"\nbytes = "20KB"\nmacs = 0.9\npass = ["low-rank{metric=plain}"]\ninclude = "*"\n'
        'exclude = ["down*"]\ndata-free = true\nprobes = false\ncache = false\nforce_growth = true\n'
    )
    monkeypatch.delenv("LRCOMPILE_LATENCY_CHECK")
    found = config(cli, "--config", "c.toml", "--no-latency-check")
    assert found == {
        "evaluation": "eval.npz", "bytes": "20KB", "macs": "0.9", "pass": ["low-rank{metric=plain}"],
        "include": ["*"], "exclude": ["down*"], "data-free": True, "probes": False, "force-growth": True,
        "preset": "small", "max-drift": 9.0, "latency-check": False, "seed": 0,
    }  # fmt: skip


def test_a_file_of_optimize_serves_plan_too(cli: Cli):
    Path("c.toml").write_text(ROWS + "keep = 0.6\nmax-drift = 0.3\nlatency-check = false\n")
    assert cli.json("plan", "model.onnx", "--config", "c.toml").json["budget"]["keep"]["target"] == 0.6


def test_a_report_runs_again(cli: Cli):
    line = ("--keep", "0.6", "--calib", "calib.npz", "-p", "low-rank{shrink=0.1, center=False}", "--exclude", "x*")
    first = cli.json("optimize", "model.onnx", "-o", "a.onnx", *line, "--max-drift", "0.4", "--seed", "5").json
    again = cli.json("optimize", "model.onnx", "-o", "b.onnx", "--config", "a.report.json").json
    assert first["config"] == again["config"] == json.loads(Path("a.report.json").read_text())["config"]
    assert first["config"]["pass"] == ["low-rank{shrink=0.1, center=False}"]
    assert first["output"]["sha256"] == again["output"]["sha256"] and first["decisions"] == again["decisions"]
    other = cli.json("optimize", "model.onnx", "-o", "c.onnx", "--config", "a.report.json", "--keep", "0.4").json
    assert other["config"] == first["config"] | {"keep": 0.4}


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("kepe = 0.5", 2, "c.toml: unknown key 'kepe' (did you mean 'keep'?)"),
        ("[optimize]\nkeep = 0.5", 2, "unknown key 'optimize'"),
        ('keep = "much"', 2, "Invalid value for '--keep'"),
        ("keep = true", 2, "'keep' takes a number or a text, not true"),
        ("keep = [0.5]", 2, "'keep' takes a number"),
        ("data-free = 1", 2, "'data-free' takes true or false, not 1"),
        ("include = [[1]]", 2, "'include' takes a text or a list of texts"),
        ('calib = "a"\ncalibration = "b"', 2, "given twice"),
        ("json = true", 2, "unknown key 'json'"),
        ('preset = "smal"', 2, "did you mean 'small'?"),
        ("keep = ", 3, "malformed"),
        ("\udcff", 3, "not UTF-8"),
        (None, 3, "cannot be read"),
    ],
)
def test_refused_files(cli: Cli, text: str | None, code: int, words: str):
    if text is not None:
        Path("c.toml").write_bytes(text.encode(errors="surrogateescape"))
    said = cli.json("optimize", "model.onnx", "--config", "c.toml")
    assert said.code == code
    assert words in f"{said.error['where']}: {said.error['message']} ({said.error['hint']})"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}'])
def test_refused_reports(cli: Cli, text: str):
    Path("r.json").write_text(text)
    assert cli.json("plan", "model.onnx", "--config", "r.json").code == 3


def test_a_bad_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LRCOMPILE_KEEP", "much")
    assert cli.json("plan", "model.onnx").code == 2
