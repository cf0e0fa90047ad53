"""What all measurements share: child processes with their memory, tables, where they were made."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrcompile import LowRank, measure
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.data import Batches
from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings, importance, statistics
from lrcompile.progress import Progress
from lrcompile.report import machine, versions
from lrcompile.rewrite import Context

RESULTS = Path(__file__).parent / "results"
WORK = Path(".cache") / "benchmarks"
POLL = 0.02


@dataclass(frozen=True)
class Child:
    """A finished process: seconds of wall time, peak resident bytes of itself and of its whole tree."""

    seconds: float
    peak: int
    tree: int
    stdout: str
    code: int


def run(arguments: Sequence[str]) -> Child:
    """Runs ``python -m …`` and watches its memory fifty times a second."""
    start = time.monotonic()
    peak = tree = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:  # a pipe that nobody empties would stop it
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, text=True)
        while process.poll() is None:
            sizes = [_resident(pid) for pid in _tree(process.pid)]
            peak, tree = max(peak, _high(process.pid)), max(tree, sum(sizes))
            time.sleep(POLL)
        seconds = time.monotonic() - start
        out.seek(0)
        return Child(seconds, peak, tree, out.read(), process.returncode)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found.extend(map(int, children.split()))
    return found


def _field(pid: int, name: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0


def _resident(pid: int) -> int:
    return _field(pid, "VmRSS")


def _high(pid: int) -> int:
    return _field(pid, "VmHWM")


def uniform(
    dense: Path, each: LowRank, keep: float, data: Batches, settings: Settings, out: Path, *, ends: bool = True
) -> Path:
    """Writes the model with each site at the largest rank that keeps at most ``keep`` of its values: what papers do.

    Args:
        ends: also the first and the last site, which papers on images leave alone.
    """
    each = replace(each, columns=False)  # a rank alone says how large a site becomes
    graph = OnnxGraph.load(dense)
    sites = [site for site in graph.linear_sites() if not site.frozen]
    sites = sites if ends else sites[1:-1]
    checked = data.check(graph.input_specs)
    moments = statistics(graph, sites, checked, settings, Progress())
    gradients = importance(graph, sites, checked if each.two_sided else None, settings, Progress())[0].moments
    context = Context(graph, moments, align=1, gradients=gradients)  # no value of the budget is left to rounding
    for site in sites:
        whole = site.shape[0] * site.shape[1]
        chosen = [p for p in each.proposals(site, context) if p.cost.parameters <= keep * whole][-1].by[site.name]
        graph.replace(site, chosen.operator, chosen.shift)
    with AtomicSet(out, force=True) as files:
        OnnxRuntime().build(graph, out=files)
    return files.target


def ratio_text(timing: measure.Timing | None) -> str:
    """A measured ratio with its interval; a dash where something did not run."""
    return "—" if timing is None else f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]"


def kept_share(path: Path, dense: Path) -> str:
    """Share of the values of the linears that the file stores: the rest of the model is the same in both."""
    before, after = OnnxGraph.load(dense), OnnxGraph.load(path)
    values = sum(site.shape[0] * site.shape[1] for site in before.linear_sites() if not site.frozen)
    return f"{1 - (before.parameters - after.parameters) / values:.4f}"


def kept(folder: str, key: str, made: Mapping[str, object], found: object) -> None:
    """Keeps one piece of a long measurement, so that it may be made in several runs.

    Args:
        made: what it depends on, see :func:`made_by`.
        found: anything that JSON can hold.
    """
    (WORK / folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made": made, "found": found})
    (WORK / folder / f"{key}.json").write_text(text, encoding="utf-8")


def pieces(folder: str, keys: Iterable[str], made: Mapping[str, object]) -> dict[str, Any]:
    """The pieces that the same code has made on the same machine, of those asked for."""
    found = {}
    for key in keys:
        path = WORK / folder / f"{key}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if held.get("made") == json.loads(json.dumps(made)):
            found[key] = held["found"]
    return found


def made_by(script: str) -> dict[str, object]:
    """Machine, versions, and a digest of all code of this project that a benchmark's figures depend on."""
    root = Path(__file__).parent.parent
    folders = ("lrcompile", "passes", "backends", "models_zoo")
    files = sorted({path.resolve() for folder in folders for path in (root / folder).rglob("*.py")})
    code = hashlib.sha256(b"".join(file.read_bytes() for file in [*files, Path(script)])).hexdigest()[:12]
    return {"code": code, **machine(), **versions()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write(name: str, title: str, parts: Sequence[str]) -> None:
    """Writes the result with the machine and versions that made it."""
    made = ", ".join(f"{key} {value}" for key, value in {**machine(), **versions()}.items())
    text = "\n\n".join([f"# {title}", f"Command: `python -m benchmarks {name}`. Made on: {made}.", *parts]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
