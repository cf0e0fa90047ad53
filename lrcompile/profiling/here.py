"""Times a model's products on this machine: ONNX models by their kit, modules in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lrcompile import cache, costs
from lrcompile.errors import UnsupportedError
from lrcompile.files import sha256
from lrcompile.lowering import Backend
from lrcompile.measure import cores
from lrcompile.profiling.survey import Survey
from lrcompile.progress import Progress
from lrcompile.report import machine, versions

SECONDS = 0.4
"""For each size of each form."""


def table(survey: Survey, backend: Backend, threads: int, where: Path | None, tell: Progress) -> costs.CostTable:
    """The measured costs of a survey; from the cache where this machine has measured the same before.

    Raises:
        UnsupportedError: the model does not run here.
    """
    threads = cores(threads)
    if survey.graph.kind != "onnx":
        from lrcompile.profiling.eager import measured

        key = _key("torch", survey.graph.fingerprint(), _outline(survey), str(threads))
        return _once(key, where, lambda: measured(survey, threads, SECONDS, tell))
    from lrcompile.profiling import kit

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("writing models to time")
        script = kit.write(survey, backend, folder, threads)
        contents = ",".join(f"{path.name}:{sha256(path)}" for path in sorted(folder.iterdir()))
        return _once(_key("onnxruntime", contents), where, lambda: _run(script, tell))


def _run(script: Path, tell: Progress) -> dict[str, Any]:
    tell("timing products of every shape")
    output = script.with_name("costs.json")
    command = [sys.executable, "-P", str(script), "--seconds", str(SECONDS), "-o", str(output)]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1][:300]
        raise UnsupportedError(f"the model's products could not be timed: {reason}", hint="give --costs costs.json")
    return json.loads(output.read_text(encoding="utf-8"))


def _key(*parts: str) -> str:
    made = {**machine(), **versions()}
    return cache.key("costs/2", *parts, str(SECONDS), json.dumps(made, sort_keys=True))


def _outline(survey: Survey) -> str:
    points = [[list(shape), each.form, each.macs] for shape, found in survey.candidates.items() for each in found]
    return json.dumps([points, {name: list(array.shape) for name, array in survey.feed.items()}])


def _once(key: str, where: Path | None, make: Any) -> costs.CostTable:
    stored = cache.load(key, where)
    if stored is not None:
        return costs.parse(json.loads(stored[1]["costs"]), "the cache")
    found = make()
    cache.store(key, {"none": torch.zeros(1)}, {"costs": json.dumps(found)}, where)
    return costs.parse(found, "the measurement")
