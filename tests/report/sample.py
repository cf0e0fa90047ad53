"""A made-up run with everything in it."""

from __future__ import annotations

import math

from lrcompile.report import (
    BudgetLine,
    Calibration,
    Decision,
    Drift,
    FileInfo,
    PassRecord,
    Ratio,
    Report,
    Size,
    Spectrum,
)

KINDS = (
    ("attention/self/query", 384, 384),
    ("attention/self/key", 384, 384),
    ("attention/self/value", 384, 384),
    ("attention/output/dense", 384, 384),
    ("intermediate/dense", 1536, 384),
    ("output/dense", 384, 1536),
)


def _tails(full: int, speed: float) -> list[float]:
    values = [math.exp(-speed * index / full) / (1 + 6 * index / full) for index in range(full)]
    return [sum(values[rank:]) for rank in range(full + 1)]


def _site(layer: int, kind: int) -> tuple[Decision, Spectrum]:
    part, out, into = KINDS[kind]
    name, full = f"encoder/layer.{layer}/{part}", min(out, into)
    tails = _tails(full, 1.5 + (layer * 7 + kind * 3) % 9)
    if kind == 3 and layer % 2:
        reason = f"rank {188 + layer} would be above break-even (192 of {full})"
        return Decision(name, (out, into), reason=reason, keep=1.0), Spectrum.of(name, tails)
    rank = 64 + 16 * ((layer * 5 + kind * 3) % 8)
    keep, loss = rank * (out + into) / (out * into), tails[rank] / tails[0]
    shape = f"Product(Dense {out}x{rank}, Dense {rank}x{into})"
    source = "gauged-low-rank" if kind == 2 else "low-rank"
    decision = Decision(name, (out, into), source, shape, keep, loss * 0.05, loss, f"rank {rank} of {full}")
    return decision, Spectrum.of(name, tails, rank)


def sample(layers: int = 6) -> Report:
    found = [_site(layer, kind) for layer in range(layers) for kind in range(len(KINDS))]
    decisions = [
        Decision("pooler/dense", (384, 384), "exact-low-rank", "Product(Dense 384x40, Dense 40x384)", 0.208, 0.0)
    ]
    decisions += [decision for decision, _ in found]
    dense = sum(not each.pass_ for each in decisions)
    before, after = (
        Size(22_713_216, 90_984_112, 2_741_600_256, 31.42, 231_000_000),
        Size(15_120_384, 60_617_009, 1_702_111_232, 20.61, 169_000_000),
    )
    return Report(
        verb="optimize",
        seconds=184.27,
        versions={"lrcompile": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.25.0", "numpy": None},
        machine={"cpu": "Example Processor 9000 @ 2.10GHz", "cores": 2, "os": "Linux x86_64"},
        input=FileInfo("models/all-MiniLM-L6-v2.onnx", "3f" * 32, before.bytes),
        output=FileInfo("models/all-MiniLM-L6-v2.lrcompile.onnx", "a7" * 32, after.bytes),
        report="models/all-MiniLM-L6-v2.lrcompile.report.json",
        before=before,
        after=after,
        ratio=Ratio.of(before, after, (0.656, 0.641, 0.672)),
        budget={
            "drift": BudgetLine(0.5, 0.2814),
            "keep": BudgetLine(0.8, 0.7993),
            "bytes": BudgetLine(62914560, 60617009),
        },
        feasible=True,
        drift=Drift(0.2814, 0.9613, 0.984, 0.0123, None, 64, 0.5, True, "last_hidden_state"),
        calibration=Calibration("npz", 256, 32768, "c1" * 32),
        seed=0,
        preset="small",
        sites={"total": len(decisions), "rewritten": len(decisions) - dense, "dense": dense, "refused": 0},
        decisions=decisions,
        passes=[
            PassRecord("clean", True, 14, 0, None, 0.41),
            PassRecord("exact-low-rank", True, 1, 36, None, 2.2),
            PassRecord("low-rank", False, 27, 3, None, 121.7),
            PassRecord("share-atoms", False, 6, 0, "drift 0.61 is above the limit 0.5", 31.0),
        ],
        notes=["int8 (dynamic) of the same file: 22.9 MB, drift 0.031", "3 layers stay dense: above break-even"],
        spectra=[spectrum for _, spectrum in found],
        config={"preset": "small", "keep": 0.8, "calib": "calib.npz", "passes": [{"name": "low-rank", "align": 8}]},
        task={"Lee-50 correlation": {"before": 0.656, "after": 0.6285}},
        memory=[(second, int(2.1e8 + 9e7 * math.sin(second / 18) ** 2 + second * 3e5)) for second in range(0, 185, 3)],
    )
