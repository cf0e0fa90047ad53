"""A real model, compressed and judged, from what the package carries."""

from __future__ import annotations

from pathlib import Path

from lrcompile.cli.shell import Answer
from lrcompile.progress import Progress

KEEP = 0.5
BATCH = 64


def demo(output: str, tell: Progress) -> Answer:
    """Halves the weights of a vision transformer for handwritten digits.

    The gate sees validation digits only; the accuracy is that on test digits, which this compression never sees.
    """
    from lrcompile.api import optimize
    from lrcompile.budget import Budget
    from lrcompile.options import Options
    from lrcompile.report import print_report, to_json
    from lrcompile.zoo import digits_vit

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    result = optimize(
        digits_vit.ONNX,
        Budget(keep=KEEP),
        calibration=digits_vit.calibration(),
        evaluation=digits_vit.evaluation(),
        options=Options(force=True, latency_batch=BATCH, task=digits_vit.metric, report_name="report"),
        out=folder / "model.onnx",
        tell=tell,
    )
    report = result.report

    def show() -> None:
        print_report(report)
        print(
            f"\na vision transformer for handwritten digits, every row read from one of two files:\n  {digits_vit.ONNX}"
        )
        print(f"  {folder / 'model.onnx'}")
        print(f"the same with pictures: {folder / 'report.html'}")

    found = {
        key: value for key, value in to_json(report).items() if key not in ("schema", "status", "seconds", "versions")
    }
    return Answer(found, show, report.status)
