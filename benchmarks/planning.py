"""SmolLM2 planned from its ONNX file through the command line, statistics included: seconds and memory."""

from __future__ import annotations

from benchmarks.common import WORK, run, table, write
from lrcompile.files import sha256
from lrcompile.zoo import exported, smollm2

KEEP = "0.8"
SECONDS, MEMORY = 600, (0.6, 4)
"""What is asked for: seconds, and GB of memory beside a multiple of the model's bytes."""


def main() -> None:
    """One process, nothing cached."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = exported("smollm2")
    calibration, _ = smollm2.write_npz(WORK / "smollm2-data")
    child = run([
        "lrcompile", "plan", str(dense), "--keep", KEEP, "--calib", str(calibration), "--no-cache", "--json", "-q"
    ])  # fmt: skip
    if child.code:
        raise SystemExit(child.stdout)
    size = dense.stat().st_size
    limit = MEMORY[0] * 1e9 + MEMORY[1] * size
    rows = [
        ("seconds, statistics included", f"{child.seconds:.0f}", f"≤ {SECONDS}"),
        ("peak resident MB", f"{child.peak / 1e6:.0f}", f"≤ {limit / 1e6:.0f}"),
    ]
    text = (
        f"`lrcompile plan {dense.name} --keep {KEEP} --calib calib.npz` ({size / 1e6:.0f} MB, {sha256(dense)[:12]}; 96 \
sequences of 256 tokens). Memory is the process's own high-water mark; the required is 0.6 GB and four times the model."
    )
    write("planning", "SmolLM2: what a plan takes", [text, table(("", "measured", "required"), rows)])
