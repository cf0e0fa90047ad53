"""The report's JSON keys, its table and its page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.report import (
    BudgetLine,
    Decision,
    Drift,
    FileInfo,
    PassRecord,
    Ratio,
    Report,
    Size,
    Spectrum,
    html_text,
    human_bytes,
    human_count,
    json_text,
    jsonable,
    machine,
    print_report,
    table_text,
    to_json,
    versions,
)
from lrcompile.report.summary import comparison
from lrcompile.report.svg import tag
from lrcompile.report.text import human_change, shorten, visible
from tests.report.sample import sample

GOLDEN = Path(__file__).parents[1] / "golden" / "report_table.txt"
COMMON = ["schema", "status", "seconds", "versions"]
OPTIMIZE = [
    *COMMON,
    *("input", "output", "report", "before", "after", "ratio", "budget", "drift", "calibration", "seed", "preset"),
    *("sites", "decisions"),
]
EXTRA = ["passes", "notes", "config", "task", "machine", "costs"]
EVIL = "</title><script>alert(1)</script>\"' onload=x <img src=https://a.example/x>\x1b[31m\u202e[red]x[/]&amp;"
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def bare(verb: Any = "optimize") -> Report:
    """Every optional value is None, with one record of every kind."""
    return Report(
        verb=verb,
        before=Size(0, 0, 0),
        after=Size(0, 0, 0),
        ratio=Ratio(),
        budget={"latency": BudgetLine(0.9)},
        drift=Drift(),
        decisions=[Decision("w", ())],
        passes=[PassRecord("clean", True)],
        spectra=[Spectrum("w", []), Spectrum("v", [0.0], 3)],
        task={"accuracy": {}},
        memory=[(0.0, 0), (0.0, 0)],
    )


def evil() -> Report:
    """A hostile string wherever a string goes."""
    report = sample(1)
    report.input, report.output, report.report = FileInfo(EVIL, EVIL, 1), FileInfo(EVIL, EVIL, 1), EVIL
    report.decisions = [Decision(EVIL, (2, 2), EVIL, EVIL, 0.5, 0.1, 0.1, EVIL), Decision(EVIL, (2, 2), reason=EVIL)]
    report.spectra = [Spectrum(EVIL, [1.0, 0.5, 0.0], 1)]
    report.passes = [PassRecord(EVIL, True, rolled_back=EVIL)]
    report.notes, report.config, report.versions, report.machine = [EVIL], {EVIL: [EVIL]}, {EVIL: EVIL}, {EVIL: EVIL}
    report.task, report.budget = {EVIL: {"before": EVIL, "after": EVIL}}, {EVIL: BudgetLine(1.0)}
    report.error = {"code": 5, "message": EVIL, "hint": EVIL, "where": EVIL}
    report.status = report.preset = EVIL
    report.drift = Drift(metric=EVIL, worst_output=EVIL)
    return report


def test_optimize_has_exactly_the_documented_keys():
    found = to_json(sample())
    assert list(found) == [*OPTIMIZE, *EXTRA]
    assert found["schema"] == "lrcompile.optimize/1"
    assert list(found["input"]) == list(found["output"]) == ["path", "sha256", "bytes"]
    assert list(found["before"]) == list(found["after"]) == ["parameters", "bytes", "macs", "latency_ms", "peak_rss"]
    assert list(found["ratio"]) == ["parameters", "bytes", "macs", "latency", "latency_low", "latency_high"]
    assert list(found["budget"]) == ["keep", "bytes", "drift", "feasible"]
    assert list(found["budget"]["keep"]) == ["target", "reached"]
    drift = ["relative_l2", "cosine", "top1", "kl", "metric", "samples", "limit", "passed", "worst_output"]
    assert list(found["drift"]) == drift
    assert list(found["calibration"]) == ["kind", "samples", "tokens", "sha256"]
    assert list(found["sites"]) == ["total", "rewritten", "dense", "refused"]
    decision = ["site", "shape", "pass", "structure", "keep", "predicted", "error", "reason"]
    assert all(list(each) == decision for each in found["decisions"])


def test_plan_leaves_out_what_only_a_result_has():
    found = to_json(dataclasses.replace(sample(), verb="plan"))
    assert found["schema"] == "lrcompile.plan/1"
    assert list(found) == [key for key in [*OPTIMIZE, *EXTRA] if key not in ("output", "after", "drift")]
    assert list(found["ratio"]) == ["parameters", "bytes", "macs"]


def test_a_failure_carries_its_error_and_other_verbs_have_no_report():
    found = to_json(Report("optimize", "gate_failed", error={"code": 5, "message": "drift"}))
    assert found["error"] == {"code": 5, "message": "drift", "hint": None, "where": None}
    assert "error" not in to_json(sample())
    assert {key: found[key] for key in ("input", "output", "after", "drift", "seed")} == dict.fromkeys(
        ("input", "output", "after", "drift", "seed")
    )
    with pytest.raises(ValueError, match="verify"):
        to_json(Report("verify"))  # pyright: ignore[reportArgumentType]


def test_json_is_strict_ascii_and_the_same_every_time():
    report = sample()
    report.drift = Drift(relative_l2=math.nan, kl=math.inf, cosine=0.1 + 0.2)
    report.config = {"b": {2, 1}, "a": np.float32(0.5), "path": Path("x") / "y", "array": np.arange(3), "\ud800": 1}
    text = json_text(report)
    assert text.isascii() and text == json_text(report)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (found["drift"]["relative_l2"], found["drift"]["kl"], found["drift"]["cosine"]) == (None, None, 0.3)
    assert list(found["config"].items()) == [
        ("a", 0.5),
        ("array", [0, 1, 2]),
        ("b", [1, 2]),
        ("path", "x/y"),
        ("\\ud800", 1),
    ]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_keeps_nine_digits_and_is_stable(value: float):
    found = jsonable(value)
    assert found == pytest.approx(value, rel=1e-8, abs=0) and jsonable(found) == found
    assert math.copysign(1.0, found) == 1.0 or found < 0
    assert len(re.sub(r"e.*$|\D", "", repr(found)).strip("0")) <= 9


@given(st.integers(0, 2**60))
def test_human_bytes_says_three_digits_of_the_truth(value: int):
    number, unit = human_bytes(value).split(" ")
    power = ["B", "KB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(number) < 1024 or unit == "PB"
    assert math.isclose(float(number) * 1024**power, value, rel_tol=0.0051)
    assert human_bytes(-value - 1).startswith("−")


@given(st.integers(0, 10**17))
def test_human_count_says_three_digits_of_the_truth(value: int):
    number, _, unit = human_count(value).partition(" ")
    assert math.isclose(float(number) * 1000 ** ["", "K", "M", "G", "T", "P"].index(unit), value, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KB"), (1024**2 - 1, "1.00 MB"), (10235, "10.0 KB"), (None, "–")],
)
def test_human_bytes_at_the_edges(value: int | None, text: str):
    assert human_bytes(value) == text


def test_changes_and_names():
    assert [human_change(each) for each in (0.58, 1.031, 1.0, 0.9999, None)] == [
        "−42.0 %",
        "+3.1 %",
        "same",
        "same",
        "",
    ]
    assert shorten("encoder.layer.11.output", 11) == "encod…utput"
    assert visible("a\n b\x1b[0m\u202e\ud800") == "a b\\x1b[0m\\u202e\\ud800"


@given(st.text(), st.integers(4, 60))
def test_shortened_names_never_act_and_never_exceed(text: str, limit: int):
    short = shorten(text, limit)
    short.encode()
    assert len(short) <= limit and not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", short)


def test_ratio_of_two_sizes():
    found = Ratio.of(Size(10, 100, 0, 2.0), Size(5, 80, 0, 1.0))
    assert found == Ratio(0.5, 0.8, 1.0, 0.5, None, None)
    assert Ratio.of(Size(0, 1, 1), Size(5, 1, 1), (0.9, 0.8, 1.0)) == Ratio(None, 1.0, 1.0, 0.9, 0.8, 1.0)


@pytest.mark.parametrize("full", [1, 5, 127, 128, 1000])
def test_spectra_are_thinned_to_their_ends(full: int):
    tails = [float(full - rank) for rank in range(full + 1)]
    found = Spectrum.of("w", tails, 1)
    assert len(found.energies) == min(full + 1, 128) and found.full == full
    assert (found.energies[0], found.energies[-1]) == (1.0, 0.0)
    assert found.energies == sorted(found.energies, reverse=True)
    assert Spectrum.of("zero", [0.0, 0.0]).energies == [0.0, 0.0]


def test_the_table_is_the_golden_text():
    found = table_text(sample(2))
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")
    assert max(len(line) for line in found.splitlines()) <= 100


def test_long_tables_end_with_a_count():
    report = sample(12)
    text = table_text(report, width=160)
    assert f"… and {len(report.decisions) - 40} more in models/all-MiniLM-L6-v2.lrcompile.report.json" in text
    assert report.decisions[39].site in text and report.decisions[40].site not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal_without_no_color(monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    coloured, pipe = Terminal(), io.StringIO()
    print_report(sample(1), coloured)
    print_report(sample(1), pipe)
    assert "\x1b[32m" in coloured.getvalue() and "\x1b" not in pipe.getvalue()
    assert pipe.getvalue() == table_text(sample(1))
    monkeypatch.setenv("NO_COLOR", "1")
    quiet = Terminal()
    print_report(sample(1), quiet)
    assert not re.search(r"\x1b\[[0-9;]*3\d", quiet.getvalue())


def test_an_ascii_stream_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(sample(1), stream)
    stream.seek(0)
    assert "384x384" in stream.read()


def test_hostile_names_do_not_act_on_a_terminal():
    text = table_text(evil(), width=300)
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]x[/]" in text


def test_the_page_parses_and_refers_to_nothing():
    text = html_text(sample())
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href", "style"} & {name for name, _ in page.attributes}
    headings = ("Before and after", "Budget", "Kept per layer", "Spectra", "Drift", "Decisions", "Passes")
    assert all(each in page.text for each in headings)
    assert page.tags.count("svg") >= 24 + 2 + 5
    assert "prefers-color-scheme: dark" in text and "Content-Security-Policy" in text


def test_the_page_shows_dense_sites_differently_and_every_reason():
    report = sample()
    page = Page(html_text(report))
    dense = [each for each in report.decisions if not each.pass_]
    assert sum(value == "fill dense" for name, value in page.attributes if name == "class") == len(dense)
    assert all(each.reason in page.text for each in report.decisions)


def test_hostile_names_stay_text():
    text = html_text(evil())
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("title") >= 3 and page.tags.count("style") == 1
    assert text.encode() and "\x1b" not in text and "\u202e" not in text
    assert "alert(1)" in page.text
    expected = {key for key, _ in Page(html_text(sample())).attributes}
    assert {key for key, _ in page.attributes} <= expected


@given(st.text())
def test_whatever_the_text_a_tag_holds_it_unchanged(text: str):
    page = Page(tag("p", text, title=text))
    assert page.tags == ["p"] and page.text == visible(text)
    assert page.attributes == [("title", visible(text))]


@pytest.mark.parametrize("make", [bare, lambda verb: Report(verb), lambda verb: Report(verb, before=Size(1, 2, 3))])
@pytest.mark.parametrize("verb", ["optimize", "plan"])
def test_absent_values_are_told(make: Any, verb: str):
    report = make(verb)
    Page(html_text(report))
    text = table_text(report)
    assert text.startswith(f"{verb}: ok") and "None" not in text and "nan" not in text
    assert json.loads(json_text(report))["status"] == "ok"


def test_a_plan_shows_predicted_sizes():
    report = Report("plan", before=Size(1000, 2048, 10), ratio=Ratio(0.5, 0.75, 0.5))
    text = table_text(report)
    assert "planned" in text and "≈ 1.50 KB" in text and "−25.0 %" in text


@pytest.mark.parametrize(
    ("interval", "verdict"), [((0.8, 0.7, 0.9), "better"), ((1.0, 0.95, 1.06), "same"), ((1.2, 1.1, 1.3), "worse")]
)
def test_latency_is_judged_by_its_interval(interval: tuple[float, float, float], verdict: str):
    before, after = Size(1, 1, 1, 2.0), Size(1, 1, 1, 2.0)
    report = Report("optimize", before=before, after=after, ratio=Ratio.of(before, after, interval))
    assert comparison(report)[-1].label == "latency" and comparison(report)[-1].verdict == verdict
    assert f"bar {verdict}" in [value for _, value in Page(html_text(report)).attributes]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_ruined_result_can_still_be_told(bad: float):
    report = sample(1)
    report.seconds, report.status = bad, "gate_failed"
    report.drift = Drift(bad, bad, bad, bad, bad, 1, 0.5, False)
    report.decisions = [Decision("w", (2, 2), "low-rank", "", bad, bad, bad)]
    report.spectra = [Spectrum("w", [bad, bad], 1)]
    report.after = Size(1, 1, 1, bad, 1)
    report.ratio, report.task = Ratio(bad, bad, bad, bad, bad, bad), {"accuracy": {"before": 1.0, "after": bad}}
    page = Page(html_text(report))
    numbers = {"x", "y", "width", "height", "d", "x1", "x2", "y1", "y2", "cx", "cy", "viewbox"}
    assert not [pair for pair in page.attributes if pair[0] in numbers and re.search("nan|inf", pair[1])]
    assert "limit 0.5" in table_text(report) and "failed" in page.text
    json.loads(json_text(report), parse_constant=lambda name: pytest.fail(name))


def test_where_it_was_made():
    assert list(versions()) == ["lrcompile", "python", "torch", "onnx", "onnxruntime", "numpy"]
    assert versions()["numpy"] == np.__version__
    found = machine()
    assert list(found) == ["cpu", "cores", "os"] and found["cpu"] and int(found["cores"]) >= 1


def test_the_records_import_nothing_heavy():
    code = (
        "import sys, lrcompile.report as r; r.versions(); r.json_text(r.Report('plan'));"
        "print([m for m in ('torch','numpy','rich','onnx','onnxruntime','matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
