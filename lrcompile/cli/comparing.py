"""Two models on the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile import verify
from lrcompile.cli.shell import Answer
from lrcompile.data import Batches
from lrcompile.errors import UnsupportedError
from lrcompile.files import sha256
from lrcompile.frontend import open_graph
from lrcompile.report import human_bytes, jsonable
from lrcompile.samples import sample_inputs


def compare(a: Path, b: Path, data: str | None, limit: float | None, metric: str | None) -> Answer:
    """Drift of ``b`` against ``a``; made-up inputs where none are given."""
    first, second = open_graph(a), open_graph(b)
    batches: Any
    if data is None:
        made = sample_inputs(first)
        if made is None:
            raise UnsupportedError("no inputs could be made up for this model", where=str(a), hint="give --eval")
        batches = [made]
    else:
        batches = Batches(data).check(first.input_specs)
    chosen = verify.load_metric(metric) if metric else None
    drift = verify.measure(first.run, second.run, batches, limit=limit, metric=chosen)
    fields = {
        "a": _file(a),
        "b": _file(b),
        "drift": jsonable({**vars(drift), "passed": drift.passed}) | {"inputs": "made up" if data is None else "given"},
    }

    def show() -> None:
        origin = "made-up inputs" if data is None else f"{drift.samples} samples"
        print(f"relative L2 {drift.relative_l2:.3g}, cosine {drift.cosine:.6f} on {origin} (output {drift.worst_output})")
        if drift.top1 is not None:
            print(f"top-1 agreement {drift.top1:.2%}, KL {drift.kl:.3g} nats")
        if drift.metric is not None:
            print(f"metric {drift.metric:.6g}")
        print(f"{a}: {human_bytes(_bytes(a))}    {b}: {human_bytes(_bytes(b))}")
        if limit is not None:
            print("passed" if drift.passed else f"FAILED: above {limit:g}")

    return Answer(fields, show, "ok" if drift.passed else "gate_failed", 0 if drift.passed else 5)


def _file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "sha256": sha256(path) if path.is_file() else None}


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
