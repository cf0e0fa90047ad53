"""``python -m benchmarks [NAME …]``: runs measurements and writes ``benchmarks/results/NAME.md``."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "startup", "raising", "conformance", "minilm", "latency", "smollm2", "smollm2_module", "ablation", "anchored",
    "joint", "decode", "degridded", "half", "planning", "wide_layer", "dispatch", "compile", "regional",
    "schedule", "tile_rules", "mcu", "mcu_planner", "mcu_conformance",
)  # fmt: skip


def main() -> None:
    """Runs the named measurements, or all of them."""
    wanted = [name for name in sys.argv[1:] if not name.endswith(".onnx")] or list(NAMES)
    for name in wanted:
        if name not in NAMES:
            raise SystemExit(f"unknown benchmark '{name}'; known: {', '.join(NAMES)}")
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
