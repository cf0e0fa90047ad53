"""A kit that measures, on the target, what a latency budget needs to know."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lrcompile.cli.shell import Answer
from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.feeds import feeds, shapes
from lrcompile.files import digest
from lrcompile.frontend import open_graph
from lrcompile.planning import Settings, select
from lrcompile.profiling import kit
from lrcompile.profiling.survey import representatives, survey
from lrcompile.progress import Progress
from lrcompile.registry import backend_for, load
from lrcompile.registry import passes as known
from lrcompile.report import human_bytes
from lrcompile.rewrite import LinearPass, parse


def profile(given: dict[str, Any], tell: Progress) -> Answer:
    """``lrcompile profile``: writes the folder all at once, or not at all.

    Raises:
        UsageError: the folder exists, or unknown passes or shapes.
        UnsupportedError: no ONNX model, or no inputs can be made up.
    """
    model, out = Path(given["model"]), Path(given["emit"])
    _check_folder(out, given["force"])
    graph = open_graph(model)
    if graph.kind != "onnx":
        raise UnsupportedError("a kit is made for ONNX models", where=str(model), hint="export the model to ONNX")
    batch = feeds(graph, given["calib"], shapes(given["shape"] or ()), given["samples"])
    settings = Settings(include=tuple(given["include"] or ("*",)), exclude=tuple(given["exclude"] or ()))
    sites, _ = select(graph, settings)
    table = known() if given["passes"] else {}
    passes = [parse(text, table) for text in given["passes"] or []] or [load("passes", "low-rank")()]
    linear = [each for each in passes if isinstance(each, LinearPass)]
    tell("decomposing one weight of every shape")
    found = survey(graph, sites, representatives(graph, sites, linear, batch, settings.align), batch)
    tell("writing the kit")
    size = _write(found, backend_for(graph), out, given)
    script = out / kit.SCRIPT
    command = f"cd {out} && python {kit.SCRIPT}"
    fields = {
        "input": {"path": str(model), "sha256": digest(model, graph.files)},
        "output": {"path": str(out), "bytes": size},
        "shapes": len(found.candidates),
        "points": sum(len(each) for each in found.candidates.values()),
        "sites": len(sites),
        "command": command,
        "files": sorted(path.name for path in out.iterdir()),
    }

    def show() -> None:
        print(f"wrote {script.parent} ({human_bytes(size)}): {fields['points']} products of {fields['shapes']} shapes")
        print(f"on the target, with numpy and onnxruntime: {command}")
        print(f"then here: lrcompile optimize {model} --latency 0.8 --costs costs.json --calib …")

    return Answer(fields, show)


def _check_folder(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError("is no folder", where=str(out), hint="choose another --emit")
    if out.is_dir() and any(out.iterdir()) and not (force and (out / "kit.json").is_file()):
        hint = "choose another --emit" + (", or --force" if (out / "kit.json").is_file() else "")
        raise UsageError("the folder is not empty", where=str(out), hint=hint)
    if not out.absolute().parent.is_dir():
        raise UsageError("there is no such folder", where=str(out.absolute().parent), hint="create it first")


def _write(found: Any, backend: Any, out: Path, given: dict[str, Any]) -> int:
    """The kit in place of the folder; returns its bytes."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as scratch:
        made = Path(scratch) / "kit"
        made.mkdir()
        kit.write(found, backend, made, given["threads"])
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(made, out)
    return sum(path.stat().st_size for path in out.iterdir())
