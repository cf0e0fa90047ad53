"""ONNX's conformance cases through ``optimize`` without a budget: as they are, and behind constant linear layers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

import lrcompile
from benchmarks.common import table, write
from benchmarks.conformance_cases import RANDOM, cases, embedded, equal, feeds_of, outputs
from lrcompile import Options
from lrcompile.errors import LrcompileError

_OPTIONS = Options(preset="safe", latency=False)


@dataclass(eq=False)
class Tally:
    """What became of the cases."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    applied: Counter[str] = field(default_factory=Counter)
    eligible: Counter[str] = field(default_factory=Counter)
    not_applied: list[str] = field(default_factory=list)

    def rows(self) -> list[list[object]]:
        """One row for each outcome."""
        named = [(kind, count) for kind, count in self.counts.most_common()]
        return [[kind, count] for kind, count in named]


def check(tally: Tally, name: str, proto: Any, feeds: dict[str, Any]) -> Any:
    """Optimizes one model and compares what it computes before and after; returns the result."""
    try:
        result = lrcompile.optimize(proto, options=_OPTIONS)
    except LrcompileError as error:
        tally.counts["refused with a reason"] += 1
        tally.refused.append(f"{name}: {error}")
        return None
    except Exception as error:
        tally.counts["crashed"] += 1
        tally.crashed.append(f"{name}: {type(error).__name__}: {error}")
        return None
    if any(word in name for word in RANDOM):
        tally.counts["random outputs, not compared"] += 1
        return result
    before = outputs(proto, feeds)
    if before is None:
        kept = (
            "comes back as it was" if result.report.status == "unchanged" else "was rewritten and checked by structure"
        )
        tally.counts[f"neither ONNX Runtime nor onnx's reference runs it; it {kept}"] += 1
        return result
    after = outputs(ir.to_proto(result.model), feeds)
    if after is not None and after[0] == before[0] and equal(before[1], after[1]):
        tally.counts[f"outputs agree ({before[0]})"] += 1
    else:
        tally.counts["outputs differ"] += 1
        tally.wrong.append(name)
    return result


def bare(tally: Tally, selected: list[Any]) -> None:
    """The cases as they are."""
    for case in selected:
        check(tally, case.name, case.model, feeds_of(case))


def behind(tally: Tally, selected: list[Any]) -> None:
    """The cases behind constant linear layers; counts where a rewrite of those stayed."""
    for index, case in enumerate(selected):
        made = embedded(case, index)
        if made is None:
            tally.counts["no input that a linear layer could feed"] += 1
            continue
        tally.eligible[made.style] += 1
        result = check(tally, case.name, made.proto, made.feeds)
        if result is not None and result.report.status == "ok" and result.graph.replacements:
            tally.applied[made.style] += 1
        else:
            tally.not_applied.append(f"{case.name} ({made.style})")


def main() -> None:
    """Runs all cases twice."""
    parts = []
    start = time.monotonic()
    for title, run in (("As they are", bare), ("Behind constant linear layers", behind)):
        tally = Tally()
        run(tally, cases())
        parts.append(f"## {title}")
        parts.append(table(["what became of the case", "cases"], [*tally.rows(), ["all", sum(tally.counts.values())]]))
        if tally.eligible:
            rows = [[style, total, tally.applied[style]] for style, total in tally.eligible.items()]
            whole = [["all", tally.eligible.total(), tally.applied.total()]]
            parts.append(table(["what stands before the case", "cases", "rewrite applied"], [*rows, *whole]))
        for kind in ("wrong", "crashed", "refused", "not_applied"):
            names = getattr(tally, kind)
            if names:
                parts.append(f"{kind.replace('_', ' ')}: " + "; ".join(names[:40]))
    parts.append(f"{time.monotonic() - start:.0f} seconds in all.")
    write("conformance", f"ONNX's {len(cases())} conformance cases through exact rewrites", parts)
